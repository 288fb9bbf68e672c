"""How a U-Net is trained: what decides the result, what decides speed and memory, and accelerate set up for it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Recipe:
    """What the result depends on (docs/method.md, 2). `lora_rank` None trains all weights."""

    learning_rate: float = 1e-5
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    snr_gamma: float | None = None
    lora_rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Setup:
    """What decides speed and memory. `deepspeed` is its configuration, of which only ZeRO is the caller's.

    `trackers` log to `log_folder`, by the main process.
    """

    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    strategy: Literal["deepspeed", "ddp"] = "ddp"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 8
    gradient_checkpointing: bool = False
    channels_last: bool = True
    compile: bool = False
    trackers: tuple[str, ...] = ()
    log_folder: str | None = None


def make_accelerator(recipe: Recipe, setup: Setup) -> Any:
    import accelerate
    from accelerate.utils import InitProcessGroupKwargs

    cuda = torch.cuda.is_available()
    common: dict[str, Any] = {"log_with": _installed(setup.trackers) or None, "project_dir": setup.log_folder}
    if setup.strategy == "ddp":
        mixed = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[setup.precision]
        return accelerate.Accelerator(mixed_precision=mixed, cpu=not cuda, **common)
    # `cpu=True` would make accelerate ignore DeepSpeed without a word.
    accelerator = accelerate.Accelerator(
        deepspeed_plugin=_deepspeed_plugin(recipe, setup),
        kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")],
        **common,
    )
    if accelerator.distributed_type != accelerate.DistributedType.DEEPSPEED:
        raise RuntimeError(f"accelerate runs {accelerator.distributed_type} although DeepSpeed was asked for")
    return accelerator


def _deepspeed_plugin(recipe: Recipe, setup: Setup) -> Any:
    if setup.precision == "float16":
        raise ValueError(
            "finetune.strategy=deepspeed trains in bfloat16 or float32, not in float16, where processes would scale "
            "their gradients differently: set finetune.strategy=ddp, or diffusion.dtype=float32"
        )
    import deepspeed
    from accelerate.utils import DeepSpeedPlugin

    # An all-reduce for inference on CPUs, which would be compiled for half a minute and never be called.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's own call, which its users cannot mend.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    _alone_in_its_group()
    config: dict[str, Any] = {
        **setup.deepspeed,
        "train_micro_batch_size_per_gpu": 1,  # by which DeepSpeed only counts: `step` weighs the samples itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for CPUs would be compiled first
    }
    if setup.precision == "bfloat16":
        # No module's gradients are exchanged in bfloat16: sums of them would depend on the number of processes.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return DeepSpeedPlugin(hf_ds_config=config)


def _alone_in_its_group() -> None:
    """What a launcher of many processes sets, for a process that nobody launched: DeepSpeed wants a group."""
    if "RANK" in os.environ or torch.distributed.is_initialized():
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)


def _installed(trackers: tuple[str, ...]) -> list[str]:
    from accelerate.tracking import get_available_trackers

    available = [tracker.value for tracker in get_available_trackers()]
    for name in trackers:
        if name not in available:  # accelerate would leave it out without a word
            raise ValueError(
                f"finetune.trackers asks for {name}, which is not installed: install it (pip install {name})"
            )
    return list(trackers)
