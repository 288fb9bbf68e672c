# make demo: install, distil the digits, write the report.   make test, make lint: what CI runs.
PYTHON ?= python3
VENV := .venv
EXTRAS ?= dev
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint install
.DELETE_ON_ERROR:

demo: install
	$(VENV)/bin/vlcp run --config configs/demo.yaml root=runs/demo

test: install
	$(VENV)/bin/pytest -n 2 --dist worksteal

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] in ((3, 11), (3, 12)) else "Python 3.11 or 3.12 is needed; name it with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
