"""Files are absent or whole."""

import hashlib
import os

import pytest

from vlcp_dist.data import storage


def test_write_returns_the_digest_and_leaves_no_temporaries(tmp_path):
    path = tmp_path / "a" / "b.bin"
    assert storage.write(path, b"hello") == hashlib.sha256(b"hello").hexdigest()
    assert path.read_bytes() == b"hello"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


def test_write_copies_a_file(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    storage.write(tmp_path / "copy", source)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    storage.write(path, b"old")
    with pytest.raises(OSError):
        storage.write(path, tmp_path / "absent")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_old_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in (".old.tar.1234.tmp", ".young.tar.1234.tmp", "shard.tar"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"half")
    os.utime(tmp_path / "x" / ".old.tar.1234.tmp", (0, 0))
    storage.remove_temporaries(tmp_path)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {".young.tar.1234.tmp", "shard.tar"}
