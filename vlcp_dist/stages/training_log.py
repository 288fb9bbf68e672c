"""What the main process of a fine-tuning tells on the way: progress, trackers, its speed, and sample images."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcp_dist.data import storage
from vlcp_dist.data.training_set import TrainingSet
from vlcp_dist.models.finetuned import sample_images
from vlcp_dist.models.unet_trainer import Trainer
from vlcp_dist.ops.order import steps_per_epoch
from vlcp_dist.stages.base import Run, device_name

SPEED, SAMPLES, TRACKED = "speed.json", "samples", "tensorboard"
POINTS = 200  # of the speed, over the whole training


class TrainingLog:
    """Follows a training; in processes other than the main one it does nothing that is seen.

    Beside the files of the unit it leaves, in the stage's folder, what depends on the machine or is for looking at:
    `speed.json` (rows of step, samples per second, workers), `samples/` and the trackers' files.
    """

    def __init__(self, run: Run, inputs: TrainingSet, trainer: Trainer, steps: int, scratch: Path):
        self._run, self._inputs, self._trainer, self._steps = run, inputs, trainer, steps
        self._cfg = run.cfg.finetune
        self._folder = run.folders["finetune"]
        self._scratch = scratch
        self._main = trainer.rank == 0
        self._began = self._since = time.monotonic()
        self._resumed_at = self._since_step = trainer.step_number
        self._speed: list[tuple[int, float, int]] = []
        if self._main:
            self._speed = [row for row in _speed(self._folder.path) if row[0] <= self._resumed_at]
            trainer.accelerator.init_trackers(
                TRACKED,
                config=_flat(self._cfg.model_dump()),
                init_kwargs={"tensorboard": {"purge_step": self._resumed_at}} if self._resumed_at else {},
            )

    def step(self, loss: float) -> None:
        """After a step: the heartbeat, the trackers, and now and then a point of the speed."""
        if not self._main:
            return
        step = self._trainer.step_number
        seconds = (time.monotonic() - self._began) / (step - self._resumed_at)
        self._folder.heartbeat(
            "unet", step, self._steps, loss=loss, seconds_per_step=round(seconds, 4), device=device_name()
        )
        values = {
            "loss": loss,
            "learning_rate": self._trainer.learning_rate(step - 1),
            "grad_norm": self._trainer.grad_norm,
        }
        if step - self._since_step >= max(1, self._steps // POINTS) or step == self._steps:
            values["samples_per_second"] = self._measure(step)
        self._trainer.accelerator.log(values, step=step)

    def epoch(self, epoch: int) -> None:
        """At the end of an epoch: sample images. All processes must call it together."""
        paused = time.monotonic()
        if self._cfg.sample_images:
            before = self._trainer.put_average()
            if self._main:
                self._sample(epoch)
                self._trainer.put_back(before)
        if self._main:
            self._publish()
        self._since += time.monotonic() - paused

    def close(self) -> None:
        if self._main:
            self._publish()

    def history(self) -> bytes:
        """Loss and learning rate of every step, as JSON; the same whatever the machine and the interruptions."""
        losses = self._trainer.losses
        rates = [self._trainer.learning_rate(step) for step in range(len(losses))]
        per_epoch = steps_per_epoch(len(self._inputs), self._cfg.batch_size)
        record = {"loss": losses, "learning_rate": rates, "steps_per_epoch": per_epoch}
        return (json.dumps(record) + "\n").encode()

    def summary(self) -> dict[str, Any]:
        """What the unit's marker says of the training."""
        seconds = time.monotonic() - self._began
        done = self._trainer.step_number - self._resumed_at
        return {
            "steps": self._steps,
            "workers": self._trainer.world,
            "strategy": self._cfg.strategy,
            "text": self._inputs.facts["text"],
            "resumed_at_step": self._resumed_at,
            "samples_per_second": round(done * self._cfg.batch_size / seconds, 3),
        }

    def _measure(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self._since_step) * self._cfg.batch_size / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        self._speed.append((step, round(rate, 3), self._trainer.world))
        return rate

    def _sample(self, epoch: int) -> None:
        rows = self._sample_rows()
        folder, synthesis = self._folder.path / SAMPLES, self._run.cfg.synthesize
        text = self._inputs.text(np.append(rows, rows[:1]), np.arange(len(rows) + 1) < len(rows))
        condition = self._trainer.condition(text)
        images = sample_images(
            self._trainer.unet, self._trainer.scheduler, self._run.diffusion_model, condition[:-1], condition[-1:],
            shape=self._inputs.shape, revision=self._run.cfg.diffusion.revision, seed=self._run.cfg.seed,
            num_inference_steps=synthesis.num_inference_steps, guidance_scale=synthesis.guidance_scale,
        )  # fmt: skip
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            storage.publish(folder / f"epoch={epoch:03d}" / f"{i}.png", buffer.getvalue())
        if epoch == 1 or not (folder / "prompts.json").exists():
            storage.publish(folder / "prompts.json", json.dumps(self._prompts(rows), ensure_ascii=False).encode())

    def _sample_rows(self) -> np.ndarray:
        """Rows at even distances: the set is sorted by class."""
        count = min(self._cfg.sample_images, len(self._inputs))
        return np.arange(count) * len(self._inputs) // count

    def _prompts(self, rows: np.ndarray) -> list[dict[str, str]]:
        prompts = []
        for shard, position in map(self._inputs.place, rows.tolist()):
            row = self._run.index.shard(shard)[position]
            prompts.append({"key": row.key, "description": self._run.descriptions([shard])[row.key]})
        return prompts

    def _publish(self) -> None:
        storage.publish(self._folder.path / SPEED, json.dumps(self._speed).encode())
        if not isinstance(self._folder.path, Path):  # trackers write to local files
            for file in (self._scratch / TRACKED).rglob("*"):
                if file.is_file():
                    name = file.relative_to(self._scratch).as_posix()
                    storage.publish(self._folder.path / name, file.read_bytes())


def _speed(folder: storage.Location) -> list[tuple[int, float, int]]:
    (found,) = storage.fetch([folder / SPEED], missing=b"[]")
    return [(step, rate, workers) for step, rate, workers in json.loads(found)]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Trackers take numbers and text only."""
    return {name: v if isinstance(v, int | float | str) else json.dumps(v) for name, v in values.items()}
