"""What becomes of a U-Net in training: sample images on the way, and a diffusers folder at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlcp_dist.models.diffusion import DECODE_BATCH, load_vae, missing_weights, quiet
from vlcp_dist.ops.order import generator_of

SAMPLES = 2  # what a generator is for, beside ORDER and STEP


@torch.no_grad()
def sample_images(
    unet: Any,
    noise_schedule: Any,
    model: str,
    condition: torch.Tensor,
    unconditional: torch.Tensor,
    *,
    shape: tuple[int, ...],
    revision: str | None,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> np.ndarray:
    """Text-to-image by DDIM with classifier-free guidance, from noise that depends on (seed, position) alone.

    The autoencoder of `model` is loaded for this and let go.

    Args:
        condition: (b, 77, width) of the descriptions.
        unconditional: (1, 77, width) of the empty one.
        shape: of a latent.

    Returns:
        uint8 (b, H, W, 3).
    """
    import diffusers

    device, training = unet.device, unet.training
    unet.eval()
    scheduler = diffusers.DDIMScheduler.from_config(noise_schedule.config, clip_sample=False)
    scheduler.set_timesteps(num_inference_steps, device=device)
    noise = [torch.randn(shape, generator=generator_of(seed, SAMPLES, i)) for i in range(len(condition))]
    latents = torch.stack(noise).to(device)
    both = torch.cat([unconditional.expand_as(condition), condition]).to(unet.dtype)
    with torch.compiler.set_stance("force_eager"):
        for t in scheduler.timesteps:
            without, towards = unet(torch.cat([latents, latents]), t, both, return_dict=False)[0].chunk(2)
            latents = scheduler.step(without + guidance_scale * (towards - without), t, latents).prev_sample
    unet.train(training)
    vae = load_vae(model, revision=revision, device=device)
    parts = (latents / vae.config.scaling_factor).split(DECODE_BATCH)
    pixels = torch.cat([vae.decode(part).sample for part in parts])
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_pipeline(unet: Any, model: str, folder: Path, *, revision: str | None) -> None:
    """Save the U-Net with the frozen parts of `model` as a folder that `StableDiffusionPipeline.from_pretrained` loads.

    The frozen parts are copied (0.8 GB for SD v1-5, the U-Net has 3.4): a link would break in an object store, and
    when the folder is moved. The same weights give the same bytes, wherever `model` lies.
    """
    with quiet(), missing_weights(model, revision):
        import diffusers

        pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(
            model, unet=unet, revision=revision, use_safetensors=True,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.register_to_config(_name_or_path="")
        for part in (pipe.unet, pipe.vae):
            part.register_to_config(_name_or_path="")
        pipe.text_encoder.config._name_or_path = ""
        pipe.save_pretrained(folder, safe_serialization=True)
