"""synthesize.throughput: images from prototypes in batches, against one prototype at a time."""

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import matmul_flops_per_second, wait
from benchmarks.stable_diffusion import PIXELS, WORDS, build_pipeline
from vlcp_dist.models.synthesis import Synthesizer

Row = dict[str, Any]
SETTINGS = {"negative_prompt": "cartoon, anime, painting", "guidance_scale": 10.0}
# images of ours, images of the baseline, batch, inference steps, pixels that are kept
WORK = {"real": (64, 4, 32, 50, 256), "tiny": (64, 16, 32, 10, 64)}
STRENGTH = 0.7
PNG_THREADS = 4


def measure(device: str = "cpu", size: str = "real") -> list[Row]:
    """Images per second, text encoding, decoding and PNG files included; prompts of two windows of text."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = build_pipeline(size, device, dtype)
    ours, theirs, batch, steps, kept = WORK[size]
    latents = torch.randn(ours, 4, *(pipe.unet.config.sample_size,) * 2)
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(WORDS.split(), 90)) for _ in range(ours)]

    def batched(count: int) -> int:
        synthesizer = Synthesizer(pipe, strength=STRENGTH, num_inference_steps=steps, batch_size=batch, **SETTINGS)
        with ThreadPoolExecutor(PNG_THREADS) as threads:
            for _, images in synthesizer.draw(latents[:count], prompts[:count], list(range(count))):
                for pixels in images:
                    threads.submit(_png, pixels, kept)
        return count

    def one_at_a_time(count: int) -> int:
        for i in range(count):
            synthesizer = Synthesizer(pipe, strength=STRENGTH, num_inference_steps=steps, batch_size=1, **SETTINGS)
            for _, images in synthesizer.draw(latents[i : i + 1], prompts[i : i + 1], [i]):
                _png(images[0], kept)
        return count

    def flops(count: int) -> int:
        with FlopCounterMode(display=False) as counter:
            one_at_a_time(count)
        return counter.get_total_flops()

    baseline = _rate(one_at_a_time, theirs, device)
    if device == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    rate = _rate(batched, ours, device)
    ceiling = matmul_flops_per_second(device, dtype) / flops(1)
    return [
        {
            "name": "synthesize.throughput",
            "ours": rate,
            "baseline": baseline,
            "ceiling": ceiling,
            "ratio": rate / baseline,
            "unit": "images/s",
            "note": (
                f"{PIXELS[size]} px, {int(steps * STRENGTH)} of {steps} steps, guidance, {str(dtype)[6:]}, "
                f"{torch.get_num_threads()} threads; {100 * rate / ceiling:.0f}% of the machine's matmul rate"
            ),
        }
    ]


def _rate(draw: Callable[[int], int], count: int, device: str) -> float:
    draw(min(count, 2))
    if device == "cuda":
        draw(count)  # the kernels of the full batch are chosen
    wait(device)
    began = time.perf_counter()
    done = draw(count)
    wait(device)
    return done / (time.perf_counter() - began)


def _png(pixels: np.ndarray, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    return buffer.getvalue()
