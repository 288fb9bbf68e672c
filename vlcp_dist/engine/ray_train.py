"""Runs one unit on many processes at once, as a Ray Train TorchTrainer: all do the same unit, rank 0 commits it."""

import json
import math
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.executor import Event, Executor, Job, never
from vlcp_dist.errors import InputError, Stopped

FINAL_ERROR = "error.json"  # of the input: another attempt would find the same
GROW_EVERY = 1800.0  # seconds between looks for workers that could be had again: taking them in costs a restart


def launch(
    job: Job,
    unit: Unit,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool] = never,
    *,
    workers: int,
    elastic: bool,
    autoscaling: bool,
    max_failures: int,
) -> None:
    """Do the unit on `workers` Ray Train workers, with a GPU each where the cluster has them.

    When a worker is lost all start again, at most `max_failures` times; with `elastic` on as many as there is room
    for. With `autoscaling` nodes may yet come, and are waited for. `should_stop` is asked once a second: it may
    raise. That a stop was asked for is told to the workers by a file.

    Raises:
        InputError: the nodes cannot hold so many workers, or with `elastic` none.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # It tells workers to checkpoint before a node goes; ours do so all along.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    least = 0 if autoscaling else 1 if elastic else workers
    asked = _asked(job, ray.nodes(), least=least, workers=workers)
    needs = {"CPU": asked["num_cpus"], "GPU": asked["num_gpus"], **asked.get("resources", {})}
    if "memory" in asked:
        needs["memory"] = asked["memory"]
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "unit": unit},
        torch_config=TorchConfig(backend="nccl" if asked["num_gpus"] else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(1, workers) if elastic else workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=GROW_EVERY,  # type: ignore[call-arg]
            use_gpu=asked["num_gpus"] > 0,
            resources_per_worker=needs,
            label_selector=asked.get("label_selector"),
        ),
        # A worker that is lost costs the steps since the last checkpoint.
        run_config=RunConfig(
            name="ray_train",
            storage_path=_path_in_its_filesystem(job.folder.path),
            storage_filesystem=_filesystem(job.folder.path),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    final_error = job.folder.path / FINAL_ERROR
    storage.remove(final_error)
    fitted: Future[Any] = Future()

    def fit() -> None:
        try:
            fitted.set_result(trainer.fit())
        except BaseException as error:
            fitted.set_exception(error)

    # In a thread, because in the main one it would put its own handler of Ctrl-C in place of the run's. Nobody waits
    # for that thread: who is to end at once ends, and Ray ends the workers then.
    threading.Thread(target=fit, daemon=True).start()
    while not wait([fitted], timeout=1.0).done:
        should_stop()
    error = fitted.exception()
    if final_error.exists():
        record = json.loads(final_error.read_bytes())
        on_event(Event("failed", unit, message=record["message"], traceback=record["traceback"]))
    elif isinstance(error, TrainingFailedError):
        causes = getattr(error, "worker_failures", {}).values()
        cause = next(iter(causes), error)
        message = f"{type(cause).__name__}: {getattr(cause, 'cause', cause)}"
        on_event(Event("failed", unit, message=message, traceback=str(error)))
    elif error is not None:
        raise error
    elif (marker := job.folder.marker(unit.name)) is None and job.folder.stop_requested():
        on_event(Event("stopped", unit))
    else:
        on_event(Event("done", unit, marker=marker))


def _asked(job: Job, nodes: list[dict[str, Any]], *, least: int, workers: int) -> dict[str, Any]:
    """What one worker asks of Ray; an error if not even the least number of them fits."""
    from vlcp_dist.engine.actors import actor_options, capacity, describe, describe_cluster

    asked = actor_options(job, nodes)
    asked["num_gpus"] = math.ceil(asked["num_gpus"])  # processes of one training cannot share a GPU
    if capacity(nodes, asked) < least:
        raise InputError(
            f"{job.stage}.workers={workers}: each needs {describe(asked)} on one node; the cluster has "
            f"{describe_cluster(nodes, asked)}, which hold {capacity(nodes, asked)}"
        )
    return asked


def _train_loop(config: dict[str, Any]) -> None:
    import ray.train
    import torch

    job, unit = config["job"], config["unit"]
    final_error = job.folder.path / FINAL_ERROR
    if final_error.exists():  # Ray Train tries everything again; this would end the same way
        return
    try:
        if ray.train.get_context().get_world_rank() == 0:
            Executor().process(job, unit)
        else:
            torch.set_num_threads(job.threads)
            job.make_worker(job.argument).process(unit, None)
    except Stopped:
        pass  # an exception would be a failure
    except ValueError as error:
        record = {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        storage.publish(final_error, json.dumps(record).encode())
        raise


def _filesystem(folder: storage.Location) -> Any:
    """The file system that Ray Train is to keep its own state in, by the same library as everything else."""
    if isinstance(folder, Path):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(folder.fs))


def _path_in_its_filesystem(folder: storage.Location) -> str:
    return str(folder) if isinstance(folder, Path) else folder.path
