"""What SECURITY.md promises of the sources and of what a run leaves."""

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runs import MICRO
from vlcp_dist.cli import app

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("vlcp_dist", "jobs", "benchmarks", "cluster") for path in (REPOSITORY / folder).rglob("*.py")
)
# What runs code that came with data or weights, or hands text to a shell.
UNSAFE = re.compile(
    r"\b(torch\.load|pickle\.loads?|joblib|shelve|marshal|dill|cloudpickle)\b|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True"
    r"|use_safetensors\s*=\s*False|weights_only\s*=\s*False|yaml\.(unsafe_)?load\(|shell\s*=\s*True|os\.system|(?<![\w.])(eval|exec)\("
    r"|extractall|\.extract\("
)
CANARIES = {
    "AWS_ACCESS_KEY_ID": "canary-id-5f1c",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-77ab",
    "AWS_SESSION_TOKEN": "canary-session-0d3e",
    "HF_TOKEN": "canary-hub-91d0",
    "RAY_AUTH_TOKEN": "canary-ray-c2c2",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_runs_code_that_comes_with_data(path):
    assert not UNSAFE.findall(path.read_text())


def test_weights_are_loaded_from_safetensors_alone():
    """Whoever loads weights says so: the libraries' default takes pickles where there is nothing else."""
    without_weights = re.compile(r"(Config|Processor|Pil|Tokenizer|Scheduler)\.from_pretrained$")
    checked = 0
    for path in (REPOSITORY / "vlcp_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not (name := ast.unparse(node.func)).endswith(".from_pretrained"):
                continue
            if not without_weights.search(name):
                assert "use_safetensors=True" in ast.unparse(node), f"{path}: {name}"
                checked += 1
    assert checked


def test_credentials_of_the_environment_are_left_nowhere(tmp_path, monkeypatch):
    """Neither in what is printed nor in any file: plan, markers, progress, report."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    root, said = tmp_path / "run", ""
    for arguments in (["run", "--print-config"], ["run", "--only", "index"], ["plan"], ["doctor", "--json"]):
        ended = CliRunner().invoke(app, [*arguments, "-c", str(MICRO), f"root={root}", "engine=serial"])
        assert ended.exit_code in (0, 1) and not isinstance(ended.exception, Exception), ended.output
        said += ended.output
    left = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert b"samples" in left and not re.search(rb"canary-\w+", said.encode() + left)
