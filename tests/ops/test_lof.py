"""LOF against scikit-learn's: scores and, exactly, the outliers."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor

from vlcp_dist.ops.gram import gram
from vlcp_dist.ops.lof import inlier_mask, scores, usable_neighbors
from vlcp_dist.ops.neighbors import nearest


def local_outlier_factor(x: torch.Tensor, n_neighbors: int = 10) -> torch.Tensor:
    """Scores (n,) of the rows of `x`, as the stage makes them."""
    products = gram(x)
    return scores(*nearest(products, usable_neighbors(len(products), n_neighbors)))


def random_points(n: int, d: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """A few blobs of unequal density, a tenth of the points scattered, away from the origin."""
    rng = np.random.default_rng(seed)
    blob = rng.integers(0, 4, n)
    points = rng.normal(size=(4, d))[blob] * 2 + rng.normal(size=(n, d)) * (0.3 + 0.2 * blob)[:, None]
    points[::10] += rng.normal(size=points[::10].shape)
    return (points + 5).astype(dtype)


def doubled() -> np.ndarray:
    points = random_points(150, 40, seed=1)
    return np.concatenate([points, points])


def tripled_in_few_dimensions() -> np.ndarray:
    return np.repeat(random_points(100, 3, seed=2, dtype="float64"), 3, axis=0)


def few_copies_of_some() -> np.ndarray:
    points = random_points(200, 33, seed=3)
    points[50:58] = points[5]
    points[100] = points[101]
    return points


def tight_clumps_far_apart() -> np.ndarray:
    """Distances so small beside the points' norms that products in float32 would misorder the neighbours."""
    rng = np.random.default_rng(13)
    clumps = 100 * rng.normal(size=(3, 30)) / np.sqrt(30)
    return (clumps[np.arange(300) % 3] + 0.02 * rng.normal(size=(300, 30))).astype("float32")


CASES = {
    "class": random_points(1300, 256),
    "small": random_points(60, 16, seed=4),
    "plane": random_points(400, 2, seed=5, dtype="float64"),
    "more dimensions than points": random_points(80, 1000, seed=6),
    "doubled": doubled(),
    "tripled": tripled_in_few_dimensions(),
    "few copies": few_copies_of_some(),
    "clumps": tight_clumps_far_apart(),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_and_outliers_are_those_of_scikit_learn(name: str) -> None:
    points = CASES[name]
    reference = LocalOutlierFactor(n_neighbors=10).fit(points)

    scores = local_outlier_factor(torch.from_numpy(points), n_neighbors=10)

    np.testing.assert_allclose(scores.numpy(), -reference.negative_outlier_factor_, rtol=1e-5)
    assert inlier_mask(scores, 0.0).all()
    for contamination in (0.05, 0.1, 0.3, 0.5):
        expected = LocalOutlierFactor(n_neighbors=10, contamination=contamination).fit_predict(points) == 1
        np.testing.assert_array_equal(inlier_mask(scores, contamination).numpy(), expected)


@pytest.mark.filterwarnings("ignore:Duplicate values")  # scikit-learn's word on scores of 1e7 beside duplicates
def test_more_duplicates_than_neighbors() -> None:
    # The reference is told to measure distances directly: from products, duplicates get noise for a distance.
    points = random_points(200, 20, seed=7, dtype="float64")
    points[40:70] = points[3]
    reference = LocalOutlierFactor(n_neighbors=10, algorithm="kd_tree", contamination=0.1)
    expected = reference.fit_predict(points) == 1

    scores = local_outlier_factor(torch.from_numpy(points))

    np.testing.assert_allclose(scores.numpy(), -reference.negative_outlier_factor_, rtol=1e-5)
    np.testing.assert_array_equal(inlier_mask(scores, 0.1).numpy(), expected)
    assert torch.equal(scores[40:70], torch.ones(30, dtype=torch.float64))


def test_all_points_identical_are_all_inliers() -> None:
    scores = local_outlier_factor(torch.full((25, 7), 0.1))
    assert torch.equal(scores, torch.ones(25, dtype=torch.float64))
    assert inlier_mask(scores, 0.3).all()


def test_duplicates_get_the_same_score() -> None:
    points = torch.from_numpy(random_points(300, 129, seed=8))
    scores = local_outlier_factor(torch.cat([points, points]))
    assert torch.equal(scores[:300], scores[300:])


def test_common_offset_does_not_matter() -> None:
    points = torch.from_numpy(random_points(200, 32, dtype="float64")).mul(256).round() / 256
    shifted = points + 2.0**32  # exact in float64
    torch.testing.assert_close(local_outlier_factor(shifted), local_outlier_factor(points))


def test_blocks_of_queries_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.from_numpy(random_points(101, 24, seed=9))
    whole = local_outlier_factor(points)
    monkeypatch.setattr("vlcp_dist.ops.neighbors._QUERY_ROWS", 17)
    monkeypatch.setattr("vlcp_dist.ops.neighbors._DIFFERENCE_ELEMENTS", 1)
    torch.testing.assert_close(local_outlier_factor(points), whole)


@pytest.mark.parametrize("n_neighbors", [12, 13, 50])
def test_more_neighbors_than_points_uses_all_and_says_so(n_neighbors: int) -> None:
    points = random_points(12, 5, seed=10)
    with pytest.warns(UserWarning, match=r"12 points: using 11"):
        scores = local_outlier_factor(torch.from_numpy(points), n_neighbors=n_neighbors)
    reference = LocalOutlierFactor(n_neighbors=11).fit(points)
    np.testing.assert_allclose(scores.numpy(), -reference.negative_outlier_factor_, rtol=1e-5)


def test_half_precision_input_is_measured_in_full() -> None:
    points = torch.from_numpy(random_points(100, 64, seed=11)).half()
    assert torch.equal(local_outlier_factor(points), local_outlier_factor(points.float()))


def test_offset_tie_stays_in() -> None:
    # The 20th percentile of these eleven is exactly the second largest, which is held three times.
    scores = torch.tensor([1.0, 9.0, 1.1, 5.0, 5.0, 5.0, 1.0, 1.2, 1.0, 1.3, 1.0])
    assert (~inlier_mask(scores, 0.2)).nonzero().flatten().tolist() == [1]


def test_input_is_left_alone() -> None:
    points = torch.from_numpy(random_points(30, 4, seed=12, dtype="float64"))
    before = points.clone()
    local_outlier_factor(points)
    assert torch.equal(points, before)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        local_outlier_factor(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="n_neighbors"):
        local_outlier_factor(torch.rand(5, 3), n_neighbors=0)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        local_outlier_factor(torch.zeros(5, 4, 8, 8))
    points = torch.rand(20, 3)
    points[7, 1], points[9, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"2 of 20 points .* row 7"):
        local_outlier_factor(points)
    for contamination in (-0.1, 0.51, float("nan")):
        with pytest.raises(ValueError, match="contamination"):
            inlier_mask(torch.rand(5), contamination)
