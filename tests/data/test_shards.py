"""Tars are the same bytes each time, read back in order and by key, and refuse to be read when cut short."""

import io

import numpy as np
import pytest
import webdataset as wds

from vlcp_dist.data import shards, storage


def samples(n=7):
    rng = np.random.default_rng(0)
    return [
        (f"key_{i}", {"npy": shards.to_npy(rng.normal(size=(4, 8, 8)).astype(np.float16)), "txt": f"é {i}".encode()})
        for i in range(n)
    ]


def test_same_samples_same_bytes_and_readable_by_webdataset(tmp_path):
    data = shards.pack(samples())
    assert data == shards.pack(samples())
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    read = list(wds.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in read] == [key for key, _ in samples()]
    assert [s["txt"] for s in read] == [parts["txt"] for _, parts in samples()]
    assert list(shards.read(path)) == samples()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return tmp_path if request.param == "local" else storage.locate(request.getfixturevalue("bucket") + "/root")


def test_arrays_by_key_over_several_tars(root):
    for name, part in (("a", samples()[:3]), ("b", samples()[3:])):
        storage.write(root / f"{name}.tar", shards.pack(part))
    assert list(shards.read(root / "a.tar")) == samples()[:3]
    arrays = shards.Arrays(root / f"{name}.tar" for name in ("a", "b"))
    assert list(arrays) == [key for key, _ in samples()]
    for key, parts in samples():
        expected = np.load(io.BytesIO(parts["npy"]))
        assert arrays[key].dtype == np.float16
        np.testing.assert_array_equal(arrays[key], expected)
    with pytest.raises(KeyError):
        arrays["absent"]


def test_an_empty_shard_is_readable(tmp_path):
    (tmp_path / "a.tar").write_bytes(shards.pack([]))
    assert list(shards.read(tmp_path / "a.tar")) == []
    assert len(shards.Arrays([tmp_path / "a.tar"])) == 0


@pytest.mark.parametrize("keep", [0, 100, 700, 1400, 2600])
def test_a_cut_tar_is_refused_by_its_own_name(root, keep):
    path = root / "a.tar"
    storage.write(path, shards.pack(samples())[:keep])
    for read in (lambda: list(shards.read(path)), lambda: shards.Arrays([path])):
        with pytest.raises(shards.ShardError, match=rf"^{path}: .* delete {path} and run again"):
            read()


def test_objects_are_never_unpickled(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(shards.ShardError):
        shards.parse_npy(buffer.getvalue())
