"""Stable Diffusion's architecture at tiny size, trained from scratch on small images and their descriptions.

It lets the whole method run without downloads: every part is the class that the real model uses, so whatever
loads Stable Diffusion v1-5 loads this folder too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlcp_dist.models.diffusion import AutoencoderKL, quiet

# transformers' classes change their bases with what is installed, which type checkers cannot follow.
CLIPTextModel = Any
CLIPTokenizer = Any

Progress = Callable[[str, int, int, float], None]

LATENT_CHANNELS = 4
MAX_TOKENS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# SD v1-5's noise schedule and sampler.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


def build_tiny_sd(
    folder: str | Path,
    images: np.ndarray,
    texts: Sequence[str],
    *,
    vae_steps: int = 350,
    vae_batch: int = 32,
    vae_lr: float = 2e-3,
    vae_channels: Sequence[int] = (16, 32, 32),
    contrastive_steps: int = 150,
    text_width: int = 64,
    text_layers: int = 2,
    vocab_size: int = 1000,
    unet_channels: Sequence[int] = (32, 64),
    seed: int = 0,
    num_threads: int = 2,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train a tiny Stable Diffusion and save it at `folder` in diffusers' layout (safetensors).

    The autoencoder learns to reproduce `images`; its scaling factor becomes 1 / std of their latents. The text
    encoder learns to tell which text belongs to which latent, because a denoiser cannot learn to follow an
    encoder that has no meaning. The U-Net keeps its random weights: training it is the fine-tuning step's work.
    The same arguments give the same bytes on the same machine.

    Args:
        images: uint8 (n, 3, s, s); s divides by 4 and latents are (4, s / 4, s / 4). A tenth of them, at most
            128, is held out of the autoencoder's training to measure it.
        texts: one description per image.
        vae_channels: width of the autoencoder's levels; each level but the last halves the resolution.
        unet_channels: width of the U-Net's levels, all with cross-attention.
        num_threads: torch's threads while training; part of the arguments because sums depend on it.
        progress: called as (phase, step, steps, loss), phase "vae" or "text".

    Returns:
        vae_psnr (dB, on the held-out images), scaling_factor, text_accuracy (share of a batch's 64 texts that find
        a latent of theirs), vae_seconds, text_seconds, unet_parameters.

    Raises:
        ValueError: images that are not uint8 (n, 3, s, s) with n >= 16, or another number of texts.
    """
    _check_images(images, texts, stride=2 ** (len(vae_channels) - 1))
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    held_out, trained = order.tensor_split([min(128, max(1, len(order) // 10))])

    with _deterministic(seed, num_threads):
        started = time.perf_counter()
        vae = _train_vae(
            pixels[trained],
            channels=vae_channels,
            steps=vae_steps,
            batch=vae_batch,
            lr=vae_lr,
            seed=seed,
            progress=progress,
        )
        latents = _encode(vae, pixels)
        scale = 1 / latents.std().item()
        vae.register_to_config(scaling_factor=scale)
        psnr = _psnr(vae, pixels[held_out])
        vae_done = time.perf_counter()

        tokenizer = train_tokenizer(texts, vocab_size)
        text_encoder, accuracy = _train_text_encoder(
            tokenizer,
            texts,
            latents * scale,
            width=text_width,
            layers=text_layers,
            steps=contrastive_steps,
            seed=seed,
            progress=progress,
        )
        text_done = time.perf_counter()
        unet = _new_unet(unet_channels, text_width, latents.shape[-1])

    with quiet():
        import diffusers

        pipe: Any = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=diffusers.PNDMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(folder, safe_serialization=True)
    return {
        "vae_psnr": psnr,
        "scaling_factor": scale,
        "text_accuracy": accuracy,
        "vae_seconds": vae_done - started,
        "text_seconds": text_done - vae_done,
        "unet_parameters": float(sum(p.numel() for p in unet.parameters())),
    }


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> CLIPTokenizer:
    """Byte-level BPE learned from `texts`, in CLIP's form: lower-cased, `</w>` ends a word, 77 tokens at most.

    Every byte is in the vocabulary both inside and at the end of a word, so any text can be encoded.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # A CLIP tokenizer without merges lends its own normalizer and word splitter to the training.
    blank: Any = transformers.CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [byte + "</w>" for byte in alphabet]
    # Ties between merges go to the lower id, and the trainer numbers unlisted endings in the order of a hash table.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)

    learned = json.loads(learner.to_str())["model"]
    by_rank = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    tokens = dict.fromkeys([*alphabet, *endings, *by_rank, BOS, EOS])
    return transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token=EOS,
        model_max_length=MAX_TOKENS,
    )


def _check_images(images: np.ndarray, texts: Sequence[str], stride: int) -> None:
    shape = images.shape
    square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] and shape[2] % stride == 0
    if images.dtype != np.uint8 or not square:
        raise ValueError(f"images must be uint8 (n, 3, s, s) with s a multiple of {stride}, not {images.dtype} {shape}")
    if len(images) < 16:
        raise ValueError(f"a tiny Stable Diffusion needs at least 16 images to train on, not {len(images)}")
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images need as many texts, not {len(texts)}")


@contextmanager
def _deterministic(seed: int, num_threads: int) -> Iterator[None]:
    """Seed the weights' initialisation and fix the thread count, and leave the caller's RNG and threads alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _train_vae(
    pixels: torch.Tensor,
    *,
    channels: Sequence[int],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Progress | None,
) -> AutoencoderKL:
    """Autoencoder for `pixels` (n, 3, s, s) in [-1, 1]: squared error plus a faint KL that keeps latents small."""
    import diffusers

    vae: Any = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=pixels.shape[-1],
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=max(2, steps))
    generator = torch.Generator().manual_seed(seed + 1)
    for step in range(steps):
        x = pixels[torch.randint(len(pixels), (batch,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        loss = F.mse_loss(decoded, x) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress("vae", step + 1, steps, loss.item())
    return vae.eval().requires_grad_(False)


def _encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])


def _psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction in dB; pixels span 2."""
    decoded = vae.decode(_encode(vae, pixels)).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / F.mse_loss(decoded, pixels))).item()


def _train_text_encoder(
    tokenizer: CLIPTokenizer,
    texts: Sequence[str],
    latents: torch.Tensor,
    *,
    width: int,
    layers: int,
    steps: int,
    seed: int,
    progress: Progress | None,
) -> tuple[CLIPTextModel, float]:
    """CLIP's contrastive loss between the texts and a linear map of their scaled latents (n, 4, h, w).

    The linear map is thrown away; the second result is the last batch's text-to-latent accuracy.
    """
    import transformers

    encoder: Any = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    projection = torch.nn.Linear(latents[0].numel(), width)
    parameters = [*encoder.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed + 2)
    # Padding follows the end token and attention is causal, so the pooled embedding never sees it.
    tokens = tokenizer(list(texts), padding="longest", truncation=True, return_tensors="pt").input_ids
    accuracy = float("nan")
    for step in range(steps):
        chosen = torch.randint(len(tokens), (64,), generator=generator)
        text = F.normalize(encoder(tokens[chosen]).pooler_output, dim=-1)
        image = F.normalize(projection(latents[chosen].flatten(1)), dim=-1)
        similarity = text @ image.T
        # Images that share a description are all right answers.
        same = (tokens[chosen][:, None] == tokens[chosen][None]).all(-1)
        target = same / same.sum(1, keepdim=True)
        logits = similarity / 0.07
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = same[torch.arange(len(chosen)), similarity.argmax(1)].float().mean().item()
        if progress:
            progress("text", step + 1, steps, loss.item())
    return encoder.eval().requires_grad_(False), accuracy


def _new_unet(channels: Sequence[int], text_width: int, latent_size: int) -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )
