"""Stable Diffusion as three functions: images to latents, prompts to embeddings, latents and prompts to images.

The same code runs SD v1-5 and the tiny variant of `tiny_sd`: both are folders in diffusers' layout.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

# diffusers shows type checkers empty stand-ins of these classes.
AutoencoderKL = Any
StableDiffusionImg2ImgPipeline = Any

Scheduler = Literal["pndm", "ddim"]

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


def load_pipeline(
    model: str | Path,
    *,
    unet: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    scheduler: Scheduler = "pndm",
) -> StableDiffusionImg2ImgPipeline:
    """Image-to-image pipeline of a Stable Diffusion folder or hub id, without safety checker and progress bar.

    Args:
        unet: folder with fine-tuned U-Net weights (diffusers layout) that take the place of the model's own.
        scheduler: "pndm" is SD v1-5's own and the method's. Started midway, as strength < 1 does, diffusers'
            PNDM stays one step behind its timesteps: with few inference steps that leaves visible noise, which
            "ddim" does not.

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
        ValueError: unknown scheduler.
    """
    with quiet():
        import diffusers

    schedulers = {"pndm": diffusers.PNDMScheduler, "ddim": diffusers.DDIMScheduler}
    if scheduler not in schedulers:
        raise ValueError(f"scheduler must be one of {', '.join(schedulers)}, not {scheduler!r}")

    parts = {}
    if unet is not None:
        if not Path(unet, "config.json").is_file():
            raise FileNotFoundError(f"{unet} holds no fine-tuned U-Net (no config.json): run fine-tuning first")
        parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(str(unet), dtype=dtype, use_safetensors=True)
    with quiet(), missing_weights(model, revision):
        pipe: Any = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
            str(model),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    # DDIM would clip latents as if they were pixels unless told not to.
    pipe.scheduler = schedulers[scheduler].from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: torch.Tensor, *, sample_generators: Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """Scaled latents z of images: the posterior's mean, or a sample of it (METHOD.md section 3).

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


@torch.no_grad()
def encode_prompts(
    pipe: StableDiffusionImg2ImgPipeline, prompts: Sequence[str], negative_prompt: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Text embeddings of prompts of any length, and of the negative prompt at each prompt's length.

    A prompt is cut into windows of 75 tokens; each is encoded alone between BOS and EOS, padded to 77, and the
    windows are concatenated along the sequence. The shorter of prompt and negative prompt gets empty windows.
    A prompt is never padded to its neighbours' length, so its embedding does not depend on them.

    Returns:
        Two lists of len(prompts) tensors (77 * windows, width) in the text encoder's dtype and device.
    """
    negative = _token_windows(pipe, negative_prompt)
    positives, negatives = [], []
    for prompt in prompts:
        windows = _token_windows(pipe, prompt)
        count = max(len(windows), len(negative))
        positives.append(_pad_windows(pipe, windows, count))
        negatives.append(_pad_windows(pipe, negative, count))

    flat = [tuple(window) for windows in positives + negatives for window in windows]
    distinct = list(dict.fromkeys(flat))
    ids = torch.tensor(distinct, device=pipe.text_encoder.device)
    encoded = torch.cat([pipe.text_encoder(part)[0] for part in ids.split(64)])
    row = {window: index for index, window in enumerate(distinct)}

    def embed(windows: list[list[int]]) -> torch.Tensor:
        return torch.cat([encoded[row[tuple(window)]] for window in windows])

    return [embed(windows) for windows in positives], [embed(windows) for windows in negatives]


def synthesize(
    pipe: StableDiffusionImg2ImgPipeline,
    latents: torch.Tensor,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str = "cartoon, anime, painting",
    strength: float = 0.7,
    guidance_scale: float = 10.0,
    num_inference_steps: int = 50,
    batch_size: int = 8,
) -> np.ndarray:
    """Noise each prototype to `strength` and denoise it under its prompt (Eq. 6).

    An image is a function of its own latent, prompt and seed: neither its neighbours nor the batch size change
    it (beyond float rounding). When CUDA's memory runs out the batch is halved, which is said on stderr.

    Args:
        latents: (b, 4, h, w), already scaled, as `encode_images` returns them.
        prompts: b prompts of any length.
        seeds: b seeds of the noise (`image_seed`).

    Returns:
        uint8 (b, H, W, 3) at the autoencoder's own resolution.

    Raises:
        ValueError: lengths that differ, or a strength that leaves no step to run.
        FloatingPointError: a latent is not finite.
        torch.OutOfMemoryError: even one image does not fit.
    """
    if not len(latents) == len(prompts) == len(seeds):
        raise ValueError(f"{len(latents)} latents, {len(prompts)} prompts and {len(seeds)} seeds must be as many")
    if not (0 < strength <= 1 and int(num_inference_steps * strength) >= 1):
        raise ValueError(f"strength {strength} of {num_inference_steps} inference steps leaves no step to run")
    _check_finite(latents, "prototypes", latents.dtype)

    positive, negative = encode_prompts(pipe, prompts, negative_prompt)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, embedding in enumerate(positive):
        by_length[len(embedding)].append(index)

    images: list[np.ndarray | None] = [None] * len(prompts)
    pending = list(by_length.values())
    while pending:
        group = pending.pop()
        chunk, rest = group[:batch_size], group[batch_size:]
        try:
            decoded = _denoise(
                pipe,
                latents[chunk],
                torch.stack([positive[i] for i in chunk]),
                torch.stack([negative[i] for i in chunk]),
                [torch.Generator().manual_seed(seeds[i]) for i in chunk],
                strength=strength,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
            )
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            decoded = None
        # Outside the handler: there the exception still holds the batch's tensors.
        if decoded is None:
            batch_size = max(1, len(chunk) // 2)
            print(
                f"synthesize: out of CUDA memory at batch {len(chunk)}, going on at {batch_size}",
                file=sys.stderr,
            )
            torch.cuda.empty_cache()
            rest = group
        else:
            for index, image in zip(chunk, decoded, strict=True):
                images[index] = image
        if rest:
            pending.append(rest)
    return np.stack(images)  # type: ignore[arg-type]


def image_seed(run_seed: int, class_id: str, cluster: int, repeat: int) -> int:
    """63-bit seed of one image's noise, the same on every machine and in every version of Python."""
    key = f"{run_seed}\0{class_id}\0{cluster}\0{repeat}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


@torch.no_grad()
def _denoise(
    pipe: StableDiffusionImg2ImgPipeline,
    latents: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    generators: list[torch.Generator],
    *,
    strength: float,
    guidance_scale: float,
    num_inference_steps: int,
) -> np.ndarray:
    # Four-channel input passes the pipeline's preprocessing and encoder untouched, straight to the added noise.
    denoised = pipe(
        image=latents.to(pipe.device, pipe.unet.dtype),
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        generator=generators,
        strength=strength,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        output_type="latent",
    ).images
    _check_finite(denoised, "denoised latents", pipe.unet.dtype)
    unscaled = (denoised / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    pixels = torch.cat([pipe.vae.decode(part).sample.float() for part in unscaled.split(DECODE_BATCH)])
    _check_finite(pixels, "decoded images", pipe.vae.dtype)
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _token_windows(pipe: StableDiffusionImg2ImgPipeline, text: str) -> list[list[int]]:
    """Token ids of `text` in windows of 77, BOS and EOS included; an empty text is one empty window."""
    tokenizer = pipe.tokenizer
    room = tokenizer.model_max_length - 2
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    pieces = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
    windows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
    return [w + [tokenizer.pad_token_id] * (room + 2 - len(w)) for w in windows]


def _pad_windows(pipe: StableDiffusionImg2ImgPipeline, windows: list[list[int]], count: int) -> list[list[int]]:
    return windows + _token_windows(pipe, "") * (count - len(windows))


def _check_finite(values: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    bad = (~torch.isfinite(values.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(f"{what} are not finite in {dtype} at positions {bad}: use bfloat16 or float32")


@contextmanager
def missing_weights(model: str | Path, revision: str | None) -> Iterator[None]:
    """Turn the loaders' various errors for absent files into one that names the remedy."""
    try:
        if _is_folder(model) and not Path(model, "model_index.json").is_file():
            raise FileNotFoundError(f"no model_index.json in {model}")
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load Stable Diffusion from {model}: {error}\nFetch its weights with:\n"
            f"    {_download_command(model, revision)}"
        ) from error


def _is_folder(model: str | Path) -> bool:
    """A hub id is owner/name and names nothing on this disk."""
    return isinstance(model, Path) or Path(model).exists() or model.count("/") != 1


def _download_command(model: str | Path, revision: str | None) -> str:
    command = ["hf", "download", SD15 if _is_folder(model) else str(model), *SD15_FILES]
    if revision:
        command += ["--revision", revision]
    if _is_folder(model):
        command += ["--local-dir", str(model)]
    return " ".join(command)


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
