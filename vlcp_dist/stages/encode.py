"""encode: the VAE latent of every training image, in one tar for each shard.

CPU threads decode ahead of the VAE, and on a GPU a batch is handed over before the latents of the one before it are
fetched: it never waits for Python.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from vlcp_dist.config import content
from vlcp_dist.data import shards
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.data.prefetch import Ahead
from vlcp_dist.models.diffusion import encode_images, image_seed, load_vae
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import Encoded, Run, Stage, check_diffusion, device, dtype
from vlcp_dist.stages.caption import units

Square = tuple[Row, np.ndarray | Failure]


@dataclass
class Shard:
    """What has been made of a shard so far. `at_once` images fit through the VAE."""

    at_once: int
    samples: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    in_float32: int = 0


@dataclass(frozen=True)
class Batch:
    """Images on their way: of each of `views`, uint8 (n, 3, size, size), the `latents`, fp16 (n, 4, h, w).

    Both are on the device, and on a GPU they may not have been computed yet.
    """

    rows: list[Row]
    views: list[torch.Tensor]
    latents: list[torch.Tensor]


class Worker:
    def __init__(self, run: Run):
        self._run = run
        self._cfg = run.cfg.encode
        self._dtype = precision(run.cfg)
        self._decoders = run.cfg.engine.placement("encode").cpus_per_worker
        self._vae = self._load(self._dtype)
        if self._cfg.compile:
            self._vae.encoder.compile()

    def read(self, unit: Unit) -> list[tuple[Row, Encoded]]:
        return self._run.read(self._run.index.shard(unit.name))

    def process(self, unit: Unit, data: list[tuple[Row, Encoded]]) -> Outcome:
        """`<shard>.tar` with `key.npy`: the posterior's mean (or a sample) times the scaling factor, fp16 (4, h, w).

        With `horizontal_flip` also `key.flip.npy`, that of the mirrored image.
        """
        shard = Shard(at_once=self._cfg.batch_size)
        before: Batch | None = None
        with Ahead(self._square, data, threads=self._decoders, most=2 * self._cfg.batch_size) as squares:
            for rows, pixels in self._batches(squares, shard):
                batch = self._start(rows, pixels, shard)
                if before:
                    self._finish(before, shard)
                before = batch
            if before:
                self._finish(before, shard)
        info = {"dtype": self._dtype, "redone_in_float32": shard.in_float32}
        files = {f"{unit.name}.tar": shards.pack(shard.samples)}
        return Outcome(files, unit.size, shard.failed, info, wait_seconds=squares.waited)

    def _batches(self, squares: Iterator[Square], shard: Shard) -> Iterator[tuple[list[Row], torch.Tensor]]:
        """Rows and their pixels, uint8 (n, 3, size, size), pinned where there is a GPU to copy them to."""
        size = self._cfg.image_size
        pinned = self._vae.device.type == "cuda"
        while group := list(islice(squares, self._cfg.batch_size)):
            shard.failed += [square for _, square in group if isinstance(square, Failure)]
            good = [(row, square) for row, square in group if isinstance(square, np.ndarray)]
            if good:
                pixels = torch.empty((len(good), 3, size, size), dtype=torch.uint8, pin_memory=pinned)
                np.stack([square for _, square in good], out=pixels.numpy())
                yield [row for row, _ in good], pixels

    def _square(self, item: tuple[Row, Encoded]) -> Square:
        row, data = item
        return row, self._run.square(row, data, self._cfg.image_size, crop=self._cfg.resize)

    def _start(self, rows: list[Row], pixels: torch.Tensor, shard: Shard) -> Batch:
        there = pixels.to(self._vae.device, non_blocking=True)
        views = [there, there.flip(-1)] if self._cfg.horizontal_flip else [there]
        return Batch(rows, views, [self._encode(rows, view, i, shard).half() for i, view in enumerate(views)])

    def _encode(self, rows: list[Row], pixels: torch.Tensor, repeat: int, shard: Shard) -> torch.Tensor:
        """Latents on the device. Where memory does not suffice, half as many images go through at once from then on.

        Raises:
            torch.OutOfMemoryError: a single image does not fit.
        """
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(rows):
            part = slice(start, start + shard.at_once)
            try:
                parts.append(self._through(self._vae, rows[part], pixels[part], repeat))
                start += shard.at_once
                continue
            except RuntimeError as error:
                tried = len(rows[part])
                if not _out_of_memory(error) or tried == 1:
                    raise
            # Outside the handler: there the exception still holds the batch's tensors.
            shard.at_once = tried // 2
            print(f"encode: out of memory at batch {tried}, going on at {shard.at_once}", file=sys.stderr)
            if pixels.is_cuda:
                torch.cuda.empty_cache()
        return torch.cat(parts)

    def _through(self, vae: Any, rows: list[Row], pixels: torch.Tensor, repeat: int) -> torch.Tensor:
        generators = None
        if self._cfg.posterior == "sample":
            seeds = [image_seed(self._run.cfg.seed, row.key, 0, repeat) for row in rows]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return encode_images(vae, pixels, sample_generators=generators)

    def _finish(self, batch: Batch, shard: Shard) -> None:
        """Fetch the latents of a batch; those that are not finite are computed again in float32, each by itself."""
        latents = [part.cpu() for part in batch.latents]
        finite = [part.flatten(1).isfinite().all(1).tolist() for part in latents]
        for i, row in enumerate(batch.rows):
            again = [repeat for repeat in range(len(latents)) if not finite[repeat][i]]
            if again and self._dtype != "float32":
                shard.in_float32 += 1
                for repeat in again:
                    pixels = batch.views[repeat][i : i + 1]
                    latents[repeat][i] = self._through(self._float32_vae, [row], pixels, repeat)[0].half().cpu()
            if all(part[i].isfinite().all() for part in latents):
                members = zip(("npy", "flip.npy"), (shards.to_npy(part[i].numpy()) for part in latents), strict=False)
                shard.samples.append((row.key, dict(members)))
            else:
                shard.failed.append(Failure(row.key, "its latent is not finite, not even in float32", row.ref))

    @cached_property
    def _float32_vae(self) -> Any:
        """Read from the files: in half precision the weights themselves may be what overflowed."""
        return self._load("float32")

    def _load(self, dtype: str) -> Any:
        run = self._run
        revision = run.cfg.diffusion.revision
        return load_vae(run.diffusion_model, revision=revision, device=device(), dtype=getattr(torch, dtype))


def precision(cfg: Config) -> str:
    """`auto` is float16 on a GPU: of as many bits it rounds an eighth as much as bfloat16, and overflow is mended."""
    name = cfg.diffusion.dtype
    return "float16" if name == "auto" and device() == "cuda" else dtype(name)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
    version=2,
)
