"""The tables of `docs/sizing.md`: `python docs/sizing.py`, and with the root of a run what it measured."""

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlcp_dist import config, costs, pipeline, plan
from vlcp_dist.stages import base
from vlcp_dist.status import StageStatus

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet1k.yaml"
TRAIN, TEST, CLASSES = 1_281_167, 50_000, 1000
IPCS = (10, 20, 50, 100)
GPUS = (8, 16, 64)


def imagenet() -> list[str]:
    """Of the settings of `configs/imagenet1k.yaml`: the work at each IPC, and what more GPUs do for all IPCs in one."""
    with tempfile.TemporaryDirectory() as root:
        by_ipc = [_states(root, [ipc]) for ipc in IPCS]
        return [_work(by_ipc), _speedups(_states(root, IPCS))]


def measured(root: str) -> str:
    """What a worker did in the run at `root`."""
    rates = plan.load_trial(root).rates.items()
    return _table(
        ["stage", "piece", "pieces a second", "s until ready", "measured by"],
        (
            [stage, costs.WORK[stage].piece, f"{1 / rate.piece_seconds:,.4g}", f"{rate.start:.1f}", rate.source]
            for stage, rate in rates
        ),
    )


def _work(by_ipc: Sequence[Sequence[StageStatus]]) -> str:
    """Units and pieces of every stage, a column for each IPC."""
    rows = []
    for states in zip(*by_ipc, strict=True):
        name, units = states[0].stage.name, [state.units or [] for state in states]
        counts = dict.fromkeys(f"{len(of_ipc):,}" for of_ipc in units)
        pieces = [
            sum(costs.pieces(name, state.cfg, unit) for unit in of_ipc)
            for state, of_ipc in zip(states, units, strict=True)
        ]
        rows.append([name, costs.WORK[name].piece, " / ".join(counts), *(f"{amount:,.0f}" for amount in pieces)])
    return _table(["stage", "piece", "units", *(f"IPC {ipc}" for ipc in IPCS)], rows)


def _speedups(states: Sequence[StageStatus]) -> str:
    """How many times faster than on one GPU a stage is on more: units are not divided, and few share out badly."""

    def seconds(state: StageStatus, gpus: int) -> float:
        rate = costs.Rate("", device="a GPU" if state.stage.gpu else "cpu", piece_seconds=1.0)
        wall = plan.wall_seconds(state, plan.Machines(gpus, gpus=True), rate)
        assert wall is not None
        return wall

    return _table(
        ["stage", "units", *(f"{gpus} GPUs" for gpus in GPUS)],
        (
            [
                state.stage.name,
                f"{len(state.units or []):,}",
                *(f"{seconds(state, 1) / seconds(state, gpus):.1f}" for gpus in GPUS),
            ]
            for state in states
        ),
    )


def _states(root: str, ipcs: Sequence[int]) -> list[StageStatus]:
    """The stages that have units, nothing of them done; the index, which is a listing, aside."""
    cfg = config.load(CONFIG, [f"root={root}", f"ipc={list(ipcs)}"])
    run = base.make_run(cfg, pipeline.stages(cfg))
    _write_index(Path(root) / run.folders["index"].path.name, cfg.data.shard_size)
    states = [
        StageStatus(stage, run.folders[stage.name], stage.units(run), {}, {}, cfg) for stage in pipeline.stages(cfg)[1:]
    ]
    return [state for state in states if state.units]


def _write_index(folder: Path, shard_size: int) -> None:
    """What of an index says how many units there are: classes as equal in size as they can be."""
    class_ids = [f"n{i:08d}" for i in range(CLASSES)]
    ends = [TRAIN * (i + 1) // CLASSES for i in range(CLASSES)]
    groups = []
    for number, start in enumerate(range(0, TRAIN, shard_size)):
        stop = min(start + shard_size, TRAIN)
        shares = {
            class_id: min(end, stop) - max(before, start)
            for class_id, before, end in zip(class_ids, [0, *ends], ends, strict=False)
            if before < stop and end > start
        }
        groups.append(_group(f"{number:06d}", "train", number, stop - start, shares))
    groups.append(_group("test-000000", "test", len(groups), TEST, dict.fromkeys(class_ids, TEST // CLASSES)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in class_ids]))
    (folder / "shards.json").write_text(json.dumps(groups))


def _group(name: str, split: str, number: int, images: int, classes: dict[str, int]) -> dict[str, object]:
    return {"name": name, "split": split, "row_group": number, "images": images, "classes": classes}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    print(measured(sys.argv[1]) if len(sys.argv) > 1 else "\n\n".join(imagenet()))
