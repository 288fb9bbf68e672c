"""Which samples, noise and timesteps make up each step of a training, for any number of processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

TIMESTEPS = 1000  # of Stable Diffusion's noise schedule
ORDER, STEP = 0, 1  # what a generator is for


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch, equally long in every process.

    `weights` are such that the mean over processes of `(weights * values).sum()` is the mean over the global batch.
    Where samples do not share out evenly, a repeated one of weight 0 fills up.
    """

    rows: np.ndarray  # int64 (b,)
    noise: torch.Tensor  # fp32 (b, *shape)
    timesteps: torch.Tensor  # int64 (b,)
    keep_text: torch.Tensor  # bool (b,)
    flip: torch.Tensor  # bool (b,)
    weights: torch.Tensor  # fp32 (b,)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The last batch of an epoch may be smaller."""
    return math.ceil(n / batch_size)


def batches(
    n: int, *, shape: tuple[int, ...], epochs: int, batch_size: int, text_dropout: float, seed: int,
    rank: int = 0, world: int = 1, start: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Global batches of `batch_size` samples from step `start` on, of which each process takes every `world`-th.

    Every sample comes once per epoch, for any number of processes, in an order that is shuffled over the whole set.
    Order, noise, timesteps, dropped texts and flips are functions of (seed, step) alone: a resumed run and a run on
    more or fewer processes see the same ones.
    """
    per_epoch = steps_per_epoch(n, batch_size)
    order = np.empty(0, np.int64)
    for step in range(start, epochs * per_epoch):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
            order = torch.randperm(n, generator=generator_of(seed, ORDER, epoch)).numpy()
        rows = order[position * batch_size : (position + 1) * batch_size]
        generator = generator_of(seed, STEP, step)
        noise = torch.randn(len(rows), *shape, generator=generator)
        timesteps = torch.randint(0, TIMESTEPS, (len(rows),), generator=generator)
        keep = torch.rand(len(rows), generator=generator) >= text_dropout
        flip = torch.rand(len(rows), generator=generator) < 0.5
        mine = torch.arange(rank, math.ceil(len(rows) / world) * world, world)
        weights = (mine < len(rows)) * (world / len(rows))
        mine = mine.where(mine < len(rows), torch.zeros_like(mine))
        yield Batch(rows[mine.numpy()], noise[mine], timesteps[mine], keep[mine], flip[mine], weights)


def generator_of(*seeds: int) -> torch.Generator:
    """A CPU generator seeded by several numbers."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
