"""What is left of a run will take so long: at the rates of its own units, or of another run's, on so many machines."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlcp_dist import config, costs
from vlcp_dist.costs import Rate
from vlcp_dist.data import storage
from vlcp_dist.engine.progress import duration
from vlcp_dist.errors import ConfigError, InputError
from vlcp_dist.schema import Config
from vlcp_dist.status import StageStatus


@dataclass(frozen=True)
class Machines:
    """What a run is given: so many GPUs, or where it has none so many CPUs."""

    count: int
    gpus: bool

    def __str__(self) -> str:
        return f"{self.count} {'GPU' if self.gpus else 'CPU'}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Trial:
    """Another run: its settings, and the rates that it measured, by stage."""

    root: str
    cfg: Config
    rates: dict[str, Rate]


def load_trial(root: str) -> Trial:
    """Read what `vlcp run` or `vlcp report` left of the run at `root`: its `report` folder is all that is needed.

    Raises:
        InputError: there is no report, or one without rates.
    """
    report = storage.locate(root) / "report"
    try:
        rows = json.loads((report / "stages.json").read_bytes())
        cfg = config.load(str(report / "config.yaml"))
    except FileNotFoundError as error:
        raise InputError(
            f"{report} holds no report ({error}); the run leaves it when it ends, or: vlcp report --config CONFIG"
        ) from error
    rates = {row["stage"]: Rate(**row["rate"]) for row in rows if row.get("rate")}
    rates = {stage: replace(rate, source=f"{rate.source} of {root}") for stage, rate in rates.items()}
    if not rates:
        raise InputError(f"{report}/stages.json holds no rates: nothing was done; or write it anew with vlcp report")
    return Trial(root, cfg, rates)


def machines_of(counts: str, *, gpus: bool) -> list[Machines]:
    """Of a list such as `1,8,64`.

    Raises:
        ConfigError: it holds something else than whole numbers above 0.
    """
    parts = counts.split(",") if counts else []
    if wrong := [part for part in parts if not part.strip().isdecimal() or int(part) < 1]:
        option = "gpus" if gpus else "cpus"
        raise ConfigError(f"--{option} {counts}: {wrong[0]!r} is no count of {option.upper()[:3]}s, such as in 1,8,64")
    return [Machines(int(part), gpus) for part in parts]


def rows(states: Mapping[str, StageStatus], trial: Trial | None, columns: Sequence[Machines]) -> list[dict[str, Any]]:
    """A row for each stage, JSON-ready: `StageStatus.summary`, and how long it takes on each of the machines.

    `no_rate` says why a rate of the trial does not hold for a stage that has work left and no rate itself.
    """
    result = []
    for name, state in states.items():
        rate, why = _rate(state, trial)
        wall = {str(machine): wall_seconds(state, machine, rate) for machine in columns}
        result.append(state.summary(rate) | {"stage": name, "no_rate": why, "wall_seconds": wall})
    return result


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Machines]) -> list[list[str]]:
    """The rows for people, below a header; the last line adds up what is known, and says if that is not all."""
    names = [str(machines) for machines in columns]
    lines = [["stage", "cached", "to run", "samples", "worker time", "GPU h", "GiB", *names, "rate measured by"]]
    known = [row for row in rows if row["rate_from"]]
    for row in rows:
        costs_of, source = ["?"] * (3 + len(names)), "nothing yet"
        if row["units"] is None:
            lines.append([row["stage"], "?", "?", "?", *costs_of, "after the index"])
            continue
        left = row["units"] - row["done"]
        if row in known:
            costs_of, source = _costs([row], names), f"{row['rate_from']} on {row['device']}{_memory(row)}"
        if not left:
            costs_of, source = ["-"] * len(costs_of), "-"
        lines.append([row["stage"], str(row["done"]), str(left), str(row["samples_left"]), *costs_of, source])
    unknown = [row for row in rows if not row["rate_from"] and row["done"] != row["units"]]
    if known:
        lines.append(["known so far" if unknown else "all", "", "", "", *_costs(known, names), ""])
    return lines


def _memory(row: Mapping[str, Any]) -> str:
    taken = row["rate"]["gpu_bytes"]
    return f", {taken / 2**30:.1f} GiB" if taken else ""


def _costs(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Of rows with a rate, added up: worker time, GPU hours, GiB, and the time on each of the machines."""
    gpu_hours = [row["gpu_hours_left"] for row in rows if row["device"] != "cpu"]
    sizes = [row["bytes_left"] for row in rows]
    walls = [[row["wall_seconds"][name] for row in rows] for name in names]
    return [
        duration(sum(row["worker_seconds_left"] for row in rows)),
        f"{sum(gpu_hours):.1f}" if gpu_hours else "-",
        f"{sum(sizes) / 2**30:.2f}" if None not in sizes else "?",
        *(duration(sum(wall)) if None not in wall else "?" for wall in walls),
    ]


def wall_seconds(state: StageStatus, machines: Machines, rate: Rate | None) -> float | None:
    """Until what is left of a stage is done, by its own rate or else the one given; None where that is not known.

    What was measured on a CPU says nothing of a GPU, and the other way round.
    """
    if state.complete:
        return 0.0
    rate = state.rate or rate
    on_gpu = machines.gpus and _gpus_per_worker(state) > 0
    if state.units is None or rate is None or on_gpu != (rate.device != "cpu"):
        return None
    seconds, workers = state.seconds_left(rate), workers_on(state, machines)
    together = state.stage.launch is not None  # all workers do the one unit
    return round(rate.start + (sum(seconds) / workers if together else costs.makespan(seconds, workers)), 1)


def workers_on(state: StageStatus, machines: Machines) -> int:
    """How many workers of a stage the machines hold.

    Of a stage without GPUs one for each GPU of the cluster: machines with GPUs have CPUs for at least that.
    """
    cfg, stage = state.cfg, state.stage
    if cfg.engine.kind == "serial":
        return 1
    placed = cfg.engine.placement(stage.name)
    if machines.gpus:
        fit = int(machines.count / (_gpus_per_worker(state) or 1.0) + 1e-6)
    else:
        fit = machines.count // max(placed.cpus_per_worker, stage.threads(cfg))
    if stage.launch is not None:
        batch = cfg.finetune.batch_size
        return next(n for n in range(max(1, min(cfg.finetune.workers, fit)), 0, -1) if batch % n == 0)
    return max(1, min(fit, placed.workers or fit))


def _gpus_per_worker(state: StageStatus) -> float:
    asked = state.cfg.engine.placement(state.stage.name).gpus_per_worker
    share = 0.0 if not state.stage.gpu else 1.0 if asked is None else asked
    return math.ceil(share) if state.stage.launch else share  # processes of one training cannot share a GPU


def _rate(state: StageStatus, trial: Trial | None) -> tuple[Rate | None, str | None]:
    """The trial's rate if it holds for this stage, and else why not; neither where none is wanted."""
    name = state.stage.name
    if trial is None or state.complete or state.rate:
        return None, None
    if name not in trial.rates:
        return None, f"{trial.root} has done nothing of it"
    if different := costs.differences(name, trial.cfg, state.cfg):
        return None, f"the rate of {trial.root} is for other settings: {'; '.join(different)}"
    return trial.rates[name], None
