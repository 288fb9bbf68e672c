"""plan: what `vlcp plan` says that the whole demo takes, by the rates of a short trial, against the run itself."""

import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlcp_dist import config, pipeline, plan
from vlcp_dist.engine.progress import Progress

REPOSITORY = Path(__file__).parents[1]
CONFIGS = {"real": REPOSITORY / "configs" / "demo.yaml", "tiny": REPOSITORY / "tests" / "micro.yaml"}
# Every stage once, with less of what is counted: one IPC, strategy and seed, fewer steps and epochs.
TRIALS = {
    "real": [
        "ipc=[5]", "pretrain.vae_steps=100", "finetune.epochs=2", "synthesize.strategies=[DCS]",
        "evaluate.baselines=[random,full]", "evaluate.seeds=[0]", "evaluate.epochs={0: 2, 5: 30}",
    ],
    "tiny": ["ipc=[1]", "finetune.epochs=4", "synthesize.strategies=[DCS]"],
}  # fmt: skip


def measure(size: str, device: str) -> list[dict[str, Any]]:
    """Seconds predicted (`ours`) and measured (`baseline`), of the whole run and of each stage, and their quotient.

    A stage lasts from the end of the one before it to its own: the first one has Ray's start in it, which is not
    predicted. The whole also has the report.
    """
    with tempfile.TemporaryDirectory() as folder:
        trial, whole = Path(folder) / "trial", Path(folder) / "whole"
        trial_seconds = _run(size, trial, TRIALS[size])
        predicted = _predict(size, device, whole, trial)
        began = time.time()
        seconds = _run(size, whole, [])
        measured = _stages(whole, began)
    rows = [_row("plan.total", sum(predicted.values()), seconds, f"after a trial of {trial_seconds:.0f} s")]
    return rows + [_row(f"plan.{stage}", predicted[stage], measured[stage], "") for stage in predicted]


def _row(name: str, predicted: float, measured: float, note: str) -> dict[str, Any]:
    return {
        "name": name,
        "ours": round(predicted, 1),
        "baseline": round(measured, 1),
        "ratio": round(predicted / measured, 3) if measured else None,
        "unit": "s",
        "note": note,
    }


def _run(size: str, root: Path, overrides: list[str]) -> float:
    """Seconds of `vlcp run` in a process of its own."""
    command = [sys.executable, "-m", "vlcp_dist", "run", "-c", str(CONFIGS[size]), f"root={root}", *overrides]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _predict(size: str, device: str, root: Path, trial: Path) -> dict[str, float]:
    """Seconds of every stage that is left once the index is there, as `vlcp plan --rates` says."""
    cfg = config.load(CONFIGS[size], [f"root={root}"])
    pipeline.run(config.load(CONFIGS[size], [f"root={root}", "engine.kind=serial"]), Progress(), only=["index"])
    states = {state.stage.name: state for state in pipeline.status(cfg)}
    rows = plan.rows(states, plan.load_trial(str(trial)), [_machines(device)])
    return {row["stage"]: row["wall_seconds"][str(_machines(device))] for row in rows if row["stage"] != "index"}


def _machines(device: str) -> plan.Machines:
    import torch

    if device == "cuda":
        return plan.Machines(torch.cuda.device_count(), gpus=True)
    return plan.Machines(os.cpu_count() or 1, gpus=False)


def _stages(root: Path, began: float) -> dict[str, float]:
    """Seconds from the last unit of one stage to the last of the next, by their markers."""
    cfg = config.load(root / "report" / "config.yaml")
    ends = [("", began)]
    for state in pipeline.status(cfg):
        if state.stage.name != "index":
            ends.append((state.stage.name, max(marker["finished"] for marker in state.markers.values())))
    return {name: end - before for (_, before), (name, end) in pairwise(ends)}
