"""Every backend against scikit-learn: the same outliers, as little inertia, and what the interface promises."""

import io
import os
import tarfile
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.neighbors import LocalOutlierFactor

from vlcp_dist.ops import backends
from vlcp_dist.ops.kmeans import summarize
from vlcp_dist.ops.lof import inlier_mask, scores

CONTAMINATIONS = (0.0, 0.05, 0.1, 0.3)
CIFAR = Path(os.environ.get("VLCP_CIFAR_MINI", Path(__file__).parents[3] / "shared/data/cifar10-mini"))


@pytest.fixture(params=["torch", "torch on a GPU", "faiss", "cuml", "sklearn"], scope="module")
def backend(request):
    """(module, device) of a backend whose library and hardware are here."""
    name, _, gpu = request.param.partition(" on ")
    if (gpu or name == "cuml") and not torch.cuda.is_available():
        pytest.skip(f"{request.param}: not run, there is no GPU")
    if name in ("faiss", "cuml") and find_spec(name) is None:
        pytest.skip(f"{request.param}: not run, {name} is not installed")
    return backends.load(name), "cuda" if gpu or name == "cuml" else "cpu"


def latents(n: int, d: int, seed: int, groups: int = 6) -> np.ndarray:
    """As a class's latents are: a few directions that matter, away from the origin, groups, noise, stray points."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(12, d)) / np.sqrt(12)
    points = rng.normal(size=(groups, 12))[rng.integers(0, groups, n)] + 0.5 * rng.normal(size=(n, 12))
    points[::15] *= 2
    return (points @ basis + 0.3 * rng.normal(size=(n, d)) + 0.5).astype("float32")


def with_duplicates() -> np.ndarray:
    points = latents(200, 120, seed=1)
    points[150:] = points[:50]
    points[20:24] = points[10]
    return points


def with_ties() -> np.ndarray:
    """Corners of a simplex, all at the same distance from each other, and points farther out."""
    points = 3 * np.eye(120, dtype="float32")
    points[::9] *= np.linspace(1.5, 3, len(points[::9]), dtype="float32")[:, None]
    return points


@cache
def cifar() -> np.ndarray:
    """Latents (n, 256) of images of CIFAR-10's first class, by an autoencoder of Stable Diffusion's kind."""
    if not CIFAR.is_dir():
        pytest.skip(f"not run: no CIFAR-10 sample at {CIFAR}; set VLCP_CIFAR_MINI to its folder")
    pixels = []
    with tarfile.open(CIFAR / "train-00000.tar") as tar:
        parts = {member.name: tar.extractfile(member).read() for member in tar.getmembers() if member.isfile()}
    for name, data in parts.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in ("png", "jpg", "webp") and parts[f"{stem}.cls"].strip() == b"0":
            image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype="float32")
            pixels.append(torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1)
    assert len(pixels) > 50
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), norm_num_groups=8,
    )  # fmt: skip
    with torch.no_grad():
        return vae.encode(torch.stack(pixels)).latent_dist.mean.flatten(1).numpy()


CASES = {
    "more numbers than points": lambda: latents(150, 600, seed=0),
    "more points than numbers": lambda: latents(400, 40, seed=0),
    "duplicates": with_duplicates,
    "ties": with_ties,
    "digits": lambda: load_digits().data[load_digits().target == 8].astype("float32"),
    "cifar": cifar,
}


@pytest.mark.parametrize("case", CASES)
def test_outliers_are_those_of_scikit_learn(backend, case: str) -> None:
    module, device = backend
    points = CASES[case]()
    reference = LocalOutlierFactor(n_neighbors=10).fit(points)

    distances, neighbors = module.neighbors(module.prepare(torch.from_numpy(points).to(device)), 10)
    found = scores(distances, neighbors)

    assert not (neighbors.cpu() == torch.arange(len(points))[:, None]).any()
    np.testing.assert_allclose(found.cpu().numpy(), -reference.negative_outlier_factor_, rtol=1e-4)
    for contamination in CONTAMINATIONS:
        expected = np.ones(len(points), dtype=bool)
        if contamination:
            flags = LocalOutlierFactor(n_neighbors=10, contamination=contamination).fit_predict(points)
            expected = flags == 1
        np.testing.assert_array_equal(inlier_mask(found, contamination).cpu().numpy(), expected)


@pytest.fixture(scope="module")
def fifty_classes() -> tuple[list[np.ndarray], list[int], list[float]]:
    """Fifty classes, a k for each, and the inertia of scikit-learn's best of ten starts."""
    classes = [latents(60 + seed, 30 + 3 * seed, seed=seed, groups=3 + seed % 7) for seed in range(50)]
    ks = [5 if seed % 2 else 10 for seed in range(50)]
    best = [KMeans(k, n_init=10, random_state=1).fit(points).inertia_ for points, k in zip(classes, ks, strict=True)]
    return classes, ks, best


def test_inertia_is_that_of_scikit_learn_over_fifty_classes(backend, fifty_classes) -> None:
    module, device = backend
    ratios = []
    for points, k, best in zip(*fifty_classes, strict=True):
        x = torch.from_numpy(points).to(device)
        (labels,) = module.cluster([module.prepare(x)], k, seed=0, n_init=10, max_iter=300)
        assert labels.dtype == torch.int64 and sorted(set(labels.tolist())) == list(range(k))
        ratios.append(summarize(x, labels.to(x.device), k).inertia / best)
    assert np.mean(ratios) <= 1.005


def test_the_same_seed_gives_the_same_clusters_alone_or_beside_others(backend) -> None:
    module, device = backend
    classes = [module.prepare(torch.from_numpy(latents(n, 200, seed=n)).to(device)) for n in (70, 90, 40)]
    together = module.cluster(classes, 8, seed=3, n_init=3, max_iter=100)
    alone = [module.cluster([points], 8, seed=3, n_init=3, max_iter=100)[0] for points in classes]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_a_subset_is_what_it_would_be_prepared_alone(backend) -> None:
    module, device = backend
    x = torch.from_numpy(latents(120, 300, seed=5)).to(device)
    rows = torch.arange(0, 120, 2, device=device)
    part, anew = module.subset(module.prepare(x), rows), module.prepare(x[rows])
    torch.testing.assert_close(module.neighbors(part, 5), module.neighbors(anew, 5))
    inertias = [
        summarize(x[rows], module.cluster([points], 4, seed=0, n_init=10, max_iter=300)[0].to(device), 4).inertia
        for points in (part, anew)
    ]
    assert inertias[0] == pytest.approx(inertias[1], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # scikit-learn's word on it
def test_identical_latents(backend) -> None:
    module, device = backend
    points = module.prepare(torch.full((25, 40), 0.1, device=device))
    factors = scores(*module.neighbors(points, 10))
    torch.testing.assert_close(factors.cpu(), torch.ones(25, dtype=torch.float64))
    if module is not backends.load("sklearn"):  # which leaves clusters empty, and says so
        (labels,) = module.cluster([points], 4, seed=0, n_init=2, max_iter=10)
        assert sorted(set(labels.tolist())) == [0, 1, 2, 3]


def test_non_finite_points_are_named(backend) -> None:
    module, device = backend
    for shape in ((30, 50), (50, 30)):
        x = torch.rand(shape, device=device)
        x[7, 3], x[9, 0] = torch.nan, torch.inf
        with pytest.raises(ValueError, match=f"2 of {shape[0]} points .* row 7"):
            module.prepare(x)


@pytest.mark.parametrize("library", ["faiss", "cuml"])
def test_a_library_that_is_missing_is_named_with_the_way_to_install_it(library: str, monkeypatch) -> None:
    monkeypatch.setattr("vlcp_dist.ops.backends.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"backend={library} needs the package {library}.*vlcp-dist\[gpu\]"):
        backends.load(library)


@pytest.mark.parametrize("name", ["torch", "sklearn"])
def test_mini_batches_come_close_to_scikit_learns(name: str) -> None:
    module = backends.load(name)
    ratios = []
    for seed in range(6):
        points = latents(700, 60, seed=seed)
        reference = MiniBatchKMeans(12, n_init=3, random_state=seed).fit(points)
        x = torch.from_numpy(points)
        (labels,) = module.cluster([module.prepare(x)], 12, seed=seed, n_init=3, max_iter=100, algorithm="minibatch")
        assert sorted(set(labels.tolist())) == list(range(12))
        ratios.append(
            summarize(x, labels, 12).inertia / summarize(x, torch.from_numpy(reference.labels_).long(), 12).inertia
        )
    assert np.mean(ratios) < 1.02


def test_nested_starts_keep_what_was_there() -> None:
    """On well separated groups the larger clustering splits the smaller one's clusters, and none of them moves."""
    module = backends.load("torch")
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.repeat(50 * rng.normal(size=(4, 300)), 30, axis=0) + rng.normal(size=(120, 300)))
    points = [module.prepare(x), module.prepare(x.flip(0))]
    small = module.cluster(points, 4, seed=0, n_init=5, max_iter=100)
    large = module.cluster(points, 6, seed=0, n_init=5, max_iter=100, within=small)
    for a, b in zip(small, large, strict=True):
        assert all(len(set(a[b == c].tolist())) == 1 for c in range(6))
        plain = module.cluster(points[:1], 6, seed=0, n_init=5, max_iter=100)[0]
        assert torch.bincount(b).min() > 0 and len(plain) == len(b)


def test_warnings_of_the_libraries_stay_out_of_ordinary_classes(backend) -> None:
    module, device = backend
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.cluster([module.prepare(torch.rand(50, 20, device=device))], 5, seed=0, n_init=2, max_iter=50)
