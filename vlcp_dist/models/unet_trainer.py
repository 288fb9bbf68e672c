"""Trains the U-Net of a Stable Diffusion with the noise-prediction loss (Eq. 1), on one process or many, by accelerate.

Memory and speed are decided by `Setup`, results by `Recipe`. Both strategies hold fp32 weights, compute in autocast and
see the same batches, so they differ in the last digits only; DeepSpeed shares the optimizer's state out (ZeRO).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlcp_dist.models import train_state
from vlcp_dist.models.diffusion import missing_weights, quiet
from vlcp_dist.models.texts import TextEncoder
from vlcp_dist.models.training_setup import Recipe, Setup, make_accelerator
from vlcp_dist.ops.order import Batch

# Parts of a checkpoint, a file each.
WEIGHTS, EMA, OPTIMIZER = "weights.safetensors", "ema.safetensors", "optimizer.safetensors"
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Trainer:
    """The U-Net, its optimizer and its moving average, on however many processes there are.

    Raises:
        ValueError: the model does not predict noise, a tracker is not installed, or DeepSpeed is asked for float16.
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
    """

    def __init__(self, model: str, recipe: Recipe, setup: Setup, *, revision: str | None = None):
        self.recipe, self.setup = recipe, setup
        self._model, self._revision = model, revision
        self.accelerator = make_accelerator(recipe, setup)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.scheduler = _noise_schedule(model, revision)
        unet = _load_unet(model, revision)
        if recipe.lora_rank is not None:
            _add_lora(unet, recipe.lora_rank, recipe.seed)
        if setup.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self._memory_format = torch.channels_last if setup.channels_last else torch.contiguous_format
        unet.to(self.device).train()
        if setup.strategy == "ddp":  # DeepSpeed keeps weights in flat buffers of its own; activations are what counts
            unet.to(memory_format=self._memory_format)
        if setup.compile:
            unet.compile()
        trained = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=recipe.learning_rate, betas=(0.9, 0.999), weight_decay=recipe.weight_decay, fused=True
        )
        self._unet, self._optimizer = self.accelerator.prepare(unet, optimizer)
        self._ema = train_state.Ema(trained, recipe.ema_decay, rank=self.rank, world=self.world)
        self._text_encoder: TextEncoder | None = None
        signal = self.scheduler.alphas_cumprod.to(self.device)
        self._snr = signal / (1 - signal)
        self.step_number = 0
        self.stopping = False
        self.losses: list[float] = []
        self.grad_norm = math.nan

    @property
    def unet(self) -> Any:
        """The U-Net itself, without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self._unet)

    def step(self, latents: torch.Tensor, text: np.ndarray, batch: Batch, *, stop: bool = False) -> float:
        """One optimizer step on this process's part of a batch; returns the loss of the whole global batch.

        Eq. 1: the mean over samples of |eps_theta(z_t, c) - eps|^2, weighted with min(SNR, gamma) / SNR where
        `snr_gamma` is given. `stopping` is true afterwards, in every process, if any of them said `stop`. A loss or
        gradient that is not finite is for the caller to see in what is returned and in `grad_norm`.

        Args:
            latents: (b, 4, h, w) on the CPU.
            text: token ids (b, 77), or embeddings fp16 (b, 77, width).
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step_number)
        noise, timesteps = self._send(batch.noise), self._send(batch.timesteps)
        noisy = self.scheduler.add_noise(self._send(latents).float(), noise, timesteps)
        noisy = noisy.contiguous(memory_format=self._memory_format)
        condition = self.condition(text).float()
        weights = self._send(batch.weights) * self._snr_weights(timesteps)
        total = torch.zeros((), device=self.device)
        parts = torch.arange(len(noisy), device=self.device).split(self.setup.micro_batch_size)
        for i, part in enumerate(parts):
            with self._accumulating(last=i == len(parts) - 1):
                with self.accelerator.autocast():
                    predicted = self._unet(
                        noisy[part], timesteps[part], encoder_hidden_states=condition[part], return_dict=False
                    )[0]
                error = F.mse_loss(predicted.float(), noise[part], reduction="none").mean(dim=(1, 2, 3))
                loss = (error * weights[part]).sum()
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self._unet.parameters(), self.recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(self.step_number)
        self.step_number += 1
        numbers = torch.stack([total, torch.tensor(float(stop), device=self.device)])
        value, stopping = self.accelerator.reduce(numbers, "mean").tolist()
        self.stopping, self.grad_norm = stopping > 0, float(norm)
        self.losses.append(value)
        return value

    def diverged(self) -> bool:
        """Whether the last loss or gradient was not finite. In float16 a gradient may be: its step is skipped."""
        norm_counts = self.setup.precision != "float16"
        return not (math.isfinite(self.losses[-1]) and (math.isfinite(self.grad_norm) or not norm_counts))

    def learning_rate(self, step: int) -> float:
        """Constant, after a linear warm-up."""
        warmup = self.recipe.warmup_steps
        return self.recipe.learning_rate * min(1.0, (step + 1) / warmup if warmup else 1.0)

    def condition(self, text: np.ndarray) -> torch.Tensor:
        """fp16 (b, 77, width): cached embeddings as they are, token ids encoded."""
        if text.ndim == 3:
            return self._send(torch.from_numpy(text))
        if self._text_encoder is None:
            self._text_encoder = self.load_text_encoder()
        return self._text_encoder(text)

    def load_text_encoder(self) -> TextEncoder:
        dtype = getattr(torch, self.setup.precision)
        return TextEncoder(self._model, revision=self._revision, device=self.device, dtype=dtype)

    def state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The parts of a checkpoint in turn, on the CPU of the main process; empty in others. All ask together."""
        named = self._named()
        yield WEIGHTS, self._collect((name, p.detach()) for name, p in named)
        averages = zip((name for name, _ in named), self._ema.whole(), strict=True)
        yield EMA, self._collect(averages)
        optimizer = self._collect(train_state.optimizer_state(named, self._inner_optimizer))
        yield OPTIMIZER, optimizer | {"losses": torch.tensor(self.losses, dtype=torch.float64)}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the training beside its tensors; JSON-ready."""
        scaler = self.accelerator.scaler
        return {"workers": self.world, "scaler": None if scaler is None else scaler.state_dict()}

    def load(self, files: dict[str, Path], step: int, facts: dict[str, Any]) -> None:
        """Go on from a checkpoint: `files` by part, as `state` yielded them, and `facts`.

        Raises:
            ValueError: it is of another network; the message names a parameter with both shapes.
        """
        from safetensors import safe_open

        named = self._named()
        with safe_open(files[WEIGHTS], framework="pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            train_state.check_shapes(named, stored, f"the checkpoint {files[WEIGHTS]}")
            train_state.load_weights(named, self._inner_optimizer, file.get_tensor)
        with safe_open(files[EMA], framework="pt") as file:
            self._ema.load([name for name, _ in named], file.get_tensor)
        with safe_open(files[OPTIMIZER], framework="pt") as file:
            train_state.load_optimizer(named, self._inner_optimizer, step, file.get_tensor)
            self.losses = file.get_tensor("losses").tolist()
        if self.accelerator.scaler is not None and facts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step_number = step

    @torch.no_grad()
    def put_average(self) -> list[torch.Tensor]:
        """Put the moving average into the U-Net of the main process; returns what was there. All ask together."""
        before = []
        for (_, parameter), value in zip(self._named(), self._ema.whole(), strict=True):
            if self.rank == 0:
                before.append(parameter.detach().clone())
                parameter.copy_(value)
        return before

    @torch.no_grad()
    def put_back(self, weights: list[torch.Tensor]) -> None:
        for (_, parameter), value in zip(self._named(), weights, strict=False):
            parameter.copy_(value)

    def finish(self) -> Any:
        """The U-Net with the averaged weights, adapters merged, in fp32 on the CPU of the main process; else None.

        Nothing can be trained after it. All ask together.
        """
        self.put_average()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.rank != 0:
            return None
        unet = self.unet
        if self.recipe.lora_rank is not None:
            unet.fuse_lora()
            unet.unload_lora()
        return unet.to(device="cpu", memory_format=torch.contiguous_format)

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.unet.named_parameters() if p.requires_grad]

    @property
    def _inner_optimizer(self) -> Any:
        """ZeRO's where DeepSpeed is used, else AdamW."""
        return self._optimizer.optimizer

    def _collect(self, tensors: Any) -> dict[str, torch.Tensor]:
        collected = {}
        for name, tensor in tensors:  # to the end in every process: each may be a collective call
            if self.rank == 0:
                collected[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return collected

    def _accumulating(self, *, last: bool) -> Any:
        """Gradients are exchanged with the last part of a batch only."""
        self.accelerator.sync_gradients = last
        by_hand = last or self.setup.strategy == "deepspeed"  # DeepSpeed goes by `sync_gradients`
        return nullcontext() if by_hand else self.accelerator.no_sync(self._unet)

    def _snr_weights(self, timesteps: torch.Tensor) -> torch.Tensor | float:
        """min(SNR, gamma) / SNR (Hang et al. 2023, for noise prediction)."""
        if self.recipe.snr_gamma is None:
            return 1.0
        snr = self._snr[timesteps]
        return snr.clamp(max=self.recipe.snr_gamma) / snr

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def _noise_schedule(model: str, revision: str | None) -> Any:
    with quiet(), missing_weights(model, revision):
        import diffusers

        scheduler = diffusers.DDPMScheduler.from_pretrained(model, subfolder="scheduler", revision=revision)
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"{model} predicts {scheduler.config.prediction_type}; Eq. 1 needs a model that predicts "
            f"the noise (prediction_type epsilon), such as Stable Diffusion v1-5"
        )
    return scheduler


def _load_unet(model: str, revision: str | None) -> Any:
    with quiet(), missing_weights(model, revision):
        import diffusers

        return diffusers.UNet2DConditionModel.from_pretrained(
            model, subfolder="unet", revision=revision, dtype=torch.float32, use_safetensors=True
        )


def _add_lora(unet: Any, rank: int, seed: int) -> None:
    """Low-rank adapters on all attention projections; the rest is frozen. The first factors are drawn from the seed."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("finetune.lora_rank needs peft: install vlcp-dist[lora]") from error
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
