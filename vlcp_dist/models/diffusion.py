"""What all uses of a Stable Diffusion share: its autoencoder, seeds, finite numbers, and the error for missing weights.

The same code runs SD v1-5 and the tiny variant of `tiny_sd`: both are folders in diffusers' layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlcp_dist.models import weights

# diffusers shows type checkers an empty stand-in of this class.
AutoencoderKL = Any

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# The files of SD v1-5 that are loaded; its repository holds ten times as much (checkpoints, pickles, safety checker).
SD15_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
SD15_PARTS = ("unet", "vae", "text_encoder")  # that have weights
# Decoding takes several times the memory of denoising: in slices it never decides the batch size.
DECODE_BATCH = 8


def load_vae(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AutoencoderKL:
    """The frozen autoencoder of a Stable Diffusion folder or hub id, its weights channels-last as convolutions like it.

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
    """
    with quiet(), missing_weights(model, revision):
        import diffusers

        vae: Any = diffusers.AutoencoderKL.from_pretrained(
            str(model), subfolder="vae", revision=revision, dtype=dtype, use_safetensors=True
        )
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: torch.Tensor, *, sample_generators: Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """Scaled latents z of images: the posterior's mean, or a sample of it (docs/method.md, 3).

    On a GPU nothing is waited for: images in pinned memory are copied, and the latents computed, while the caller
    goes on. That is why they are not looked at: in half precision some may be inf or nan.

    Args:
        images: uint8 (b, 3, H, W), or float in [-1, 1].
        sample_generators: one CPU generator per image; given, the posterior is sampled.

    Returns:
        float32 (b, 4, H / 8, W / 8) for SD v1-5, on the autoencoder's device, times its scaling factor.

    Raises:
        ValueError: not one generator per image.
    """
    if sample_generators is not None and len(sample_generators) != len(images):
        raise ValueError(f"{len(images)} images need as many generators, not {len(sample_generators)}")
    images = images.to(vae.device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    posterior = vae.encode(images.to(vae.dtype, memory_format=torch.channels_last)).latent_dist
    latents = posterior.mean.float()
    if sample_generators is not None:
        noise = [torch.randn(latents.shape[1:], generator=generator) for generator in sample_generators]
        latents = latents + posterior.std.float() * torch.stack(noise).to(latents.device)
    return latents * vae.config.scaling_factor


def image_seed(run_seed: int, class_id: str, cluster: int, repeat: int) -> int:
    """63-bit seed of one image's noise, the same on every machine and in every version of Python."""
    key = f"{run_seed}\0{class_id}\0{cluster}\0{repeat}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def check_finite(values: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    bad = (~torch.isfinite(values.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(f"{what} are not finite in {dtype} at positions {bad}: use bfloat16 or float32")


@contextmanager
def missing_weights(model: str | Path, revision: str | None) -> Iterator[None]:
    """Turn the loaders' various errors for absent files into one that names the remedy."""
    try:
        if weights.is_folder(model) and not Path(model, "model_index.json").is_file():
            raise FileNotFoundError(f"no model_index.json in {model}")
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load Stable Diffusion from {model}: {error}\nFetch its weights with:\n"
            f"    {weights.download_command(model, revision, SD15, SD15_FILES)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Load or save diffusers models without progress bars; warnings stay."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    # Importing the pipelines makes transformers note the absence of torchvision, which nothing here needs.
    verbosity = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    try:
        from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline  # noqa: F401
    finally:
        transformers_log.set_verbosity(verbosity)

    shown = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
