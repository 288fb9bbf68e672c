"""Files are absent or whole; of several creators one wins."""

import hashlib
import threading

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


def test_exactly_one_creator_wins(tmp_path):
    path, wins = tmp_path / "plan", []
    barrier = threading.Barrier(8)

    def create(i):
        barrier.wait()
        if storage.create(path, str(i).encode()):
            wins.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert path.read_bytes() == str(wins[0]).encode()


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".shard.tar.1234.tmp").write_bytes(b"half")
    (tmp_path / "x" / "shard.tar").write_bytes(b"whole")
    storage.remove_temporaries(tmp_path)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["shard.tar"]
