"""Files are absent or whole."""

import hashlib
import os
import subprocess
import sys

import pytest

from vlcp_dist.data import storage
from vlcp_dist.errors import InputError


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


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path):
    hold = (
        "import pathlib, sys; from vlcp_dist.data import storage\n"
        "with storage.exclusive(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"{tmp_path} is in use by process {holder.pid} on .* since 20"):
        storage.exclusive(path).__enter__()
    holder.kill()
    holder.communicate()
    with storage.exclusive(path):
        assert f"process {os.getpid()}" in path.read_text()


def test_old_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in (".old.tar.1234.tmp", ".young.tar.1234.tmp", "shard.tar"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"half")
    os.utime(tmp_path / "x" / ".old.tar.1234.tmp", (0, 0))
    storage.remove_temporaries(tmp_path)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {".young.tar.1234.tmp", "shard.tar"}
