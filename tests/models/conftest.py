"""A tiny Stable Diffusion folder for the tests of what is built on one."""

from pathlib import Path

import numpy as np
import pytest

from vlcp_dist.models.tiny_sd import build_tiny_sd


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16), dtype=np.uint8)
    texts = [f"a {'wide' if i % 2 else 'narrow'} digit, number {i}" for i in range(32)]
    sizes = {"vae_channels": (8, 8, 8), "unet_channels": (8, 16), "num_threads": 1}
    build_tiny_sd(path, images, texts, vae_steps=4, contrastive_steps=3, **sizes)  # type: ignore[arg-type]
    return path
