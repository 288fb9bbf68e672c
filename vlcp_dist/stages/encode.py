"""encode: the VAE latent of every training image, in one tar for each shard."""

import sys

import numpy as np
import torch

from vlcp_dist.config import Config, content
from vlcp_dist.data import shards
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.models.diffusion import encode_images, image_seed, load_vae
from vlcp_dist.stages.base import Encoded, Run, Stage, check_diffusion, device, dtype
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

    def read(self, unit: Unit) -> list[tuple[Row, Encoded]]:
        return self._run.read(self._run.index.shard(unit.name))

    def process(self, unit: Unit, data: list[tuple[Row, Encoded]]) -> Outcome:
        """`<shard>.tar` with `key.npy`: the posterior's mean (or a sample) times the scaling factor, fp16 (4, h, w)."""
        cfg = self._run.cfg.encode
        samples: list[tuple[str, dict[str, bytes]]] = []
        failed: list[Failure] = []
        for start in range(0, len(data), cfg.batch_size):
            good, images, bad = self._run.arrays(data[start : start + cfg.batch_size], cfg.image_size, crop=cfg.resize)
            failed += bad
            for row, z in self._encode(good, images, failed):
                samples.append((row.key, {"npy": shards.to_npy(z)}))
        info = {"dtype": dtype(self._run.cfg.diffusion.dtype)}
        return Outcome({f"{unit.name}.tar": shards.pack(samples)}, unit.size, failed, info)

    def _encode(self, rows: list[Row], images: list[np.ndarray], failed: list[Failure]) -> list[tuple[Row, np.ndarray]]:
        """Latents fp16; a batch that does not fit or holds a bad image is halved until what is wrong stands alone."""
        if not rows:
            return []
        pixels = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
        generators = None
        if self._run.cfg.encode.posterior == "sample":
            seeds = [image_seed(self._run.cfg.seed, row.key, 0, 0) for row in rows]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            latents = encode_images(self._vae, pixels, sample_generators=generators).cpu().numpy().astype(np.float16)
            return list(zip(rows, latents, strict=True))
        except FloatingPointError as error:
            if len(rows) == 1:
                failed.append(Failure(rows[0].key, str(error), rows[0].ref))
                return []
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            print(f"encode: out of CUDA memory at batch {len(rows)}, halving it", file=sys.stderr)
        half = len(rows) // 2
        return self._encode(rows[:half], images[:half], failed) + self._encode(rows[half:], images[half:], failed)


def _content(cfg: Config) -> object:
    return [content(cfg.encode), content(cfg.diffusion)]


STAGE = Stage(
    "encode",
    upstream=("index", "pretrain"),
    content=_content,
    units=units,
    worker=Worker,
    check=check_diffusion,
    reads_images=True,
)
