"""Imports go down only, and Ray stays where it belongs."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlcp_dist"
LAYERS = {  # what each part may import of the package
    "errors": set(),
    "schema": set(),
    "config": {"schema", "errors"},
    "ops": {"ops"},
    "models": {"models", "ops"},
    "data": {"data", "errors"},
    "engine": {"engine", "data", "errors"},
    "stages": {"stages", "engine", "models", "ops", "data", "config", "schema", "errors"},
    "interrupt": set(),
    "costs": {"ops", "data", "schema"},
    "status": {"costs", "stages", "engine", "data", "schema"},
    "plan": {"status", "costs", "engine", "data", "config", "schema", "errors"},
    "pipeline": {"costs", "status", "interrupt", "stages", "engine", "data", "config", "schema", "errors"},
    "report": {"report", "pipeline", "status", "stages", "data", "config", "schema", "errors"},
    "doctor": {"doctor", "pipeline", "stages", "engine", "models", "data", "config", "schema"},
    "cli": {"report", "doctor", "plan", "pipeline", "status", "interrupt", "engine", "data", "config", "errors"},
    "__main__": {"cli"},
}
RAY = {
    "engine/pool.py",
    "engine/nodes.py",
    "engine/actors.py",
    "engine/metrics.py",
    "engine/ray_train.py",
    "pipeline.py",
    "doctor/checks.py",
    "doctor/fit.py",
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("vlcp_dist.")}
    assert ours - {"__version__"} <= LAYERS[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_is_imported_in_few_places_and_what_is_heavy_or_unwanted_nowhere(path):
    top = {name.split(".")[0] for name in imports(path)}
    assert "ray" not in top or str(path.relative_to(PACKAGE)) in RAY
    assert not top & {"torchvision", "timm", "pickle"}
