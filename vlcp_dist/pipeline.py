"""The stages in their order: what is planned, what is done, and running what is left."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcp_dist.config import Config
from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Marker, Unit
from vlcp_dist.engine.executor import Event
from vlcp_dist.engine.progress import Progress
from vlcp_dist.engine.serial import SerialEngine
from vlcp_dist.errors import InputError, StageFailed
from vlcp_dist.stages import (
    base,
    caption,
    encode,
    evaluate,
    finetune,
    index,
    pretrain,
    prototypes,
    synthesize,
)
from vlcp_dist.stages.index import check_sizes


def stages(cfg: Config) -> list[base.Stage]:
    """The stages of a run in their order. `pretrain` is one of them only where no pretrained model is given."""
    return [
        index.STAGE,
        caption.STAGE,
        *([pretrain.STAGE] if cfg.pretrain else []),
        encode.STAGE,
        finetune.STAGE,
        prototypes.STAGE,
        synthesize.STAGE,
        evaluate.BASELINES,
        evaluate.EVALUATE,
    ]


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is. `units` is None as long as the index it follows from is not there."""

    stage: base.Stage
    folder: str
    units: list[Unit] | None
    markers: dict[str, Marker]

    @property
    def todo(self) -> list[Unit]:
        return [unit for unit in self.units or [] if unit.name not in self.markers]

    @property
    def seconds_per_sample(self) -> float | None:
        """The rate of one worker, measured by the units that are done."""
        samples = sum(marker["n_in"] for marker in self.markers.values())
        return sum(marker["seconds"] for marker in self.markers.values()) / samples if samples else None

    def summary(self) -> dict[str, Any]:
        rate = self.seconds_per_sample
        left = sum(unit.size for unit in self.todo)
        totals = {
            name: sum(marker[name] for marker in self.markers.values())
            for name in ("n_in", "n_ok", "n_failed", "seconds")
        }
        return {
            "stage": self.stage.name,
            "folder": self.folder,
            "units": None if self.units is None else len(self.units),
            "done": len(self.markers),
            "samples": totals["n_in"],
            "samples_ok": totals["n_ok"],
            "samples_failed": totals["n_failed"],
            "bytes": sum(f["bytes"] for marker in self.markers.values() for f in marker["files"].values()),
            "worker_seconds": round(totals["seconds"], 1),
            "samples_left": None if self.units is None else left,
            "worker_seconds_left": None if rate is None or self.units is None else round(left * rate, 1),
        }


def status(cfg: Config) -> list[StageStatus]:
    """Every stage's state, from its markers and files alone."""
    plan = stages(cfg)
    run = base.make_run(cfg, plan)
    return [_stage_status(run, stage) for stage in plan]


def failures(statuses: list[StageStatus]) -> list[dict[str, str]]:
    """Samples that were left out, each once, with the first stage that failed on it."""
    first: dict[str, dict[str, str]] = {}
    for item in statuses:
        for marker in item.markers.values():
            for failure in marker["failed"]:
                first.setdefault(failure["key"], {"stage": item.stage.name, **failure})
    return list(first.values())


def run(cfg: Config, progress: Progress) -> list[StageStatus]:
    """Do all that is not done yet.

    Where more samples failed before than `max_failed_samples`, the units that hold them are done again: whoever
    runs the same command again has mended something. What had been made from such a unit is set aside if it changed.

    Raises:
        StageFailed: a unit failed for good, or more samples failed than `max_failed_samples`; what is done stays done.
    """
    plan = stages(cfg)
    context = base.make_run(cfg, plan)
    try:
        Path(cfg.root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"root={cfg.root} cannot be written to: {error.strerror}; choose another") from error
    states: list[StageStatus] = []
    with storage.exclusive(Path(cfg.root) / "lock"), Engines(cfg) as engines:
        retry_failed = len(failures([_stage_status(context, stage) for stage in plan])) > cfg.max_failed_samples
        for stage in plan:
            _run_stage(context, plan, stage, engines, progress, retry_failed=retry_failed)
            if stage.name == "index":
                check_sizes(cfg, context.index)
            states.append(_stage_status(context, stage))
            _check_failures(cfg, states)
    return states


def _run_stage(
    context: base.Run,
    plan: list[base.Stage],
    stage: base.Stage,
    engines: "Engines",
    progress: Progress,
    *,
    retry_failed: bool,
) -> None:
    """Do what is left of a stage, and what holds failed samples again if that is asked for."""
    state = _stage_status(context, stage)
    folder = context.folders[stage.name]
    again = {name: m for name, m in state.markers.items() if retry_failed and m["n_failed"]}
    keep = {name: m for name, m in state.markers.items() if name not in again}
    todo = [unit for unit in state.units or [] if unit.name not in keep]
    progress.start(stage.name, state.units or [], keep, folder)
    if not todo:
        return
    folder.open()
    failed: list[Event] = []

    def on_event(event: Event) -> None:
        progress.update(event)
        before = again.get(event.unit.name)
        if before and event.marker and event.marker["files"] != before["files"]:
            _supersede_downstream(context, plan, stage)
        if event.kind == "failed":
            failed.append(event)
            _log_failure(folder.failures, event)

    try:
        engines.run(context, stage, todo, on_event)
    finally:
        progress.finish()
    if failed:
        raise StageFailed(
            f"{stage.name}: {len(failed)} of {len(todo)} units failed; the first, {failed[0].unit.name}: "
            f"{failed[0].message}\nAll are in {folder.failures}. What is done stays done: "
            f"mend the cause and run the same command again."
        )
    if left := _stage_status(context, stage).todo:
        raise StageFailed(
            f"{stage.name}: {len(left)} units were reported done, but {folder.path} does not hold them; the first is "
            f"{left[0].name}. root={context.cfg.root} must be storage that every node shares."
        )


def _supersede_downstream(context: base.Run, plan: list[base.Stage], changed: base.Stage) -> None:
    """Set aside what was made from a stage whose files have changed. At once: a later kill must not leave it."""
    stale = {changed.name}
    for stage in plan:
        if stale & set(stage.upstream):
            stale.add(stage.name)
            if context.folders[stage.name].path.exists():
                context.folders[stage.name].supersede()


class Engines:
    """The engine of a run, started when the first unit needs it and stopped at the end."""

    def __init__(self, cfg: Config):
        self._cfg = cfg
        self._engine: Any = None
        self._started_ray = False

    def __enter__(self) -> "Engines":
        return self

    def run(self, context: base.Run, stage: base.Stage, units: list[Unit], on_event: Callable[[Event], None]) -> None:
        if self._engine is None:
            self._engine = self._start()
        job = stage.job(context)
        if stage.launch is not None and self._cfg.engine.kind == "ray":
            self._engine.close()  # it needs the machines that the actors hold
            for unit in units:
                stage.launch(context, job, unit, on_event)
        else:
            self._engine.run(job, units, on_event)

    def _start(self) -> Any:
        engine = self._cfg.engine
        if engine.kind == "serial":
            return SerialEngine(max_retries=engine.max_retries)
        import ray

        from vlcp_dist.engine.pool import RayEngine

        if not ray.is_initialized():
            # Without an address this machine alone is meant, not a cluster that happens to run on it.
            address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
            ray.init(address=address, logging_level=logging.WARNING)
            self._started_ray = True
        return RayEngine(
            workers=engine.workers,
            cpus_per_worker=engine.cpus_per_worker,
            gpus_per_worker=engine.gpus_per_worker,
            max_retries=engine.max_retries,
            unit_timeout=engine.unit_timeout,
            start_timeout=engine.start_timeout,
        )

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._started_ray:
            import ray

            ray.shutdown()


def _stage_status(context: base.Run, stage: base.Stage) -> StageStatus:
    folder = context.folders[stage.name]
    known = stage.name == "index" or context.folders["index"].marker("index") is not None
    units = stage.units(context) if known else None
    return StageStatus(stage, str(folder.path), units, folder.done(units or []))


def _check_failures(cfg: Config, states: list[StageStatus]) -> None:
    failed = failures(states)
    if len(failed) > cfg.max_failed_samples:
        listed = "\n".join(f"  {f['key']} ({f['source']}): {f['reason']}" for f in failed[:10])
        more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise StageFailed(
            f"{len(failed)} samples failed, more than max_failed_samples={cfg.max_failed_samples}:\n{listed}{more}\n"
            f"Mend the files and run the same command again, or raise max_failed_samples; what is done stays done."
        )


def _log_failure(path: Path, event: Event) -> None:
    with path.open("a") as file:
        record = {"unit": event.unit.name, "message": event.message, "traceback": event.traceback}
        file.write(json.dumps(record) + "\n")
