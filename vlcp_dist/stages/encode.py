"""encode: the VAE latent of every training image, in one tar for each shard."""

import numpy as np
import torch

from vlcp_dist.config import Config, content
from vlcp_dist.data import shards
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.models.diffusion import encode_images, load_vae
from vlcp_dist.stages.base import Run, Stage, device, dtype
from vlcp_dist.stages.caption import units


class Worker:
    def __init__(self, run: Run):
        self._run = run
        self._vae = load_vae(
            run.diffusion_model,
            revision=run.cfg.diffusion.revision,
            device=device(),
            dtype=getattr(torch, dtype(run.cfg.diffusion.dtype)),
        )

    def process(self, unit: Unit) -> Outcome:
        """`<shard>.tar` with `key.npy`: the posterior mean times the scaling factor, fp16 (4, h, w)."""
        cfg = self._run.cfg.encode
        samples = []
        failed = []
        rows = self._run.index.shards[unit.name]
        for start in range(0, len(rows), cfg.batch_size):
            batch = rows[start : start + cfg.batch_size]
            good, images, bad = self._run.images(batch, cfg.image_size, crop=cfg.resize)
            failed += bad
            if not good:
                continue
            pixels = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
            latents = encode_images(self._vae, pixels).cpu().numpy().astype(np.float16)
            samples += [(row.key, {"npy": shards.to_npy(z)}) for row, z in zip(good, latents, strict=True)]
        return Outcome({f"{unit.name}.tar": shards.pack(samples)}, unit.size, failed)


def _content(cfg: Config) -> object:
    return [content(cfg.encode), content(cfg.diffusion)]


STAGE = Stage("encode", upstream=("index", "pretrain"), content=_content, units=units, worker=Worker)
