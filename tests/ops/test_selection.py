"""The selection baselines against plain numpy readings of their definitions."""

import numpy as np
import pytest
import torch

from vlcp_dist.ops.selection import herding, k_center_greedy, random_subset


def points(n: int = 60, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)) + 3)


def plain_k_center(x: np.ndarray, m: int) -> list[int]:
    chosen = [int(np.argmin(np.linalg.norm(x - x.mean(0), axis=1)))]
    while len(chosen) < m:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(np.linalg.norm(x[i] - x[c]) for c in chosen)))
    return chosen


def plain_herding(x: np.ndarray, m: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < m:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: np.linalg.norm(x[[*chosen, i]].mean(0) - x.mean(0))))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_against_plain_readings(seed: int) -> None:
    x = points(seed=seed)
    assert k_center_greedy(x, 20).tolist() == plain_k_center(x.numpy(), 20)
    assert herding(x, 20).tolist() == plain_herding(x.numpy(), 20)


@pytest.mark.parametrize("select", [k_center_greedy, herding])
def test_selecting_all_and_duplicates(select) -> None:
    x = points(n=10).repeat(3, 1)
    chosen = select(x, 30)
    assert chosen.dtype == torch.int64
    assert sorted(chosen.tolist()) == list(range(30))
    assert torch.equal(select(x, 7), chosen[:7])


@pytest.mark.parametrize("select", [k_center_greedy, herding])
def test_ties_go_to_the_smaller_index(select) -> None:
    assert select(torch.ones(6, 3), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_k_center_takes_the_farthest_first() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [-10.0], [4.0]])
    # The mean is 1; then 10 and -10 are 9 and 11 away; then 10; then 4 is 3 from 1.
    assert k_center_greedy(x, 4).tolist() == [1, 3, 2, 4]


def test_random_subset() -> None:
    chosen = random_subset(100, 30, seed=4)
    assert chosen.dtype == torch.int64 and len(set(chosen.tolist())) == 30
    assert set(chosen.tolist()) <= set(range(100))
    torch.manual_seed(0)
    assert torch.equal(random_subset(100, 30, seed=4), chosen)
    assert torch.equal(random_subset(100, 50, seed=4)[:30], chosen)
    assert not torch.equal(random_subset(100, 30, seed=5), chosen)
    assert sorted(random_subset(100, 100, seed=0).tolist()) == list(range(100))


def test_half_precision_and_input_left_alone() -> None:
    x = points(d=40).half()
    before = x.clone()
    for select in (k_center_greedy, herding):
        assert torch.equal(select(x, 15), select(x.float(), 15))
    assert torch.equal(x, before)


@pytest.mark.parametrize("m", [0, 7])
def test_bad_counts(m: int) -> None:
    for call in (
        lambda: random_subset(6, m, seed=0),
        lambda: k_center_greedy(torch.rand(6, 2), m),
        lambda: herding(torch.rand(6, 2), m),
    ):
        with pytest.raises(ValueError, match=f"m={m} of n=6"):
            call()


def test_non_finite_points() -> None:
    x = torch.rand(6, 2)
    x[4, 0] = torch.inf
    for select in (k_center_greedy, herding):
        with pytest.raises(ValueError, match="row 4"):
            select(x, 2)
