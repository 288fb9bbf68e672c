"""cluster.*: `cluster/local.sh`, then runs as jobs: all of a configuration, and a larger IPC against all of it anew."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import ROOT, Row

SMALL = ["synthesize.strategies=[DCS]", "evaluate.baselines=[]", "pretrain.vae_steps=2", "finetune.epochs=2"]
# By size: the configuration, what is changed in it, the first IPCs and those that are asked for later.
RUNS = {
    "tiny": ("tests/micro.yaml", SMALL, "[1]", "[1,2]"),
    "real": ("configs/demo.yaml", [], "[1,5,10]", "[1,5,10,20]"),
}
STAGE = re.compile(r"\w+: \d+ of \d+ units")


@dataclass(frozen=True)
class Ended:
    """Seconds of `ray job submit` to its end, and to the first line of a stage."""

    seconds: float
    first_stage: float


def measure(size: str = "real") -> list[Row]:
    config, settings, ipc, larger = RUNS[size]
    with tempfile.TemporaryDirectory() as folder, _cluster() as (started, environment):
        grown, anew = Path(folder) / "grown", Path(folder) / "anew"

        def job(script: str, root: Path, ipc: str) -> Ended:
            return _job(environment, [script, "--config", config, f"root={root}", f"ipc={ipc}", *settings])

        distilled = job("jobs/distill.py", grown, ipc)
        growth = job("jobs/grow_ipc.py", grown, larger)
        whole = job("jobs/distill.py", anew, larger)
        images = _same_images(grown, anew)
    return [
        _row("up", started, "head and two nodes of two CPUs each, with a token, until local.sh says that they are up"),
        _row("first_stage", distilled.first_stage, "from `ray job submit` to the first line of a stage"),
        _row("distill", distilled.seconds, f"jobs/distill.py, {config}, ipc={ipc}"),
        _row(
            "grow_ipc",
            growth.seconds,
            f"jobs/grow_ipc.py, ipc={larger}, on that run; against all of it anew, with the same {images} images",
            baseline=whole.seconds,
        ),
    ]


def _row(name: str, seconds: float, note: str, baseline: float | None = None) -> Row:
    ratio = baseline / seconds if baseline else None
    return {
        "name": f"cluster.{name}", "ours": seconds, "baseline": baseline, "ratio": ratio, "unit": "s", "note": note,
    }  # fmt: skip


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[float, dict[str, str]]]:
    """Seconds until it was up, and the environment that its users need."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["RAY_PORT"], environment["DASHBOARD_PORT"] = map(str, _free_ports(2))
    start = time.perf_counter()
    with subprocess.Popen(
        [ROOT / "cluster" / "local.sh"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            sourced = next(line.split()[1] for line in lines if line.strip().startswith("source "))
            seconds = time.perf_counter() - start
            exports = re.findall(r"^export (\w+)=(.*)$", Path(sourced).read_text(), re.MULTILINE)
            yield seconds, environment | dict(exports)
        finally:
            process.terminate()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _job(environment: dict[str, str], script: list[str]) -> Ended:
    """Submit it from the repository, as cluster/README.md says, and show its log until its end."""
    options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
    command = ["ray", "job", "submit", *options, "--", "python", *script, "--progress-interval", "5"]
    first = None
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            if first is None and STAGE.match(line):
                first = time.perf_counter() - start
    assert process.returncode == 0 and first is not None
    return Ended(time.perf_counter() - start, first)


def _same_images(ours: Path, other: Path) -> int:
    """How many images both runs have distilled; they must be the same."""
    found = [
        {path.relative_to(root): path.read_bytes() for path in root.glob("synthesize-*/*/ipc=*/train/*/*.png")}
        for root in (ours, other)
    ]
    assert found[0] and found[0] == found[1]
    return len(found[0])
