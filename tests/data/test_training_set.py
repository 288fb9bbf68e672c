"""The inputs of a training: latents by place in the shards, mirrored ones, texts by row."""

import numpy as np
import pytest

from vlcp_dist.data import shards, training_set
from vlcp_dist.data.training_set import TrainingSet


@pytest.fixture
def latents():
    return np.random.default_rng(0).normal(size=(6, 4, 2, 2)).astype(np.float16)


@pytest.fixture
def made(tmp_path, latents):
    """Six samples in two shards; those of the first have a mirrored latent, one key has a dot after it."""
    columns = {name: [] for name in ("shard", "position", "offset", "size", "flipped", "text")}
    for number in range(2):
        samples = []
        for i in range(3 * number, 3 * number + 3):
            parts = {"npy": shards.to_npy(latents[i])}
            if number == 0:
                parts["flip.npy"] = shards.to_npy(latents[i, :, :, ::-1])
            samples.append((f"key-{i}", parts))
        path = tmp_path / f"{number}.tar"
        path.write_bytes(shards.pack(samples))
        found = training_set.places(path)
        assert list(found) == [f"key-{i}" for i in range(3 * number, 3 * number + 3)]
        for position, (key, place) in enumerate(found.items()):
            values = (number, position, *place, 1 + int(key[-1]) % 2)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    text = tmp_path / "local.npy"
    np.save(text, np.array([[0, 0], [1, 10], [2, 20]], np.uint16))
    columns = {name: np.array(column) for name, column in columns.items()}
    training_set.write(tmp_path / "out", ["0", "1"], columns, text, {"failed": []})
    return TrainingSet(tmp_path / "out", tmp_path)


def test_rows_are_read_from_where_they_lie(made, latents):
    rows = np.array([5, 0, 3, 0])
    assert len(made) == 6 and made.facts == {"failed": []}
    assert np.array_equal(made.latents(rows), latents[rows]) and made.latents(rows).dtype == np.float16
    assert made.text(rows).tolist() == [[2, 20], [1, 10], [2, 20], [1, 10]]
    assert made.text(rows, np.array([True, False, True, True])).tolist()[1] == [0, 0]
    assert [made.place(row) for row in (0, 4)] == [("0", 0), ("1", 1)]


def test_a_flip_is_the_mirrored_latent_where_there_is_one(made, latents):
    rows, flip = np.array([0, 1, 4]), np.array([True, False, True])
    got = made.latents(rows, flip)
    assert np.array_equal(got[0], latents[0, :, :, ::-1])
    assert np.array_equal(got[1:], latents[[1, 4]])


def test_a_shard_that_was_cut_is_named(tmp_path, latents):
    path = tmp_path / "cut.tar"
    path.write_bytes(shards.pack([("key", {"npy": shards.to_npy(latents[0])})])[:600])
    with pytest.raises(shards.ShardError, match=r"cut\.tar.*delete"):
        training_set.places(path)
