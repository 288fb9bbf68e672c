"""The accuracies of a run, one record per training, and their means over seeds."""

import json
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from vlcp_dist.data import storage
from vlcp_dist.status import StageStatus

METHOD_ORDER = ("full", "random", "k-center", "herding", "L", "L+FK", "GGS", "DCS", "DCS-shuffled")


def results(states: list[StageStatus]) -> list[dict[str, Any]]:
    """The record that each finished training left, ordered by IPC, method, net and seed."""
    paths = [
        state.folder.path / name
        for state in states
        if state.stage.name in ("baselines", "evaluate")
        for marker in state.markers.values()
        for name in marker["files"]
        if name.endswith(".json")
    ]
    return sorted((json.loads(data) for data in storage.fetch(paths)), key=_order)


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation (n - 1) over the seeds of every (method, IPC, net); top-1 in percent."""
    rows = []
    for (_, _, _), group in groupby(records, key=lambda r: _order(r)[:3]):
        same = list(group)
        best, last = [r["top1_best"] for r in same], [r["top1_last"] for r in same]
        rows.append(
            {
                "method": same[0]["method"],
                "ipc": same[0]["ipc"],
                "net": same[0]["net"],
                "seeds": len(same),
                "train_images": same[0]["train_images"],
                "best_mean": mean(best),
                "best_std": stdev(best) if len(best) > 1 else 0.0,
                "last_mean": mean(last),
                "last_std": stdev(last) if len(last) > 1 else 0.0,
            }
        )
    return rows


def _order(record: dict[str, Any]) -> tuple[float, int, str, int]:
    ipc = float("inf") if record["ipc"] == "full" else record["ipc"]
    return ipc, METHOD_ORDER.index(record["method"]), record["net"], record["seed"]
