"""A pack holds the bytes of the shards, in the index's order; shards that do not hold what they should are refused."""

import io

import numpy as np
import pytest

from vlcp_dist.data import packs, shards, storage

KEYS = [f"cat-{i}" for i in range(5)]


def latent(i: int, dtype: type = np.float16, side: int = 8) -> np.ndarray:
    return np.random.default_rng(i).normal(size=(4, side, side)).astype(dtype)


def tars(root, samples, cut=3):
    """Two tars of `samples`, {key: array}, in which another class comes first and a third one last."""
    named = {"bat-0": latent(90), **samples, "dog-0": latent(91)}
    parts = [(key, {"flip.npy": shards.to_npy(-z), "npy": shards.to_npy(z)}) for key, z in named.items()]
    paths = [root / "000000.tar", root / "000001.tar"]
    for path, part in zip(paths, (parts[:cut], parts[cut:]), strict=True):
        storage.write(path, shards.pack(part))
    return paths


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return tmp_path if request.param == "local" else storage.locate(request.getfixturevalue("bucket") + "/root")


def test_a_pack_is_what_the_shards_hold(root):
    samples = {key: latent(i) for i, key in enumerate(KEYS)}
    files = packs.build("cat", KEYS, tars(root, samples))
    for name, data in files.items():
        storage.write(root / name, data)
    keys, latents = packs.load(root, "cat")
    assert keys == KEYS
    assert isinstance(latents, np.memmap) and not latents.flags.writeable and latents.dtype == np.float16
    assert latents.tobytes() == np.stack(list(samples.values())).tobytes()
    array = next(data for name, data in files.items() if name.endswith(".npy"))
    np.testing.assert_array_equal(np.load(io.BytesIO(array), allow_pickle=False), latents)


def test_only_the_bytes_of_the_class_are_read(tmp_path):
    paths = tars(tmp_path, {key: latent(i) for i, key in enumerate(KEYS)})
    found = [key for path in paths for key, _ in shards.read(path, keys=set(KEYS[1:4]))]
    assert found == KEYS[1:4]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({key: latent(i) for i, key in enumerate(KEYS) if i != 3}, "hold cat-3 as the index says"),
        ({key: latent(i) for i, key in reversed(list(enumerate(KEYS)))}, "hold the order of its samples"),
        ({key: latent(i, side=8 if i else 4) for i, key in enumerate(KEYS)}, "cat-1 is float16"),
        ({key: latent(i, dtype=np.float32) for i, key in enumerate(KEYS)}, "cat-0 is float32"),
    ],
)
def test_shards_that_hold_something_else_are_refused(tmp_path, samples, words):
    paths = tars(tmp_path, samples)
    with pytest.raises(shards.ShardError, match=words):
        packs.build("cat", KEYS, paths)


def test_keys_and_array_that_do_not_go_together_are_refused(tmp_path):
    for name, data in packs.build("cat", KEYS, tars(tmp_path, {k: latent(i) for i, k in enumerate(KEYS)})).items():
        storage.write(tmp_path / name, data)
    for name, data in packs.build("cat", KEYS[1:], tars(tmp_path, {k: latent(1) for k in KEYS[1:]})).items():
        if name.endswith(".json"):
            storage.write(tmp_path / name, data)
    with pytest.raises(shards.ShardError, match="there are 4 keys"):
        packs.load(tmp_path, "cat")
