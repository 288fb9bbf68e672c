"""A checkpoint counts by its metadata, which is written last; only the newest are kept."""

import json

import pytest

from vlcp_dist.data import checkpoints, storage
from vlcp_dist.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "stage"


def save(folder, step, keep=2):
    source = folder.parent / "source"
    source.write_bytes(b"weights" * step)
    checkpoints.save(folder, step, {"a.bin": source, "b.bin": source}, {"workers": step}, keep=keep)


def test_the_newest_counts_and_older_ones_go(folder):
    assert checkpoints.newest(folder) is None
    for step in (1, 2, 10, 11):
        save(folder, step)
    found = checkpoints.newest(folder)
    assert found["step"] == 11 and found["workers"] == 11
    assert sorted(found["files"]) == ["checkpoint-00000011.a.bin", "checkpoint-00000011.b.bin"]
    assert {name[:19] for name in checkpoints.names(folder)} == {"checkpoint-00000010", "checkpoint-00000011"}
    assert len(checkpoints.names(folder)) == 6


def test_what_was_cut_short_does_not_count_and_is_cleared_up(folder, monkeypatch):
    save(folder, 1)
    write = storage.write

    def fail(path, content):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(storage, "write", fail)
        save(folder, 2)
    assert checkpoints.newest(folder)["step"] == 1
    save(folder, 3, keep=1)
    assert {name[:19] for name in checkpoints.names(folder)} == {"checkpoint-00000003"}


def test_metadata_goes_first_when_they_are_deleted(folder):
    save(folder, 1)
    save(folder, 2)
    assert [name.endswith(".json") for name in checkpoints.names(folder)] == [True, True] + [False] * 4


def test_a_file_that_was_cut_is_named(folder):
    save(folder, 1)
    (folder / "checkpoint-00000001.b.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000001\.b\.bin has 0 bytes.*says 7; delete .*00000001\.json"):
        checkpoints.newest(folder)
    metadata = json.loads((folder / "checkpoint-00000001.json").read_text())
    assert metadata["files"]["checkpoint-00000001.a.bin"]["bytes"] == 7


def test_an_object_store_holds_them_as_well(bucket):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    folder = storage.locate(f"{bucket}/stage")
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.write_bytes(b"weights")
        for step in (1, 2, 3):
            checkpoints.save(folder, step, {"a.bin": source}, {}, keep=1)
    assert checkpoints.newest(folder)["step"] == 3
    assert checkpoints.names(folder) == ["checkpoint-00000003.json", "checkpoint-00000003.a.bin"]
