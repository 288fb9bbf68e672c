"""Batches are a function of (seed, step): every sample once an epoch, for any number of processes."""

import math

import numpy as np
import pytest
import torch

from vlcp_dist.ops.order import batches

SHAPE = (4, 2, 2)
SIZES = [(1, 1), (5, 2), (7, 3), (9, 4), (16, 8), (13, 6), (33, 32), (5, 50)]


def listed(n, batch_size, **changes):
    settings = {"shape": SHAPE, "epochs": 3, "text_dropout": 0.3, "seed": 5}
    return list(batches(n, batch_size=batch_size, **(settings | changes)))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_every_sample_comes_once_an_epoch(n, batch_size, world):
    ranks = [listed(n, batch_size, rank=rank, world=world) for rank in range(world)]
    steps = math.ceil(n / batch_size)
    assert {len(mine) for mine in ranks} == {3 * steps}
    for epoch in range(3):
        seen = [
            row
            for mine in ranks
            for batch in mine[epoch * steps : (epoch + 1) * steps]
            for row in batch.rows[batch.weights.numpy() > 0]
        ]
        assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_ranks_share_out_what_one_process_sees(n, batch_size, world):
    """Each sample keeps its noise, timestep, text and flip; the mean over ranks is the mean over the global batch."""
    value = torch.rand(n, generator=torch.Generator().manual_seed(0))
    parts = [listed(n, batch_size, rank=rank, world=world) for rank in range(world)]
    for alone, *shared in zip(listed(n, batch_size), *parts, strict=True):
        assert torch.allclose(alone.weights, torch.full((len(alone.rows),), 1 / len(alone.rows)))
        assert len({len(part.rows) for part in shared}) == 1  # every process takes part in every exchange
        where = {row: i for i, row in enumerate(alone.rows.tolist())}
        for part in shared:
            places = [where[row] for row in part.rows.tolist()]
            for name in ("noise", "timesteps", "keep_text", "flip"):
                assert torch.equal(getattr(part, name), getattr(alone, name)[places])
        mean = sum((part.weights * value[part.rows]).sum() for part in shared) / world
        assert mean == pytest.approx(value[alone.rows].mean().item(), rel=1e-5)


@pytest.mark.parametrize("start", [1, 3, 4, 11])
def test_a_later_start_sees_the_same_batches(start):
    expected, later = listed(13, 4)[start:], listed(13, 4, start=start)
    for a, b in zip(later, expected, strict=True):
        assert np.array_equal(a.rows, b.rows)
        for name in ("noise", "timesteps", "keep_text", "flip", "weights"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_order_and_noise_change_with_epoch_step_and_seed():
    steps = listed(64, 32)
    assert len({steps[i].rows.tobytes() for i in (0, 2, 4)}) == 3
    assert len({batch.noise.numpy().tobytes() for batch in steps}) == len(steps)
    assert len({batch.timesteps.numpy().tobytes() for batch in steps}) == len(steps)
    other = listed(64, 32, seed=6)
    assert other[0].rows.tolist() != steps[0].rows.tolist() and not torch.equal(other[0].noise, steps[0].noise)


def test_an_epoch_mixes_all_shards_from_the_start():
    """Shards are sorted by class: a batch of neighbours would be of one class."""
    first = listed(1000, 50, epochs=1)[0].rows // 100
    assert len(set(first.tolist())) >= 8


def test_noise_is_normal_timesteps_uniform_texts_dropped_and_images_flipped_by_their_share():
    steps = listed(1000, 500)
    noise = torch.cat([batch.noise for batch in steps])
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03
    times = torch.cat([batch.timesteps for batch in steps]).float()
    assert 0 <= times.min() < 10 and 990 <= times.max() < 1000 and abs(times.mean().item() - 499.5) < 25
    kept = torch.cat([batch.keep_text for batch in steps]).float().mean().item()
    assert kept == pytest.approx(0.7, abs=0.04)
    assert torch.cat([batch.flip for batch in steps]).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert all(batch.keep_text.all() for batch in listed(50, 8, text_dropout=0.0))
    assert not any(batch.keep_text.any() for batch in listed(50, 8, text_dropout=1.0))
