"""Noise that is a function of seed, step and token."""

import torch

from vlcp_dist.ops.sampling import GumbelNoise, gumbel_noise


def noise(seeds, steps, vocabulary=50):
    return gumbel_noise(torch.tensor(seeds), torch.tensor(steps), vocabulary)


def test_a_row_does_not_depend_on_its_neighbours():
    together = noise([3, 5, 3], [0, 7, 1])
    assert torch.equal(together[1:2], noise([5], [7]))
    assert not torch.equal(together[0], together[2])  # another step
    assert not torch.equal(noise([3], [0]), noise([4], [0]))
    assert together.dtype == torch.float32 and together.isfinite().all()


def test_it_samples_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = (scores / 0.7 + noise([5] * 20_000, list(range(20_000)), 4)).argmax(1)
    frequency = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(frequency, (scores / 0.7).softmax(0), atol=0.015)


def test_steps_and_seeds_draw_independently():
    drawn = noise(list(range(200)), [0] * 200, 200) - 0.5772  # minus its mean
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1.2825) < 0.03
    correlated = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    along = torch.corrcoef(torch.stack([drawn[:, :-1].flatten(), drawn[:, 1:].flatten()]))[0, 1]
    assert abs(correlated) < 0.03 and abs(along) < 0.03


def test_the_processor_of_generate_counts_the_steps():
    processor = GumbelNoise(0.5, seeds=[8, 9])
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        ids = torch.zeros(2, 6 + step, dtype=torch.long)
        assert torch.equal(processor(ids, scores), scores / 0.5 + noise([8, 9], [step, step]))
