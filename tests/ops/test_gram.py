"""One matrix of inner products: distances, coordinates and neighbours from it are those of the points."""

import pytest
import torch

from vlcp_dist.ops.gram import coordinates, gram
from vlcp_dist.ops.neighbors import nearest, nearest_of


def points(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) + 3


@pytest.mark.parametrize("shape", [(40, 300), (60, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_distances_are_those_of_the_points(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = points(*shape).to(dtype)
    products = gram(x)
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = products.sq_distances(torch.arange(len(x)))
    torch.testing.assert_close(found, expected.square(), atol=1e-9, rtol=1e-9)
    rows = torch.tensor([5, 2, 30])
    torch.testing.assert_close(products.subset(rows).sq_distances(torch.arange(3)), found[rows][:, rows])


@pytest.mark.parametrize("shape", [(40, 300), (60, 7)])
def test_coordinates_keep_every_distance_in_as_few_dimensions_as_points(shape: tuple[int, int]) -> None:
    x = points(*shape)
    x[3] = x[4]  # a Gram matrix that no Cholesky factor without a shift has
    turned = coordinates(gram(x))
    assert turned.shape == (shape[0], min(shape)) and turned.dtype == torch.float32
    expected = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    found = torch.cdist(turned, turned, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def test_neighbours_of_candidates_pass_over_self_and_gaps() -> None:
    products = gram(points(30, 100))
    distances, indices = nearest(products, 4)
    others = torch.arange(30).expand(30, 30)
    padded = torch.cat([torch.full((30, 2), -1), others.flip(1)], dim=1)
    torch.testing.assert_close(nearest_of(products, padded, 4), (distances, indices))


def test_what_float32_cannot_tell_apart_is_measured() -> None:
    """Points a millionth of their norm apart, whose order inner products in float32 would lose."""
    x = torch.ones(12, 50, dtype=torch.float64) * 1000
    x[:, 0] += torch.arange(12) ** 2 * 1e-3
    distances, indices = nearest(gram(x), 2)
    assert indices[0].tolist() == [1, 2] and indices[5].tolist() == [4, 6] and indices[11].tolist() == [10, 9]
    torch.testing.assert_close(distances[5], torch.tensor([9e-3, 11e-3], dtype=torch.float64), rtol=1e-6, atol=0)


def test_ties_go_to_the_smaller_index() -> None:
    x = 5 * torch.eye(20)  # all at the same distance
    distances, indices = nearest(gram(x), 3)
    assert indices[0].tolist() == [1, 2, 3] and indices[19].tolist() == [0, 1, 2]
    torch.testing.assert_close(distances, torch.full((20, 3), 50.0, dtype=torch.float64).sqrt())
