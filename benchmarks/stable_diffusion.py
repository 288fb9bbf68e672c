"""Stable Diffusion v1-5 with random weights, whose speed is that of trained ones: as it is, or an eighth as wide."""

from pathlib import Path
from typing import Any

import torch

from vlcp_dist.models.tiny_sd import MAX_TOKENS, SCHEDULER, train_tokenizer

# By how much the tiny size is narrower. Depth, and so the shares that the parts have in the work, stay.
NARROWER = {"real": 1, "tiny": 8}
PIXELS = {"real": 512, "tiny": 64}
WORDS = "a photo of small large brown white striped spotted bird dog car with long short tail wings on grass water"


def build_vae(size: str, device: str, dtype: torch.dtype) -> Any:
    """The autoencoder: 83.7 million parameters in the real size."""
    import diffusers

    vae: Any = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // NARROWER[size] for width in (128, 256, 512, 512)),
        layers_per_block=2,
        norm_num_groups=32 // NARROWER[size],
        latent_channels=4,
        sample_size=PIXELS[size],
        scaling_factor=0.18215,
    )
    return vae.to(device, dtype).eval().requires_grad_(False)


def build_unet(size: str, device: str, dtype: torch.dtype) -> Any:
    """The U-Net, to be trained: 859.5 million parameters in the real size."""
    import diffusers

    unet: Any = diffusers.UNet2DConditionModel(
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=tuple(width // NARROWER[size] for width in (320, 640, 1280, 1280)),
        layers_per_block=2,
        attention_head_dim=8 // NARROWER[size],
        norm_num_groups=32 // NARROWER[size],
        cross_attention_dim=768 // NARROWER[size],
        sample_size=PIXELS[size] // 8,
    )
    return unet.to(device, dtype)


def build_text_encoder(size: str, device: str, dtype: torch.dtype) -> Any:
    """The text encoder: 123.1 million parameters in the real size."""
    import transformers

    config = transformers.CLIPTextConfig(
        max_position_embeddings=MAX_TOKENS,
        hidden_size=768 // NARROWER[size],
        intermediate_size=3072 // NARROWER[size],
        num_attention_heads=12 // NARROWER[size],
        num_hidden_layers=12,
    )
    encoder: Any = transformers.CLIPTextModel(config)
    return encoder.to(device, dtype).eval().requires_grad_(False)


def build_pipeline(size: str, device: str, dtype: torch.dtype) -> Any:
    """The image-to-image pipeline of all parts, as `load_pipeline` gives it."""
    import diffusers

    pipe: Any = diffusers.StableDiffusionImg2ImgPipeline(
        vae=build_vae(size, device, dtype),
        unet=build_unet(size, device, dtype).eval().requires_grad_(False),
        text_encoder=build_text_encoder(size, device, dtype),
        tokenizer=train_tokenizer([WORDS], 600),
        scheduler=diffusers.PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_model(folder: Path, size: str) -> None:
    """The model's folder in diffusers' layout; the weights are those of one seed."""
    torch.manual_seed(0)
    build_pipeline(size, "cpu", torch.float32).save_pretrained(folder, safe_serialization=True)
