"""Prototypes and prompts to images (Eq. 6): long prompts in windows, a batch at a time, each image for itself."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlcp_dist.models.diffusion import DECODE_BATCH, check_finite, missing_weights, quiet

# diffusers shows type checkers an empty stand-in of this class.
StableDiffusionImg2ImgPipeline = Any

Scheduler = Literal["pndm", "ddim", "dpmsolver++"]

# Windows of text whose embeddings are kept: 118 KB each for SD v1-5 in half precision.
KEPT_WINDOWS = 1024
_TEXT_BATCH = 64


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
            "ddim" does not. "dpmsolver++" (second order, multistep) is made for about 20 steps.

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
        ValueError: unknown scheduler.
    """
    with quiet():
        import diffusers

    schedulers: dict[str, tuple[Any, dict[str, Any]]] = {
        "pndm": (diffusers.PNDMScheduler, {}),
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),  # it would clip latents as if they were pixels
        "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    }
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
    kind, options = schedulers[scheduler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if torch.device(device).type == "cuda":  # what its convolutions work in: else each would convert
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


class PromptEncoder:
    """Text embeddings of prompts of any length; windows of text that come again are not encoded again.

    A prompt is cut into windows of 75 tokens; each is encoded alone between BOS and EOS, padded to 77, and the windows
    are concatenated along the sequence (docs/method.md, 7). The shorter of prompt and negative prompt gets empty
    windows. A prompt is never padded to its neighbours' length, so its embedding does not depend on them.
    """

    def __init__(self, pipe: StableDiffusionImg2ImgPipeline):
        self._tokenizer, self._model = pipe.tokenizer, pipe.text_encoder
        self._empty = tuple(self._windows(""))
        self._encoded: dict[tuple[int, ...], torch.Tensor] = {}

    def encode(self, prompts: Sequence[str], negative_prompt: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Embeddings of the prompts, and of the negative prompt at each prompt's length.

        Returns:
            Two lists of len(prompts) tensors (77 * windows, width) in the text encoder's dtype and device.
        """
        negative = self._windows(negative_prompt)
        positives = [self._windows(prompt) for prompt in prompts]
        counts = [max(len(windows), len(negative)) for windows in positives]
        self._encode({w for windows in [*positives, negative, list(self._empty)] for w in windows})
        return (
            [self._embed(windows, count) for windows, count in zip(positives, counts, strict=True)],
            [self._embed(negative, count) for count in counts],
        )

    def _windows(self, text: str) -> list[tuple[int, ...]]:
        """Token ids of `text` in windows of 77, BOS and EOS included; an empty text is one empty window."""
        tokenizer = self._tokenizer
        room = tokenizer.model_max_length - 2
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        pieces = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
        windows = [(tokenizer.bos_token_id, *piece, tokenizer.eos_token_id) for piece in pieces]
        return [w + (tokenizer.pad_token_id,) * (room + 2 - len(w)) for w in windows]

    @torch.no_grad()
    def _encode(self, windows: set[tuple[int, ...]]) -> None:
        if len(self._encoded) + len(windows) > KEPT_WINDOWS:
            self._encoded = {w: self._encoded[w] for w in windows if w in self._encoded}
        new = sorted(windows - self._encoded.keys())
        for start in range(0, len(new), _TEXT_BATCH):
            part = new[start : start + _TEXT_BATCH]
            encoded = self._model(torch.tensor(part, device=self._model.device))[0]
            self._encoded.update(zip(part, encoded, strict=True))

    def _embed(self, windows: Sequence[tuple[int, ...]], count: int) -> torch.Tensor:
        filled = [*windows, *self._empty * (count - len(windows))]
        return torch.cat([self._encoded[window] for window in filled])


class Synthesizer:
    """A pipeline with the settings of a run.

    An image is a function of its own latent, prompt and seed: neither its neighbours nor the batch size change it
    beyond float rounding. When memory runs out the batch is halved for good, which is said on stderr.

    Raises:
        ValueError: a strength that leaves no step to run.
    """

    def __init__(
        self,
        pipe: StableDiffusionImg2ImgPipeline,
        *,
        negative_prompt: str = "cartoon, anime, painting",
        strength: float = 0.7,
        guidance_scale: float = 10.0,
        num_inference_steps: int = 50,
        batch_size: int = 8,
    ):
        if not (0 < strength <= 1 and int(num_inference_steps * strength) >= 1):
            raise ValueError(f"strength {strength} of {num_inference_steps} inference steps leaves no step to run")
        self._pipe = pipe
        self._texts = PromptEncoder(pipe)
        self._negative_prompt = negative_prompt
        self._settings = {
            "strength": strength,
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
        }
        self.batch_size = batch_size

    def draw(
        self, latents: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Noise each prototype to the strength and denoise it under its prompt (Eq. 6), batch after batch.

        Prompts of one number of windows go together. What the caller does with a batch's images, on other threads,
        overlaps with the next batch.

        Args:
            latents: (n, 4, h, w), already scaled, as `encode_images` returns them.
            prompts: n prompts of any length.
            seeds: n seeds of the noise (`image_seed`).

        Yields:
            Positions of a batch, and its images: uint8 (b, H, W, 3) at the autoencoder's own resolution.

        Raises:
            ValueError: lengths that differ.
            FloatingPointError: a latent is not finite.
            torch.OutOfMemoryError: even one image does not fit.
        """
        if not len(latents) == len(prompts) == len(seeds):
            raise ValueError(f"{len(latents)} latents, {len(prompts)} prompts and {len(seeds)} seeds must be as many")
        check_finite(latents, "prototypes", latents.dtype)
        positive, negative = self._texts.encode(prompts, self._negative_prompt)
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, embedding in enumerate(positive):
            by_length[len(embedding)].append(index)
        for group in by_length.values():
            done = 0
            while done < len(group):
                batch = group[done : done + self.batch_size]
                try:
                    images = self._denoise(
                        latents[batch],
                        torch.stack([positive[i] for i in batch]),
                        torch.stack([negative[i] for i in batch]),
                        [torch.Generator().manual_seed(seeds[i]) for i in batch],
                    )
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    images = None
                # Outside the handler: there the exception still holds the batch's tensors.
                if images is None:
                    self.batch_size = len(batch) // 2
                    print(
                        f"synthesize: out of memory at batch {len(batch)}, going on at {self.batch_size}",
                        file=sys.stderr,
                    )
                    torch.cuda.empty_cache()
                    continue
                done += len(batch)
                yield batch, images

    @torch.no_grad()
    def _denoise(
        self,
        latents: torch.Tensor,
        positive: torch.Tensor,
        negative: torch.Tensor,
        generators: list[torch.Generator],
    ) -> np.ndarray:
        pipe = self._pipe
        # Four-channel input passes the pipeline's preprocessing and encoder untouched, straight to the added noise.
        denoised = pipe(
            image=latents.to(pipe.device, pipe.unet.dtype),
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            generator=generators,
            output_type="latent",
            **self._settings,
        ).images
        check_finite(denoised, "denoised latents", pipe.unet.dtype)
        unscaled = (denoised / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        pixels = torch.cat([pipe.vae.decode(part).sample.float() for part in unscaled.split(DECODE_BATCH)])
        check_finite(pixels, "decoded images", pipe.vae.dtype)
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
