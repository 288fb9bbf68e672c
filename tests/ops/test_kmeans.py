"""K-means: against scikit-learn's inertia, and the promises about centres, labels and order."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from vlcp_dist.ops.gram import gram
from vlcp_dist.ops.kmeans import KMeansResult, check_clusters, summarize
from vlcp_dist.ops.lloyd import fill_empty, lloyd


def kmeans(x: torch.Tensor, k: int, *, seed: int, n_init: int = 10, max_iter: int = 300) -> KMeansResult:
    """The clusters of the rows of `x`, as the stage makes them."""
    check_clusters(len(x), k, n_init, max_iter)
    return summarize(x, lloyd([gram(x)], k, seed=seed, n_init=n_init, max_iter=max_iter)[0], k)


def blobs(n: int, d: int, n_blobs: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centers = spread * rng.normal(size=(n_blobs, d))
    points = centers[rng.integers(0, n_blobs, n)] + rng.normal(size=(n, d))
    return torch.from_numpy(points.astype(np.float32))


def test_inertia_is_that_of_scikit_learn() -> None:
    ratios = []
    for seed, (n, d, k) in enumerate(
        [(300, 2, 10), (300, 16, 5), (200, 600, 10), (500, 8, 30), (150, 300, 50), (400, 64, 10)] * 2
    ):
        points = blobs(n, d, n_blobs=12, seed=seed, spread=3.0 * (seed % 2))
        reference = KMeans(k, init="k-means++", n_init=10, random_state=seed).fit(points.numpy())
        ratios.append(kmeans(points, k, seed=seed).inertia / reference.inertia_)
    assert max(ratios) < 1.02
    assert np.mean(ratios) < 1.005


def test_finds_well_separated_blobs() -> None:
    points = blobs(200, 50, n_blobs=6, seed=0, spread=10)
    truth = (torch.cdist(points, points) < 30).int().argmax(dim=1)  # the first point of the same blob
    labels = kmeans(points, 6, seed=0).labels
    assert torch.equal(labels[truth], labels)
    assert len(labels.unique()) == len(truth.unique()) == 6


@pytest.mark.parametrize(("n", "d", "k"), [(120, 10, 7), (90, 700, 7), (64, 64, 20), (40, 5000, 3)])
def test_centers_labels_and_inertia_fit_each_other(n: int, d: int, k: int) -> None:
    points = blobs(n, d, n_blobs=5, seed=1, spread=0.5) + 100
    result = kmeans(points, k, seed=3)

    assert result.centers.dtype == torch.float32 and result.centers.shape == (k, d)
    assert result.labels.dtype == torch.int64 and result.labels.shape == (n,)
    for cluster in range(k):
        members = points[result.labels == cluster].double()
        torch.testing.assert_close(result.centers[cluster], members.mean(dim=0).float())
    distances = torch.cdist(points.double(), result.centers.double())
    assert torch.equal(distances.argmin(dim=1), result.labels)
    assert torch.equal(distances.argmin(dim=0), result.nearest)
    assert result.inertia == pytest.approx(float(distances.min(dim=1).values.square().sum()), rel=1e-6)


@pytest.mark.parametrize("d", [8, 200])
def test_common_offset_does_not_matter(d: int) -> None:
    points = (blobs(100, d, n_blobs=4, seed=11, spread=0.3).double() * 256).round() / 256
    shifted = points + 2.0**28  # exact in float64, but not in the float32 of the centres, which then coincide
    with pytest.warns(UserWarning, match="distinct"):
        result = kmeans(shifted, 6, seed=0)
    assert torch.equal(result.labels, kmeans(points, 6, seed=0).labels)


def test_empty_clusters_take_the_farthest_points_without_emptying_others() -> None:
    labels = torch.tensor([0, 2, 0, 0, 2, 4])
    to_own = torch.tensor([1.0, 5.0, 0.0, 7.0, 6.0, 9.0])
    # Point 5 is alone in its cluster; 3 and 4 are the farthest of the others.
    assert fill_empty(labels, to_own, 5).tolist() == [0, 2, 0, 1, 3, 4]


def test_both_ways_to_hold_the_inner_products_agree() -> None:
    # Padding with zeros changes no distance, but takes the points from fewer to more dimensions than points.
    points = blobs(80, 20, n_blobs=5, seed=2, spread=1)
    narrow = kmeans(points, 6, seed=0)
    wide = kmeans(torch.nn.functional.pad(points, (0, 100)), 6, seed=0)
    assert torch.equal(narrow.labels, wide.labels)
    torch.testing.assert_close(narrow.centers, wide.centers[:, :20])
    assert narrow.inertia == pytest.approx(wide.inertia)


def test_blocks_of_columns_and_groups_of_starts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(30, 100, n_blobs=4, seed=3)
    whole = kmeans(points, 4, seed=0)
    for name, value in (("gram.BLOCK_COLUMNS", 7), ("gram.BLOCK_ROWS", 11), ("kmeans.BLOCK_COLUMNS", 9)):
        monkeypatch.setattr(f"vlcp_dist.ops.{name}", value)
    monkeypatch.setattr("vlcp_dist.ops.lloyd._ELEMENTS", 3 * 30 * 4)  # three of ten starts at a time
    blocked = kmeans(points, 4, seed=0)
    assert torch.equal(blocked.labels, whole.labels)
    torch.testing.assert_close(blocked.centers, whole.centers)
    assert blocked.inertia == pytest.approx(whole.inertia)


def test_same_seed_same_bytes_whatever_the_global_state() -> None:
    points = blobs(150, 40, n_blobs=3, seed=4, spread=0)
    torch.manual_seed(1)
    first = kmeans(points, 9, seed=5)
    torch.manual_seed(2)
    second = kmeans(points, 9, seed=5)
    assert torch.equal(first.centers, second.centers) and torch.equal(first.labels, second.labels)
    assert first.inertia == second.inertia
    assert kmeans(points, 9, seed=6, n_init=1).inertia != kmeans(points, 9, seed=5, n_init=1).inertia


def test_more_starts_are_never_worse() -> None:
    points = blobs(200, 10, n_blobs=3, seed=5, spread=0)
    inertias = [kmeans(points, 20, seed=0, n_init=n).inertia for n in (1, 2, 5, 10)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_clusters_come_in_order_of_size_then_first_member() -> None:
    points = torch.tensor([[5.0], [5.1], [0.0], [9.0], [0.1], [9.1], [9.2], [-5.0]])
    labels = kmeans(points, 4, seed=0).labels
    assert labels.tolist() == [1, 1, 2, 0, 2, 0, 0, 3]


def test_one_cluster_and_one_cluster_each() -> None:
    points = blobs(12, 30, n_blobs=2, seed=6)
    whole = kmeans(points, 1, seed=0)
    torch.testing.assert_close(whole.centers[0], points.mean(dim=0))
    each = kmeans(points, 12, seed=0)
    assert each.labels.tolist() == list(range(12))
    assert torch.equal(each.centers, points) and each.inertia == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("d", [2, 40])
def test_identical_points_fill_every_cluster_and_say_so(d: int) -> None:
    points = torch.full((15, d), 0.1)
    with pytest.warns(UserWarning, match="fewer than k=4 distinct points"):
        result = kmeans(points, 4, seed=0)
    assert torch.bincount(result.labels, minlength=4).tolist() == [12, 1, 1, 1]
    assert torch.equal(result.centers, points[:4]) and result.inertia == 0


def test_fewer_distinct_points_than_clusters() -> None:
    points = blobs(3, 6, n_blobs=3, seed=7).repeat(5, 1)
    with pytest.warns(UserWarning, match="distinct"):
        result = kmeans(points, 5, seed=0)
    assert result.inertia == pytest.approx(0, abs=1e-9)
    assert torch.bincount(result.labels, minlength=5).min() >= 1


def test_distinct_points_beside_many_duplicates_get_their_own_center() -> None:
    # Far outliers and 200 copies: Lloyd from a poor start would leave clusters empty.
    points = torch.cat([torch.zeros(200, 3), 100 * torch.eye(3), -100 * torch.eye(3)])
    assert kmeans(points, 7, seed=0).inertia == 0


def test_half_precision_input() -> None:
    points = blobs(50, 200, n_blobs=4, seed=8).half()
    result, full = kmeans(points, 4, seed=0), kmeans(points.float(), 4, seed=0)
    assert result.centers.dtype == torch.float32
    assert torch.equal(result.centers, full.centers)


def test_one_step_is_fewer_than_many() -> None:
    points = blobs(300, 5, n_blobs=3, seed=9, spread=0)
    stopped = kmeans(points, 10, seed=0, n_init=1, max_iter=1)
    assert stopped.inertia > kmeans(points, 10, seed=0, n_init=1).inertia


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="k=6, n=5"):
        kmeans(torch.rand(5, 2), 6, seed=0)
    with pytest.raises(ValueError, match="k=0"):
        kmeans(torch.rand(5, 2), 0, seed=0)
    with pytest.raises(ValueError, match="n_init"):
        kmeans(torch.rand(5, 2), 2, seed=0, n_init=0)
    with pytest.raises(ValueError, match="row 3"):
        kmeans(torch.tensor([[0.0], [1.0], [2.0], [float("nan")]]), 2, seed=0)
