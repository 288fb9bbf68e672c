"""Whether the run that is planned fits: workers on the nodes, and bytes on the storage."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlcp_dist import pipeline
from vlcp_dist.data import storage
from vlcp_dist.doctor.check import Check
from vlcp_dist.schema import Config
from vlcp_dist.stages import base

ROOM = 2**30  # bytes that must be free besides what is known to be written


def workers(cfg: Config) -> Iterator[Check]:
    """Whether the nodes can hold a worker of every stage that has something left to do."""
    import ray

    from vlcp_dist.engine.actors import actor_options, capacity, describe, describe_cluster

    alive, context = ray.nodes(), base.make_run(cfg, pipeline.stages(cfg))
    held: list[str] = []
    for state in pipeline.status(cfg):
        if state.complete:
            continue
        name = state.stage.name
        options, needed = actor_options(state.stage.job(context), alive), 1
        if name == "finetune":
            options["num_gpus"], needed = math.ceil(options["num_gpus"]), cfg.finetune.workers
        fit = capacity(alive, options)
        held.append(f"{fit} {name}")
        if fit < needed and not cfg.engine.autoscaling:
            yield Check(
                "workers", False,
                f"{name} needs {needed} with {describe(options)} each; "
                f"the cluster has {describe_cluster(alive, options)}, which hold {fit}",
                "ask for less (engine.*, finetune.workers), or start nodes",
            )  # fmt: skip
            return
    yield Check("workers", True, f"room for {', '.join(held)}" if held else "nothing left to do")


def room(cfg: Config) -> Iterator[Check]:
    """Whether what is left to write has room, as far as units done so far tell its size."""
    states = [state for state in pipeline.status(cfg) if not state.complete]
    known = {state.stage.name: left for state in states if (left := state.estimate()["bytes_left"]) is not None}
    needed = sum(known.values())
    text = f"{needed / 2**30:.1f} GiB left to write by {len(known)} of {len(states)} stages whose size is known"
    if len(known) < len(states):
        text += " (`vlcp run --max-units 2` measures the others)"
    root = storage.locate(cfg.root)
    if not isinstance(root, Path):
        yield Check("room", True, f"{text}; {cfg.root} is an object store")
        return
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    ok = free > needed + ROOM
    remedy = "" if ok else "make room, or choose another root"
    yield Check("room", ok, f"{text}; {free / 2**30:.1f} GiB free at root={cfg.root}", remedy)
