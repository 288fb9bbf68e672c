"""`python -m benchmarks NAME`: NAME is a module here (engine) or one of its functions (engine.dispatch)."""

import argparse
import importlib
import inspect
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

LIBRARIES = ("ray", "torch", "diffusers", "transformers", "numpy", "scikit-learn", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ours against what one would run otherwise."
    )
    parser.add_argument("name", help="a module of benchmarks, or MODULE.FUNCTION for one of its measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", "real"), default="real", help="tiny: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    rows = [
        {"ceiling": None, "note": "", **row, "device": arguments.device, "versions": _versions(), "machine": _machine()}
        for row in _measure(arguments.name, device=arguments.device, size=arguments.size)
    ]
    Console().print(_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _measure(name: str, **arguments: str) -> list[dict[str, Any]]:
    module, _, function = name.partition(".")
    try:
        measure = getattr(importlib.import_module(f"benchmarks.{module}"), function or "measure")
    except (ModuleNotFoundError, AttributeError) as error:
        names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
        raise SystemExit(f"{error}; there are: {', '.join(names)}") from error
    taken = inspect.signature(measure).parameters
    rows = measure(**{key: value for key, value in arguments.items() if key in taken})
    return rows if isinstance(rows, list) else [rows]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("name", "ours", "baseline", "ratio", "unit", "note")
    for row in rows:
        table.add_row(
            row["name"], *(_number(row[key]) for key in ("ours", "baseline", "ratio")), row["unit"], row["note"]
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), **_gpu()}


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


if __name__ == "__main__":
    main()
