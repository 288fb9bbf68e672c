"""The stages in their order: what is done, and running what is left."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vlcp_dist.costs import pieces
from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.executor import Event
from vlcp_dist.engine.progress import Progress
from vlcp_dist.engine.serial import SerialEngine
from vlcp_dist.errors import ConfigError, InputError, StageFailed, Stopped
from vlcp_dist.interrupt import Interrupt, Terminated
from vlcp_dist.schema import Config
from vlcp_dist.stages import (
    base,
    caption,
    encode,
    evaluate,
    finetune,
    index,
    pack,
    pretrain,
    prototypes,
    soft_labels,
    synthesize,
    teachers,
)
from vlcp_dist.stages.index import check_sizes
from vlcp_dist.status import StageStatus, digests, failures, stage_status, stale_stages

FAILURES_EVERY = 5.0  # seconds between writes of failures.jsonl


def stages(cfg: Config) -> list[base.Stage]:
    """The stages of a run in their order.

    `pretrain` is one of them only where no pretrained model is given, `teachers` only in the soft-label protocol or
    where soft labels are to be stored.
    """
    soft, labelled = cfg.evaluate.protocol == "soft", cfg.synthesize.soft_labels is not None
    trainings = [evaluate.BASELINES, evaluate.EVALUATE]
    if not soft:  # no teacher has a say in them, even where there is one
        trainings = [replace(s, upstream=tuple(name for name in s.upstream if name != "teachers")) for s in trainings]
    return [
        index.STAGE,
        caption.STAGE,
        *([pretrain.STAGE] if cfg.pretrain else []),
        encode.STAGE,
        pack.STAGE,
        finetune.STAGE,
        prototypes.STAGE,
        synthesize.STAGE,
        *([teachers.STAGE] if soft or labelled else []),
        *([soft_labels.STAGE] if labelled else []),
        *trainings,
    ]


def status(cfg: Config) -> list[StageStatus]:
    """Every stage's state, from its markers and files alone. What the next run will set aside does not count."""
    plan = stages(cfg)
    run = base.make_run(cfg, plan)
    states = [stage_status(run, stage) for stage in plan]
    stale = stale_stages(states)
    return [state.without_markers(stale[state.stage.name]) if state.stage.name in stale else state for state in states]


def run(
    cfg: Config,
    progress: Progress,
    *,
    only: Collection[str] = (),
    max_units: int | None = None,
    retry_failed: bool = False,
    interrupt: Interrupt | None = None,
) -> list[StageStatus]:
    """Do all that is not done yet, or of it only some stages, or at most `max_units` units of each.

    Units that hold failed samples are done again with `retry_failed`, and also where more samples failed before than
    `max_failed_samples`: whoever runs the same command again has mended something.

    Raises:
        StageFailed: a unit failed for good, or more samples failed than `max_failed_samples`; what is done stays done.
        Stopped: `interrupt` asked for it; what was in flight is finished.
        InputError: another run works on this root, or a stage that is needed first is not complete.
    """
    plan = stages(cfg)
    _check_names(plan, only)
    _check_places(cfg)
    context = base.make_run(cfg, plan)
    with storage.exclusive(storage.locate(cfg.root) / "lock") as lease, Engines(cfg) as engines:

        def should_stop() -> bool:
            if lease.lost():
                raise StageFailed(
                    f"the lease on {cfg.root} could not be renewed, so another run may have taken it over; this one "
                    f"ends. What is done stays done: run the same command again."
                )
            return interrupt is not None and interrupt.requested()

        states = {stage.name: stage_status(context, stage) for stage in plan}
        again = retry_failed or len(failures(states.values())) > cfg.max_failed_samples
        outcome = "failed"
        try:
            _check_stages(cfg, [stage for stage in plan if not only or stage.name in only], states)
            for stage in plan:
                if (only and stage.name not in only) or _waits(stage, states, only, progress):
                    continue
                _set_aside_stale(context, plan, states, stage)
                states[stage.name] = _run_stage(
                    context, stage, engines, progress, states,
                    only=only, again=again, max_units=max_units, should_stop=should_stop, interrupt=interrupt,
                )  # fmt: skip
                if should_stop():
                    raise Stopped(stage.name)
                if stage.name == "index":
                    check_sizes(cfg, context.index)
                    evaluate.check(cfg, context.index)
                    states = {stage.name: stage_status(context, stage) for stage in plan}
                _check_failures(cfg, [states[before.name] for before in plan[: plan.index(stage) + 1]])
            outcome = "done" if all(state.complete for state in states.values()) else "incomplete"
        except (Stopped, KeyboardInterrupt, Terminated):
            outcome = "interrupted"
            raise
        finally:
            progress.close(outcome)
    return list(states.values())


def _waits(stage: base.Stage, states: dict[str, StageStatus], only: Collection[str], progress: Progress) -> bool:
    """Whether a stage that this one reads from is not complete, as after `max_units`."""
    missing = [name for name in stage.upstream if name in states and not states[name].complete]
    if missing and only:
        left = [f"{name} ({_left(states[name])})" for name in missing]
        raise InputError(
            f"{stage.name} needs {' and '.join(left)} to be complete first: run without --only, "
            f"or with {' '.join(f'--only {name}' for name in missing)}"
        )
    if missing:
        progress.say(f"{stage.name}: waits for {', '.join(missing)}")
    return bool(missing)


def _left(state: StageStatus) -> str:
    """What of a stage is not done yet, such as an IPC that was asked for since."""
    if state.units is None:
        return "not begun"
    return f"{len(state.todo)} of {len(state.units)} units are not done, such as {state.todo[0].name}"


def _check_places(cfg: Config) -> None:
    """Inside a Ray job, refuse places in the uploaded copy: they are on one node alone, and elsewhere next time."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    places = {"root": cfg.root, "data.path": cfg.data.path, "caption.model": cfg.caption.model}
    places["synthesize.sentence_model"] = cfg.synthesize.sentence_model
    checkpoints = cfg.evaluate.teacher.checkpoints
    places |= {f"evaluate.teacher.checkpoints.{net}": place for net, place in checkpoints.items()}
    for name, place in {**places, "diffusion.model": cfg.diffusion.model}.items():
        local = place is not None and "://" not in place and (name == "root" or Path(place).exists())
        if local and Path(place or "").absolute().is_relative_to(Path.cwd()):
            raise ConfigError(
                f"{name}={place} would lie in the uploaded copy of this job; "
                f"give an absolute path that all nodes share, or a URL such as s3://bucket/folder"
            )


def _check_stages(cfg: Config, plan: list[base.Stage], states: dict[str, StageStatus]) -> None:
    """Ask the stages that have work left what they lack, before the first of them costs anything."""
    for stage in plan:
        if stage.check is not None and not states[stage.name].complete:
            stage.check(cfg)


def inputs(cfg: Config) -> dict[str, storage.Location]:
    """What every node reads and no stage writes, by its key: the data, and the models that are folders or URLs."""
    places = {"data.path": cfg.data.path, "caption.model": cfg.caption.model, "diffusion.model": cfg.diffusion.model}
    located = {name: storage.locate(place) for name, place in places.items() if place is not None}
    return {name: place for name, place in located.items() if place.exists()}  # the id of a model on the hub is neither


def _check_names(plan: list[base.Stage], only: Collection[str]) -> None:
    """Refuse the name of a stage that this run does not have."""
    names = [stage.name for stage in plan]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--only {unknown[0]}: no such stage in this run; it has {', '.join(names)}")


def _run_stage(
    context: base.Run,
    stage: base.Stage,
    engines: "Engines",
    progress: Progress,
    states: dict[str, StageStatus],
    *,
    only: Collection[str],
    again: bool,
    max_units: int | None,
    should_stop: Callable[[], bool],
    interrupt: Interrupt | None,
) -> StageStatus:
    """Do what is left of a stage, and what holds failed samples once more if that is asked for."""
    state = stage_status(context, stage)
    folder = context.folders[stage.name]
    redo = {
        name: marker for name, marker in state.markers.items() if again and stage.reads_images and marker["n_failed"]
    }
    keep = {name: marker for name, marker in state.markers.items() if name not in redo}
    todo = [
        replace(unit, replaces=redo[unit.name]["finished"]) if unit.name in redo else unit
        for unit in state.units or []
        if unit.name not in keep
    ]
    # The longest first, so that none begins when the others have finished; a trial takes them as they come.
    todo = (
        sorted(todo, key=partial(pieces, stage.name, context.cfg), reverse=True)
        if max_units is None
        else todo[:max_units]
    )
    progress.start(stage.name, state.units or [], keep, folder)
    if not todo:
        return state
    folder.open(inputs={name: digests(states[name]) for name in stage.upstream if name in states})
    failed: list[dict[str, str]] = []
    written = time.monotonic()

    def on_event(event: Event) -> None:
        nonlocal written
        progress.update(event)
        if event.kind == "failed":
            failed.append({"unit": event.unit.name, "message": event.message, "traceback": event.traceback})
            if time.monotonic() - written > FAILURES_EVERY:
                folder.write_failures(failed)
                written = time.monotonic()

    ahead = [
        name for name, state in states.items() if not state.complete and state.stage.gpu and (not only or name in only)
    ]
    try:
        engines.start(ahead, progress.say)
        with interrupt.notify(folder.request_stop) if interrupt else nullcontext():
            engines.run(context, stage, todo, on_event, should_stop)
    finally:
        progress.finish()
        if failed:
            folder.write_failures(failed)
    state = stage_status(context, stage)
    if failed:
        raise StageFailed(
            f"{stage.name}: {len(failed)} of {len(todo)} units failed; the first, {failed[0]['unit']}: "
            f"{failed[0]['message']}\nAll are in {folder.path / 'failures.jsonl'}. What is done stays done: "
            f"mend the cause and run the same command again."
        )
    if not should_stop() and (left := [unit.name for unit in todo if unit.name not in state.markers]):
        raise StageFailed(
            f"{stage.name}: {len(left)} units were reported done, but {folder.path} does not hold them; the first is "
            f"{left[0]}. root={context.cfg.root} must be storage that every node shares."
        )
    return state


def _set_aside_stale(
    context: base.Run, plan: list[base.Stage], states: dict[str, StageStatus], due: base.Stage
) -> None:
    """If the stage that is due was made from units done again with another outcome, set it and what follows aside.

    Not before it is due: what it is made from may yet be mended. The last stage first: a kill on the way leaves the
    first one to be found stale by the next run.
    """
    stale = stale_stages(states.values())
    if due.name not in stale:
        return
    for stage in reversed(plan):
        if stage.name in stale:
            context.folders[stage.name].supersede()
            states[stage.name] = stage_status(context, stage)


def connect(address: str | None) -> bool:
    """Join the Ray cluster at `address`, else at `RAY_ADDRESS`, else start Ray here; whether it was not joined before.

    Raises:
        InputError: there is no such cluster.
    """
    import ray

    if ray.is_initialized():
        return False
    # Without an address this machine alone is meant, not a cluster that happens to run on it.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    before = signal.getsignal(signal.SIGTERM)
    host, _, port = address.rpartition(":")
    try:
        if "://" not in address and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=30).close()  # Ray itself would try for minutes
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise InputError(
            f"no Ray cluster at {address} (engine.address, or RAY_ADDRESS): {error}; "
            f"start one (cluster/README.md), or leave both out to use this machine alone"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in place, which ends with another exit code
    return True


class Engines:
    """The engine of a run, started when the first unit needs it and stopped at the end."""

    def __init__(self, cfg: Config):
        self._cfg = cfg
        self._engine: Any = None
        self._started_ray = False

    def __enter__(self) -> "Engines":
        return self

    def start(self, ahead: Collection[str], say: Callable[[str], None]) -> None:
        """Start it if it is not yet, for a run that has the stages `ahead` to do on GPUs.

        Raises:
            InputError: the nodes of the cluster cannot do them; nothing was begun.
        """
        if self._engine is None:
            self._engine = self._start(ahead, say)

    def run(
        self,
        context: base.Run,
        stage: base.Stage,
        units: list[Unit],
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        job = stage.job(context)
        if stage.launch is not None and self._cfg.engine.kind == "ray":
            self._engine.close()  # it needs the machines that the actors hold
            for unit in units:
                stage.launch(context, job, unit, on_event, should_stop)
        else:
            self._engine.run(job, units, on_event, should_stop)

    def _start(self, ahead: Collection[str], say: Callable[[str], None]) -> Any:
        engine = self._cfg.engine
        if engine.kind == "serial":
            return SerialEngine(max_retries=engine.max_retries)
        from vlcp_dist.engine import nodes
        from vlcp_dist.engine.pool import RayEngine

        self._started_ray = connect(engine.address)
        asked = {stage: engine.placement(stage).gpus_per_worker for stage in ahead}
        nodes.check_gpus(asked, autoscaling=engine.autoscaling, say=say)
        nodes.check_nodes(storage.locate(self._cfg.root), inputs(self._cfg), say)
        return RayEngine(max_retries=engine.max_retries, start_timeout=engine.start_timeout)

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._started_ray:
            import ray

            ray.shutdown()


def _check_failures(cfg: Config, states: list[StageStatus]) -> None:
    failed = failures(states)
    if len(failed) > cfg.max_failed_samples:
        listed = "\n".join(f"  {f['key']} ({f['source']}): {f['reason']}" for f in failed[:10])
        more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise StageFailed(
            f"{len(failed)} samples failed, more than max_failed_samples={cfg.max_failed_samples}:\n{listed}{more}\n"
            f"Mend the files and run the same command again, or raise max_failed_samples; what is done stays done."
        )
