"""Stable Diffusion with random weights, whose speed is that of trained ones: of v1-5's size, or tiny."""

from typing import Any

import torch

from vlcp_dist.models.tiny_sd import MAX_TOKENS, SCHEDULER, train_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "real": {
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        "unet": {
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "sample_size": 64,
        },
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "tiny": {
        "vae": {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
        "unet": {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "sample_size": 8,
        },
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
}
PIXELS = {"real": 512, "tiny": 32}
WORDS = "a photo of small large brown white striped spotted bird dog car with long short tail wings on grass water"


def build_vae(size: str, device: str, dtype: torch.dtype) -> Any:
    """The autoencoder: 83.7 million parameters in the real size."""
    import diffusers

    levels = len(SIZES[size]["vae"]["block_out_channels"])
    vae: Any = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        sample_size=PIXELS[size],
        scaling_factor=0.18215,
        **SIZES[size]["vae"],
    )
    return vae.to(device, dtype).eval().requires_grad_(False)


def build_unet(size: str, device: str, dtype: torch.dtype) -> Any:
    """The U-Net: 859.5 million parameters in the real size."""
    import diffusers

    width = SIZES[size]["text"]["hidden_size"]
    unet: Any = diffusers.UNet2DConditionModel(cross_attention_dim=width, **SIZES[size]["unet"])
    return unet.to(device, dtype)


def build_text_encoder(size: str, device: str, dtype: torch.dtype) -> Any:
    """The text encoder: 123.1 million parameters in the real size."""
    import transformers

    config = transformers.CLIPTextConfig(max_position_embeddings=MAX_TOKENS, **SIZES[size]["text"])
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
