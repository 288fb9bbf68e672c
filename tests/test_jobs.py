"""Submission with `ray job submit`: what is uploaded, the exit status, and a stopped job that is submitted again."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from runs import MICRO, artefacts, markers

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = ["ipc=[1]", "synthesize.strategies=[DCS]", "evaluate.baselines=[]", "pretrain.vae_steps=2", "finetune.epochs=2"]
VERSION = "0.0.0+uploaded"  # of the package in the working folder: no installed one has it
# What lies about in a real working folder and must stay out of the upload.
EXCLUDED = [
    ".git/objects/pack/a.pack",
    ".mypy_cache/a.json",
    ".venv/bin/python",
    "checkpoints/unet.safetensors",
    "data/images/a.png",
    "runs/a/report.html",
    "shards/000000.tar",
    "vlcp_dist/__pycache__/a.pyc",
]
# The driver on what looks like a machine with a GPU, as a head node often is.
WATCHED = """
import runpy
import torch
import vlcp_dist

def initialise(*_):
    raise RuntimeError("the driver initialised CUDA")

torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = initialise
print("driver runs", vlcp_dist.__file__)
runpy.run_path("jobs/distill.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A working folder with the package, the job files, a configuration and much that must not be uploaded."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("vlcp_dist", "jobs", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(MICRO, folder / "micro.yaml")
    (folder / "watched.py").write_text(WATCHED)
    (folder / "vlcp_dist" / "__init__.py").write_text(f'__version__ = "{VERSION}"\n')
    for name in EXCLUDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(1024))
    return folder


@pytest.fixture(scope="module")
def reference(checkout, tmp_path_factory):
    """A quiet run of the same checkout without Ray."""
    root = tmp_path_factory.mktemp("reference") / "run"
    command = [sys.executable, "jobs/distill.py", "-c", "micro.yaml", f"root={root}", "engine=serial", *SMALL]
    subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True)
    return root


class Cluster:
    """cluster/local.sh with one node of two CPUs; `session` holds what it unpacked.

    While it starts, the port is taken on which the agents of nodes listen unless told otherwise, as where another Ray
    runs. A head whose agent does not listen takes no jobs.
    """

    def __init__(self) -> None:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        port, dashboard = _free_ports(2)
        env = ours | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "WORKERS": "1",
            "CPUS": "2",
            "RAY_PORT": str(port),
            "DASHBOARD_PORT": str(dashboard),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "PYTHONUNBUFFERED": "1",  # the lines of a job as they come
        }
        with socket.socket() as taken:
            with suppress(OSError):  # it is taken already
                taken.bind(("127.0.0.1", 52365))
                taken.listen()
            self._process = _popen(REPOSITORY / "cluster" / "local.sh", env=env)
            folder = Path(until(self._process, r"source (\S+)/env")[1])
        self.session = folder / "session_latest"
        self.env = env | dict(re.findall(r"export (\w+)=(.*)", (folder / "env").read_text()))

    def start(self, *arguments: object, cwd: Path | None = None) -> subprocess.Popen:
        return _popen(BIN / "ray", "job", *map(str, arguments), env=self.env, cwd=cwd)

    def job(self, *arguments: object, cwd: Path | None = None) -> tuple[int, str]:
        """`ray job ...` to its end: exit code and output."""
        process = self.start(*arguments, cwd=cwd)
        log, _ = process.communicate()
        return process.returncode, log

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()


@pytest.fixture(scope="module")
def cluster():
    cluster = _start()
    yield cluster
    cluster.end()


def _start(attempts: int = 3) -> Cluster:
    """One that is up. Ray gives its processes 30 seconds for that; on a busy machine it may take another attempt."""
    for _ in range(attempts - 1):
        with suppress(AssertionError):
            return Cluster()
    return Cluster()


def _popen(*command: object, **settings: object) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def until(process: subprocess.Popen, pattern: str) -> re.Match:
    seen = []
    for line in process.stdout:
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"{pattern} was never printed, exit code {process.wait()}: {''.join(seen[-20:])}")


def submission(root: Path, *overrides: str, script: str = "jobs/distill.py", name: str = "") -> list[str]:
    options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    options += ["--submission-id", name] if name else []
    arguments = ["--config", "micro.yaml", f"root={root}", *SMALL, *overrides, "--progress-interval", "0"]
    return ["submit", *options, "--", "python", script, *arguments]


def test_driver_and_workers_run_the_uploaded_package(cluster, checkout, tmp_path):
    code, log = cluster.job(*submission(tmp_path / "run", "--only", "index", script="watched.py"), cwd=checkout)
    assert code == 0, log
    unpacked = Path(re.search(r"driver runs (.*)/vlcp_dist/__init__.py", log)[1])
    assert unpacked.is_relative_to(cluster.session.resolve())
    (marker,) = (tmp_path / "run").glob("index-*/done/*.json")
    assert json.loads(marker.read_text())["version"] == VERSION
    uploaded = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if "__pycache__" not in path.parts}
    kept = {str(path.relative_to(checkout)) for path in checkout.rglob("*.py")}
    assert kept | {"micro.yaml", "jobs/runtime_env.yaml", "configs/demo.yaml"} <= uploaded
    assert not uploaded & {parent for name in EXCLUDED for parent in (name, Path(name).parts[0])} - {"vlcp_dist"}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("ipcc=[1]", r"failed with exit code 2[\s\S]*unknown key 'ipcc'; did you mean 'ipc'"),
        ("data.path=/absent", r"failed with exit code 1[\s\S]*/absent"),
    ],
)
def test_a_job_that_cannot_be_done_fails_with_the_reason(cluster, checkout, tmp_path, override, reason):
    code, log = cluster.job(*submission(tmp_path / "run", "data.source=imagefolder", override), cwd=checkout)
    assert code == 1
    assert re.search(reason, log), log
    assert "Traceback" not in log


def test_a_stopped_job_goes_on_when_it_is_submitted_again(cluster, checkout, reference, tmp_path):
    root = tmp_path / "run"
    first = cluster.start(*submission(root, name="first"), cwd=checkout)
    until(first, r"caption: 1 of 5")
    _, stopped = cluster.job("stop", "first")
    log, _ = first.communicate()
    assert "was stopped" in stopped
    assert "the same command goes on from here" in log and "Traceback" not in log
    kept = markers(root)
    assert kept and kept.keys() < markers(reference).keys()
    code, log = cluster.job(*submission(root, script="watched.py"), cwd=checkout)
    assert code == 0, log
    assert "succeeded" in log and "report: " in log
    assert "initialised CUDA" not in log
    assert kept.items() <= markers(root).items()
    assert artefacts(root) == artefacts(reference)
    kept = markers(root)
    code, log = cluster.job(*submission(root, "ipc=[1,2]", script="jobs/grow_ipc.py"), cwd=checkout)
    assert code == 0, log
    new = markers(root).keys() - kept.keys()
    assert {name.partition("-")[0] for name in new} == {"prototypes", "synthesize", "evaluate"}
    assert kept.items() <= markers(root).items()


def test_a_larger_ipc_is_not_begun_on_a_run_that_is_not_there(checkout, tmp_path):
    command = [sys.executable, "jobs/grow_ipc.py", "-c", "micro.yaml", f"root={tmp_path / 'run'}", "engine=serial"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    ended = subprocess.run(command, cwd=checkout, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.search(r"prototypes needs .*caption.* to be complete first", ended.stderr)
