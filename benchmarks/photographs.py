"""JPEGs with the spectrum of photographs, on which decoders spend what they spend on real ones."""

import io

import numpy as np
from PIL import Image


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Random, with amplitudes that fall as 1 / frequency as in natural images, and colours that go mostly together."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))

    def plane() -> np.ndarray:
        return np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width))

    light = plane()
    pixels = np.stack([light + 0.35 * plane() for _ in "rgb"], axis=-1)
    return Image.fromarray((118 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def jpegs(count: int, width: int, height: int, *, quality: int = 90) -> list[bytes]:
    """Encoded photographs, each another. One of 500 x 375 px has about 117 kB; ImageNet's have 110 kB on average."""
    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        photograph(width, height, seed).save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files
