"""finetune: trains the U-Net on (latent, description) with the noise-prediction loss (Eq. 1)."""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlcp_dist.config import content
from vlcp_dist.data import checkpoints, storage, training_set
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.data.prefetch import Ahead
from vlcp_dist.data.training_set import TrainingSet
from vlcp_dist.engine import ray_train
from vlcp_dist.engine.executor import Event, Job, never
from vlcp_dist.errors import Stopped
from vlcp_dist.models.finetuned import save_pipeline
from vlcp_dist.models.training_setup import Recipe, Setup
from vlcp_dist.models.unet_trainer import Trainer
from vlcp_dist.ops.order import Batch, batches, steps_per_epoch
from vlcp_dist.stages import training_inputs
from vlcp_dist.stages.base import Run, Stage, check_diffusion, dtype
from vlcp_dist.stages.training_log import TrainingLog

AHEAD = 2  # batches that are read while one is computed


def units(run: Run) -> list[Unit]:
    return [Unit("unet", size=run.index.split_sizes["train"])]


class Worker:
    """One training process of possibly many; all of them do the same unit."""

    def __init__(self, run: Run):
        self._run = run
        self._scratch = tempfile.TemporaryDirectory(prefix="vlcp-finetune-")

    def read(self, unit: Unit) -> None:
        """It reads batch by batch, and there is one unit only."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """A diffusers folder with the averaged U-Net (`unet/`, and the frozen parts beside it), and `training.json`
        with loss and learning rate of every step.

        Raises:
            Stopped: it was asked to stop; a checkpoint holds everything up to this step.
            ValueError: too many samples are missing, the loss is not finite, or the checkpoint is of another U-Net.
        """
        run, cfg, scratch = self._run, self._run.cfg.finetune, Path(self._scratch.name)
        folder = run.folders["finetune"]
        trainer = make_trainer(run, scratch)
        inputs = make_inputs(run, trainer)
        per_epoch = steps_per_epoch(len(inputs), cfg.batch_size)
        steps = cfg.epochs * per_epoch
        saver = Saver(folder.path, scratch, trainer, keep=cfg.checkpoints_kept)
        saver.resume()
        log = TrainingLog(run, inputs, trainer, steps, scratch)
        with read_ahead(run, inputs, trainer) as ahead:
            for batch, latents, text in ahead:
                loss = trainer.step(latents, text, batch, stop=trainer.rank == 0 and folder.stop_requested())
                if trainer.diverged():
                    saver.close()  # the checkpoint to go back to may still be on its way
                    raise ValueError(_divergence(run, inputs, trainer, batch))
                log.step(loss)
                step = trainer.step_number
                if step % per_epoch == 0:
                    log.epoch(step // per_epoch)
                if step < steps and (trainer.stopping or step % cfg.checkpoint_every == 0 or step % per_epoch == 0):
                    saver.save()
                if step < steps and trainer.stopping:
                    saver.close()
                    log.close()
                    raise Stopped(f"stopped after step {step} of {steps}")
        saver.close()
        log.close()
        files: dict[str, bytes | Path] = {"training.json": log.history()}
        unet = trainer.finish()
        if trainer.rank == 0:
            save_pipeline(unet, run.diffusion_model, scratch / "model", revision=run.cfg.diffusion.revision)
            saved = (path for path in sorted((scratch / "model").rglob("*")) if path.is_file())
            files |= {str(path.relative_to(scratch / "model")): path for path in saved}
        failed = [Failure(**failure) for failure in inputs.facts["failed"]]
        obsolete = [*checkpoints.names(folder.path), training_set.SAMPLES, training_set.TEXT]
        return Outcome(files, len(inputs) + len(failed), failed, log.summary(), obsolete, wait_seconds=ahead.waited)


class Saver:
    """Writes checkpoints in the background: the training waits for the copy to memory, and for the one before."""

    def __init__(self, folder: storage.Location, scratch: Path, trainer: Trainer, *, keep: int):
        self._folder, self._scratch, self._trainer, self._keep = folder, scratch, trainer, keep
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def resume(self) -> None:
        """Go on from the newest checkpoint that counts, if there is one."""
        found = checkpoints.newest(self._folder)
        if found is not None:
            parts = {name.split(".", 1)[1]: storage.local(self._folder / name) for name in found["files"]}
            self._trainer.load(parts, found["step"], found)

    def save(self) -> None:
        """All processes must call it together; the first one writes."""
        parts = dict(self._trainer.state())
        self._wait()
        if self._trainer.rank == 0:
            step, facts = self._trainer.step_number, self._trainer.facts()
            self._pending = self._thread.submit(self._write, step, parts, facts)

    def close(self) -> None:
        """Wait for the last one.

        Raises:
            OSError: it could not be written.
        """
        self._wait()
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, step: int, parts: dict[str, dict[str, torch.Tensor]], facts: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        files = {name: self._scratch / name for name in parts}
        for name, file in files.items():
            save_file(parts.pop(name), file)
        checkpoints.save(self._folder, step, files, facts, keep=self._keep)


def make_trainer(run: Run, scratch: Path) -> Trainer:
    """The trainer that the configuration asks for; trackers write below `scratch` where they cannot below the root."""
    values, root = run.cfg.finetune.model_dump(), run.folders["finetune"].path
    recipe = Recipe(**{f.name: values[f.name] for f in fields(Recipe) if f.name in values}, seed=run.cfg.seed)
    setup = Setup(
        **{f.name: values[f.name] for f in fields(Setup) if f.name in values},
        precision=dtype(run.cfg.diffusion.dtype),  # type: ignore[arg-type]
        log_folder=str(root if isinstance(root, Path) else scratch),
    )
    return Trainer(run.diffusion_model, recipe, setup, revision=run.cfg.diffusion.revision)


def make_inputs(run: Run, trainer: Trainer) -> TrainingSet:
    """The cached inputs, computed by the main process if they are not there. All processes must call it together."""
    folder = run.folders["finetune"]
    with trainer.accelerator.main_process_first():
        if trainer.rank == 0 and not training_inputs.is_built(run):
            training_inputs.build(run, trainer.load_text_encoder, lambda n, of: folder.heartbeat("inputs", n, of))
    return training_inputs.load(run)


def read_ahead(run: Run, inputs: TrainingSet, trainer: Trainer) -> Ahead[tuple[Batch, torch.Tensor, np.ndarray]]:
    """The batches that are left, with latents and texts, the next ones drawn and read while one is computed."""
    cfg = run.cfg.finetune
    planned = batches(
        len(inputs), shape=inputs.shape, epochs=cfg.epochs, batch_size=cfg.batch_size, text_dropout=cfg.text_dropout,
        seed=run.cfg.seed, rank=trainer.rank, world=trainer.world, start=trainer.step_number,
    )  # fmt: skip

    def read(_: int) -> tuple[Batch, torch.Tensor, np.ndarray]:
        batch = next(planned)
        latents = torch.from_numpy(inputs.latents(batch.rows, batch.flip.numpy()))
        return batch, latents, inputs.text(batch.rows, batch.keep_text.numpy())

    steps = range(trainer.step_number, cfg.epochs * steps_per_epoch(len(inputs), cfg.batch_size))
    return Ahead(read, steps, threads=1, most=AHEAD)  # one thread, so that they are drawn in their order


def _divergence(run: Run, inputs: TrainingSet, trainer: Trainer, batch: Batch) -> str:
    places = [inputs.place(int(row)) for row in batch.rows[:8]]
    keys = [run.index.shard(shard)[position].key for shard, position in places]
    return (
        f"finetune: the loss is {trainer.losses[-1]} and the norm of the gradient {trainer.grad_norm} at step "
        f"{trainer.step_number}, samples {keys}; the checkpoint before it is kept. Lower finetune.learning_rate or "
        f"use diffusion.dtype=float32"
    )


def launch(
    run: Run, job: Job, unit: Unit, on_event: Callable[[Event], None], should_stop: Callable[[], bool] = never
) -> None:
    """Train on `finetune.workers` processes; see `ray_train.launch`."""
    cfg, engine = run.cfg.finetune, run.cfg.engine
    ray_train.launch(
        job, unit, on_event, should_stop,
        workers=cfg.workers, elastic=cfg.elastic, autoscaling=engine.autoscaling, max_failures=engine.max_retries,
    )  # fmt: skip


STAGE = Stage(
    "finetune",
    upstream=("index", "caption", "pretrain", "encode"),
    content=lambda cfg: [content(cfg.finetune), content(cfg.diffusion)],
    units=units,
    worker=Worker,
    threads=lambda cfg: cfg.finetune.num_threads,
    launch=launch,
    check=check_diffusion,
    version=2,
)
