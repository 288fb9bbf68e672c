"""finetune: trains the U-Net on (latent, description) with the noise-prediction loss (Eq. 1)."""

import json
import math
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlcp_dist.config import Finetune, content
from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.engine.executor import Event, Executor, Job, never
from vlcp_dist.errors import InputError, Stopped
from vlcp_dist.stages.base import Run, Stage, check_diffusion, device_name, dtype

CHECKPOINT = "checkpoint.safetensors"
FINAL_ERROR = "error.json"  # of the input: another attempt would find the same
TIMESTEPS = 1000  # of Stable Diffusion's noise schedule


def units(run: Run) -> list[Unit]:
    return [Unit("unet", size=run.index.split_sizes["train"])]


@dataclass(frozen=True)
class Batch:
    """This process's part of a global batch; `weight` makes the mean over processes the mean over the global batch."""

    rows: list[int]
    noise: torch.Tensor
    timesteps: torch.Tensor
    keep_text: torch.Tensor
    weight: float


def batches(
    n: int, *, shape: tuple[int, ...], epochs: int, batch_size: int, text_dropout: float, seed: int,
    rank: int = 0, world: int = 1, start: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Global batches from step `start` on, each process taking every `world`-th sample of them.

    Every sample comes once per epoch, for any number of processes. Order, noise (fp32 (b, *shape)), timesteps and
    dropped texts are functions of (seed, step) alone, so a resumed run and a run on more workers see the same ones.
    """
    per_epoch = math.ceil(n / batch_size)
    order = torch.empty(0)
    for step in range(start, epochs * per_epoch):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
            order = torch.randperm(n, generator=_generator(seed, 0, epoch))
        rows = order[position * batch_size : (position + 1) * batch_size]
        generator = _generator(seed, 1, step)
        noise = torch.randn(len(rows), *shape, generator=generator)
        timesteps = torch.randint(0, TIMESTEPS, (len(rows),), generator=generator)
        keep = torch.rand(len(rows), generator=generator) >= text_dropout
        mine = slice(rank, None, world)
        weight = len(rows[mine]) * world / len(rows)
        if not len(rows[mine]):  # a last batch smaller than the world: take part with weight 0
            mine = slice(0, 1)
        yield Batch(rows[mine].tolist(), noise[mine], timesteps[mine], keep[mine], weight)


class Worker:
    """One training process of possibly many; all of them do the same unit."""

    def __init__(self, run: Run):
        self._run = run
        self._scratch = tempfile.TemporaryDirectory(prefix="vlcp-finetune-")

    def read(self, unit: Unit) -> None:
        """It reads batch by batch, and there is one unit only."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """`unet/` (diffusers layout, the EMA weights) and `training.json` (loss and learning rate per step).

        Raises:
            Stopped: it was asked to stop; a checkpoint holds everything up to this step.
        """
        run, cfg = self._run, self._run.cfg.finetune
        shards = list(run.index.shards)
        latents, descriptions = run.latents(shards), run.descriptions(shards)
        rows, failed = [], []
        for row in run.index.split("train"):
            if row.key in latents and row.key in descriptions:
                rows.append(row)
            else:
                failed.append(Failure(row.key, "no latent or no description", row.ref))
        trainer = Trainer(
            run.diffusion_model,
            cfg,
            revision=run.cfg.diffusion.revision,
            precision=dtype(run.cfg.diffusion.dtype),
        )
        folder = run.folders["finetune"]
        checkpoint = folder.path / CHECKPOINT
        trainer.resume(checkpoint)
        resumed_at = trainer.step_number
        shape = latents[rows[0].key].shape
        steps = cfg.epochs * math.ceil(len(rows) / cfg.batch_size)
        began = time.monotonic()
        for batch in batches(
            len(rows), shape=shape, epochs=cfg.epochs, batch_size=cfg.batch_size, text_dropout=cfg.text_dropout,
            seed=run.cfg.seed, rank=trainer.rank, world=trainer.world, start=trainer.step_number,
        ):  # fmt: skip
            z = torch.from_numpy(np.stack([latents[rows[i].key] for i in batch.rows])).float()
            texts = [
                descriptions[rows[i].key] if keep else "" for i, keep in zip(batch.rows, batch.keep_text, strict=True)
            ]
            loss = trainer.step(z, texts, batch, stop=trainer.rank == 0 and folder.stop_requested())
            if not math.isfinite(loss):
                keys = [rows[i].key for i in batch.rows]
                raise ValueError(
                    f"finetune: the loss is {loss} at step {trainer.step_number}, samples {keys[:8]}; "
                    f"lower finetune.learning_rate or use diffusion.dtype=float32"
                )
            unfinished = trainer.step_number < steps
            if trainer.rank == 0:
                rate = (time.monotonic() - began) / (trainer.step_number - resumed_at)
                folder.heartbeat(
                    "unet", trainer.step_number, steps,
                    loss=loss, seconds_per_step=round(rate, 4), device=device_name(),
                )  # fmt: skip
                if unfinished and (trainer.stopping or trainer.step_number % cfg.checkpoint_every == 0):
                    trainer.save(checkpoint, Path(self._scratch.name))
            if unfinished and trainer.stopping:
                raise Stopped(f"stopped after step {trainer.step_number} of {steps}")
        scratch = Path(self._scratch.name)
        trainer.export(scratch / "unet")
        files: dict[str, bytes | Path] = {f"unet/{path.name}": path for path in sorted((scratch / "unet").iterdir())}
        files["training.json"] = (json.dumps(trainer.history()) + "\n").encode()
        n_in = len(rows) + len(failed)
        return Outcome(
            files,
            n_in,
            failed,
            {"steps": steps, "workers": trainer.world, "resumed_at_step": resumed_at},
            obsolete=[CHECKPOINT],
        )


class Trainer:
    """The U-Net, its optimizer and its EMA, stepped by accelerate on however many processes there are."""

    def __init__(self, model: str, cfg: Finetune, *, revision: str | None, precision: str):
        from accelerate import Accelerator
        from diffusers.training_utils import EMAModel

        from vlcp_dist.models.synthesis import load_pipeline

        mixed = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[precision]
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self._cfg = cfg
        device = self.accelerator.device
        pipe: Any = load_pipeline(model, revision=revision, device=device)
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"{model} predicts {pipe.scheduler.config.prediction_type}; Eq. 1 needs a model that predicts "
                f"the noise (prediction_type epsilon), such as Stable Diffusion v1-5"
            )
        self._tokenizer, self._scheduler, unet = pipe.tokenizer, pipe.scheduler, pipe.unet
        self._text_encoder = pipe.text_encoder.to(getattr(torch, precision)).requires_grad_(False)
        if cfg.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self._ema = EMAModel(unet.parameters(), decay=cfg.ema_decay)
        self._ema.to(device)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=cfg.weight_decay, fused=True
        )
        self._unet, self._optimizer = self.accelerator.prepare(unet, optimizer)
        self._unet.train()
        self.step_number = 0
        self.stopping = False
        self._losses: list[float] = []

    def step(self, latents: torch.Tensor, texts: list[str], batch: Batch, *, stop: bool = False) -> float:
        """One optimizer step on this process's samples; returns the loss of the whole global batch.

        Eq. 1: the mean over samples of |eps_theta(z_t, c) - eps|^2. `stopping` is true afterwards, in every process,
        if any of them said `stop`.
        """
        device = self.accelerator.device
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step_number)
        noise, timesteps = batch.noise.to(device), batch.timesteps.to(device)
        noisy = self._scheduler.add_noise(latents.to(device), noise, timesteps)
        ids = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(device)  # fmt: skip
        with torch.no_grad():
            condition = self._text_encoder(ids)[0].float()
        total = torch.zeros((), device=device)
        parts = torch.arange(len(noisy), device=device).split(self._cfg.micro_batch_size)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self._unet):
                with self.accelerator.autocast():
                    predicted = self._unet(
                        noisy[part], timesteps[part], encoder_hidden_states=condition[part], return_dict=False
                    )[0]
                loss = F.mse_loss(predicted.float(), noise[part]) * (batch.weight * len(part) / len(noisy))
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self._unet.parameters(), self._cfg.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.step(self.accelerator.unwrap_model(self._unet).parameters())
        self.step_number += 1
        reduced = self.accelerator.reduce(torch.stack([total, torch.tensor(float(stop), device=device)]), "mean")
        value, stopping = reduced.tolist()
        self.stopping = stopping > 0
        self._losses.append(value)
        return value

    def save(self, path: storage.Location, scratch: Path) -> None:
        """Everything that the next step depends on, in one file that appears whole or not at all."""
        from safetensors.torch import save_file

        tensors = {"losses": torch.tensor(self._losses, dtype=torch.float64)}
        unet = self.accelerator.unwrap_model(self._unet)
        for i, (parameter, shadow) in enumerate(zip(unet.parameters(), self._ema.shadow_params, strict=True)):
            state = self._optimizer.state[parameter]
            tensors |= {f"unet.{i}": parameter.detach(), f"ema.{i}": shadow}
            tensors |= {f"exp_avg.{i}": state["exp_avg"], f"exp_avg_sq.{i}": state["exp_avg_sq"]}
        metadata = {"step": str(self.step_number)}
        if self.accelerator.scaler is not None:
            metadata["scaler"] = json.dumps(self.accelerator.scaler.state_dict())
        local = scratch / path.name
        save_file({name: t.contiguous() for name, t in tensors.items()}, local, metadata)
        storage.write(path, local)

    def resume(self, path: storage.Location) -> None:
        """Go on from a checkpoint, if there is one."""
        from safetensors import safe_open

        if not path.exists():
            return
        unet = self.accelerator.unwrap_model(self._unet)
        with (
            safe_open(storage.local(path), framework="pt", device=str(self.accelerator.device)) as file,
            torch.no_grad(),
        ):
            metadata = file.metadata()
            step = int(metadata["step"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(json.loads(metadata["scaler"]))
            for i, parameter in enumerate(unet.parameters()):
                parameter.copy_(file.get_tensor(f"unet.{i}"))
                self._ema.shadow_params[i].copy_(file.get_tensor(f"ema.{i}"))
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),  # where the fused kernel wants it
                    "exp_avg": file.get_tensor(f"exp_avg.{i}"),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{i}"),
                }
            self._losses = file.get_tensor("losses").tolist()
        self._ema.optimization_step = step
        self.step_number = step

    def export(self, folder: Path) -> None:
        """Save the EMA weights in diffusers layout."""
        unet = self.accelerator.unwrap_model(self._unet)
        self._ema.copy_to(unet.parameters())
        unet.register_to_config(_name_or_path="")  # else the folder of this machine would be part of the result
        unet.save_pretrained(folder, safe_serialization=True)

    def history(self) -> dict[str, list[float]]:
        rates = [self._learning_rate(step) for step in range(len(self._losses))]
        return {"loss": self._losses, "learning_rate": rates}

    def _learning_rate(self, step: int) -> float:
        warmup = self._cfg.warmup_steps
        return self._cfg.learning_rate * min(1.0, (step + 1) / warmup if warmup else 1.0)


def launch(
    run: Run, job: Job, unit: Unit, on_event: Callable[[Event], None], should_stop: Callable[[], bool] = never
) -> None:
    """Train on `finetune.workers` Ray Train workers, with a GPU each where the cluster has them.

    `should_stop` is asked once a second: it may raise. That a stop was asked for is told to the workers by a file.

    Raises:
        InputError: the nodes cannot hold so many workers.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from vlcp_dist.engine.actors import actor_options, capacity, describe, describe_cluster

    # It tells workers to checkpoint before a node goes; ours do so all along.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    cfg, nodes = run.cfg.finetune, ray.nodes()
    asked = actor_options(job, nodes)
    asked["num_gpus"] = math.ceil(asked["num_gpus"])  # processes of one training cannot share a GPU
    if capacity(nodes, asked) < cfg.workers:
        raise InputError(
            f"finetune.workers={cfg.workers}: each needs {describe(asked)} on one node; the cluster has "
            f"{describe_cluster(nodes, asked)}, which hold {capacity(nodes, asked)}"
        )
    needs = {"CPU": asked["num_cpus"], "GPU": asked["num_gpus"], **asked.get("resources", {})}
    if "memory" in asked:
        needs["memory"] = asked["memory"]
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "unit": unit},
        torch_config=TorchConfig(backend="nccl" if asked["num_gpus"] else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cfg.workers,
            use_gpu=asked["num_gpus"] > 0,
            resources_per_worker=needs,
            label_selector=asked.get("label_selector"),  # type: ignore[call-arg]
        ),
        # A worker that is lost costs the steps since the last checkpoint.
        run_config=RunConfig(
            name="ray_train",
            storage_path=_path_in_its_filesystem(job.folder.path),
            storage_filesystem=_filesystem(job.folder.path),
            failure_config=FailureConfig(max_failures=run.cfg.engine.max_retries),
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


def _train_loop(config: dict[str, Any]) -> None:
    import ray.train

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


def _generator(*seeds: int) -> torch.Generator:
    """A generator seeded by several numbers."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


STAGE = Stage(
    "finetune",
    upstream=("index", "caption", "pretrain", "encode"),
    content=lambda cfg: [content(cfg.finetune), content(cfg.diffusion)],
    units=units,
    worker=Worker,
    threads=lambda cfg: cfg.finetune.num_threads,
    launch=launch,
    check=check_diffusion,
)
