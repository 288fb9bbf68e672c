"""Files are absent or whole, on a disk and on an object store."""

import errno
import fcntl
import hashlib
import os
import pickle
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3fs import S3FileSystem

import s3
from vlcp_dist.data import cache, locks, objects, storage
from vlcp_dist.errors import InputError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """An empty root on a disk, and one on an object store."""
    if request.param == "local":
        return storage.locate(str(tmp_path / "root"))
    return storage.locate(request.getfixturevalue("bucket") + "/root")


@pytest.fixture
def remote(bucket):
    return storage.locate(f"{bucket}/root")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def python(script: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_locations_are_absolute_and_can_be_sent_to_other_machines(tmp_path, monkeypatch, remote):
    monkeypatch.chdir(tmp_path)
    assert storage.locate("a/../b") == storage.locate(f"file://{tmp_path}/b") == tmp_path / "b"
    assert pickle.loads(pickle.dumps(remote)) == remote
    assert pickle.loads(pickle.dumps(remote)).fs.config_kwargs == objects.S3_OPTIONS["config_kwargs"]
    with pytest.raises(InputError, match=r"nothing://a: .*use a local path, s3:// or gs://"):
        storage.locate("nothing://a")


def test_write_returns_the_digest_and_leaves_only_the_file(root):
    for content in (b"hello", b"", b"other"):
        assert storage.write(root / "a" / "b=1.bin", content) == digest(content)
        assert storage.fetch([root / "a" / "b=1.bin"]) == [content]
        assert storage.sha256(root / "a" / "b=1.bin") == digest(content)
    assert storage.listing(root) == {"a/b=1.bin": 5}
    storage.publish(root / "beat.json", b"{}")
    storage.publish(root / "beat.json", b"{1}")
    assert storage.listing(root) == {"a/b=1.bin": 5, "beat.json": 3}


def test_write_copies_a_file(root, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    assert storage.write(root / "copy", source) == digest(source.read_bytes())
    assert storage.local(root / "copy").read_bytes() == source.read_bytes()


def test_files_larger_than_a_block_are_read_back_in_parts(remote, monkeypatch):
    monkeypatch.setattr(objects, "BLOCK", 1000)
    data = os.urandom(9876)
    assert storage.write(remote / "large", data) == storage.sha256(remote / "large") == digest(data)


def test_a_failed_write_keeps_the_old_file(root, tmp_path):
    storage.write(root / "a", b"old")
    with pytest.raises(FileNotFoundError):
        storage.write(root / "a", tmp_path / "absent")
    assert storage.fetch([root / "a"]) == [b"old"]
    assert storage.listing(root) == {"a": 3}


def test_an_object_that_reads_back_differently_is_refused_and_removed(remote, monkeypatch):
    put = objects.put
    monkeypatch.setattr(objects, "put", lambda path, content: put(path, content[:-1] + b"?"))
    with pytest.raises(OSError, match=f"{remote}/a: read back other bytes than were written"):
        storage.write(remote / "a", b"hello")
    assert storage.listing(remote) == {}


def test_errors_name_the_whole_location(root, tmp_path):
    for action in (lambda p: storage.fetch([p]), storage.sha256):
        with pytest.raises(FileNotFoundError) as caught:
            action(root / "folder" / "absent")
        assert f"{root}/folder/absent" in str(caught.value)
    assert storage.fetch([root / "absent"], missing=b"none") == [b"none"]
    storage.remove(root / "absent")


def test_a_bucket_that_is_not_there_is_named(remote):
    absent = storage.locate("s3://no-such-bucket/root")
    with pytest.raises(FileNotFoundError, match="bucket does not exist: 's3://no-such-bucket/root/a'"):
        storage.write(absent / "a", b"")
    message = "s3://no-such-bucket/root cannot be written to: .*bucket does not exist; check the bucket"
    with pytest.raises(InputError, match=message), storage.exclusive(absent / "lock"):
        pass


def test_a_path_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=f"'{tmp_path}/file/a'"):
        storage.write(tmp_path / "file" / "a", b"x")


def test_listing_and_many_reads(root):
    contents = {f"done/class=n{i:03d}/{i}.json": b"%d" % i * (i % 3) for i in range(120)}
    paths = [root / name for name in contents]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(storage.publish, paths, contents.values()))
    storage.publish(root.with_name("root-2") / "other", b"a neighbour whose name begins alike")
    assert storage.listing(root) == {name: len(data) for name, data in contents.items()}
    assert storage.fetch(paths) == list(contents.values())
    assert storage.listing(root / "absent") == {}


def test_a_folder_is_moved_with_all_that_is_in_it(root):
    contents = {"done/a=1/b.json": b"1", "done/c.json": b"2", "inputs.json": b"3", "unet/model": b"4", "donever": b"5"}
    for name, data in contents.items():
        storage.write(root / name, data)
    target = root.with_name("root.superseded-1")
    storage.move(root, target, first="done", last="inputs.json")
    assert storage.listing(root) == {}
    assert dict(zip(contents, storage.fetch([target / name for name in contents]), strict=True)) == contents


def test_a_move_that_is_cut_short_leaves_no_marker_and_what_tells_the_origin(remote, monkeypatch):
    for name in ("a", "done/1.json", "done/2.json", "inputs.json", "z"):
        storage.write(remote / name, b"x")
    remove = objects.remove

    def cut(path):
        if "done" not in path.parts:
            raise OSError("killed here")
        remove(path)

    monkeypatch.setattr(objects, "remove", cut)
    with pytest.raises(OSError, match="killed here"):
        storage.move(remote, remote.with_name("aside"), first="done", last="inputs.json")
    assert not [name for name in storage.listing(remote) if name.startswith("done/")]
    assert "inputs.json" in storage.listing(remote)
    assert {"done/1.json", "done/2.json"} <= storage.listing(remote.with_name("aside")).keys()


def test_old_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / "x").mkdir()
    for name in (".old.tar.1234.tmp", ".young.tar.1234.tmp", "shard.tar"):
        (tmp_path / "x" / name).write_bytes(b"half")
    os.utime(tmp_path / "x" / ".old.tar.1234.tmp", (0, 0))
    storage.remove_temporaries(tmp_path)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {".young.tar.1234.tmp", "shard.tar"}


# Copies on the node


def test_a_local_path_is_its_own_copy(tmp_path):
    assert storage.local(tmp_path / "absent") == tmp_path / "absent"


def test_a_copy_is_kept_while_the_object_is_unchanged(remote, monkeypatch):
    for name, data in (("unet/config.json", b"{}"), ("unet/a=b/weights", b"w" * 1000), ("unet-2/other", b"")):
        storage.write(remote / name, data)
    copy = storage.local(remote / "unet")
    assert copy.name == "unet"
    assert storage.listing(copy) == {"config.json": 2, "a=b/weights": 1000}
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_download", None)
        assert storage.local(remote / "unet") == copy
    storage.write(remote / "unet/config.json", b"[]")
    assert (storage.local(remote / "unet") / "config.json").read_bytes() == b"[]"
    (copy / "a=b" / "weights").write_bytes(b"")  # as a power cut leaves files
    storage.write(remote / "unet/config.json", b"{}")
    assert storage.listing(storage.local(remote / "unet")) == {"config.json": 2, "a=b/weights": 1000}
    with pytest.raises(FileNotFoundError, match=f"{remote}/absent"):
        storage.local(remote / "absent")


def test_processes_that_want_the_same_copy_share_one_download(remote, tmp_path):
    data = os.urandom(3_000_000)
    storage.write(remote / "weights", data)
    script = """
        import sys
        from vlcp_dist.data import cache, storage
        download = cache._download
        cache._download = lambda *arguments: (print("downloads"), download(*arguments))
        print(storage.sha256(storage.local(storage.locate(sys.argv[1]))))
    """
    processes = [python(script, remote / "weights") for _ in range(3)]
    lines = [line for process in processes for line in process.communicate()[0].split()]
    assert sorted(lines) == sorted(["downloads", *[digest(data)] * 3])
    assert not list((tmp_path / "cache").glob("*.tmp"))


# Locks

HOLD = """
    import sys
    from vlcp_dist.data import locks, storage
    path = storage.locate(sys.argv[1])
    if sys.argv[2] == "lease":
        manager = locks.hold_lease(path, renew_every=0.2, stale_after=3)
    else:
        manager = storage.exclusive(path)
    with manager:
        print("held", flush=True)
        sys.stdin.read()
"""


def take(path, **times):
    return locks.hold_file(path) if isinstance(path, Path) else locks.hold_lease(path, **times)


def test_a_lock_has_one_holder_and_dies_with_it(root):
    storage.write(root / "here", b"")
    holder = python(HOLD, root / "lock", "file" if isinstance(root, Path) else "lease")
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"{root} is in use by process {holder.pid} on .* since 20.*; wait for it"):
        take(root / "lock", renew_every=0.2, stale_after=3).__enter__()
    holder.kill()
    holder.communicate()
    with take(root / "lock", renew_every=0.2, stale_after=3):
        assert str(os.getpid()).encode() in storage.fetch([root / "lock"])[0]


def test_a_lock_that_was_released_is_free_at_once(root):
    for _ in range(2):
        with storage.exclusive(root / "lock") as lock:
            assert not lock.lost()
            assert storage.listing(root).keys() == {"lock"}
    if not isinstance(root, Path):
        assert storage.listing(root) == {}


def test_of_many_that_want_an_abandoned_lease_one_gets_it(remote):
    holder = python(HOLD, remote / "lock", "lease")
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    others = [python(HOLD, remote / "lock", "lease") for _ in range(3)]
    # The one that got it holds on until its input ends; the others end by themselves.
    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(lambda process: process.stdout.readline(), others))
    assert sorted(first) == ["", "", "held\n"]
    errors = [process.communicate()[1] for process in others]
    assert sum(f"{remote} is in use by process" in text for text in errors) == 2
    assert sum("taken over from process" in text for text in errors) == 1


def test_a_holder_learns_that_its_lease_was_taken_and_leaves_the_new_one_alone(remote, capfd):
    with locks.hold_lease(remote / "lock", renew_every=0.05, stale_after=60) as lease:
        assert not lease.lost()
        storage.publish(remote / "lock", b'{"pid": 1, "host": "elsewhere", "since": "now", "nonce": "another"}')
        lease._thread.join(timeout=60)
        assert lease.lost()
    assert b"another" in storage.fetch([remote / "lock"])[0]
    assert "was taken by another process" in capfd.readouterr().err


def test_a_holder_that_cannot_renew_stops_trusting_its_lease_first(remote, monkeypatch):
    with locks.hold_lease(remote / "lock", renew_every=60, stale_after=90) as lease:
        now = locks.time.monotonic()
        monkeypatch.setattr(locks.time, "monotonic", lambda: now + 59)
        assert not lease.lost()
        monkeypatch.setattr(locks.time, "monotonic", lambda: now + 61)
        assert lease.lost()
        monkeypatch.undo()


def test_a_renewal_that_did_not_arrive_is_tried_again_and_one_whose_answer_was_lost_counts(remote, monkeypatch):
    with locks.hold_lease(remote / "lock", renew_every=600, stale_after=900) as lease:
        pipe = lease._fs.pipe_file
        for arrives in (False, True):

            def broken(*arguments, arrives=arrives, **options):
                if arrives:
                    pipe(*arguments, **options)
                raise OSError("the network is down")

            lease._record["renewed"] += 1
            with monkeypatch.context() as patched:
                patched.setattr(lease._fs, "pipe_file", broken)
                if arrives:
                    assert lease._put(lease._identity)
                else:
                    with pytest.raises(OSError, match="network is down"):
                        lease._put(lease._identity)
        lease._record["renewed"] += 1
        assert lease._put(lease._identity)
        assert not lease.lost()


@pytest.mark.parametrize("store", ["s3", "a store without conditional puts"])
def test_a_lease_that_is_no_json_can_be_taken_over(store, request):
    root = request.getfixturevalue("remote") if store == "s3" else storage.locate("memory://root")
    storage.publish(root / "lock", b"[")
    with locks.hold_lease(root / "lock", renew_every=0.2, stale_after=0.5) as lease:
        assert not lease.lost()
        assert not locks.Lease(root / "lock", 0.2, 0.5)._put("what it saw before this one took over")
        assert lease._put(lease._identity)
    assert storage.listing(root) == {}


def test_a_file_system_without_locks_is_named_with_a_way_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = f"{tmp_path}: this file system has no locks .*mount it with them"
    with pytest.raises(InputError, match=message), storage.exclusive(tmp_path / "lock"):
        pass


# Stores in trouble


def test_a_store_that_refuses_every_third_request_is_asked_again(bucket, s3_server, monkeypatch, tmp_path):
    with s3.refusing(s3_server, every=3) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        S3FileSystem.clear_instance_cache()
        root = storage.locate(f"{bucket}/root")
        (tmp_path / "file").write_bytes(b"f" * 1000)
        storage.write(root / "unet" / "file", tmp_path / "file")
        contents = {root / f"{i}": b"%d" % i for i in range(4)}
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(storage.write, contents, contents.values()))
        assert storage.fetch(list(contents)) == list(contents.values())
        assert len(storage.listing(root)) == 5
        assert storage.local(root / "unet").joinpath("file").read_bytes() == b"f" * 1000
        with storage.exclusive(root / "lock") as lock:
            assert not lock.lost()
    S3FileSystem.clear_instance_cache()


FULL = """
    import os, sys
    from pathlib import Path
    from vlcp_dist.data import storage
    root = Path(sys.argv[1])
    storage.write(root / "shard.tar", b"old")
    storage.write(root / "ballast", bytes(600_000))
    try:
        storage.write(root / "shard.tar", bytes(700_000))
    except OSError as error:
        print(error)
    print(sorted(storage.listing(root).items()), (root / "shard.tar").read_bytes())
    storage.remove(root / "ballast")
    storage.write(root / "shard.tar", bytes(700_000))
    print(storage.listing(root))
"""


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    script = textwrap.dedent(FULL)
    lines = subprocess.run(
        [*mount, sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    said = re.fullmatch(
        r"\[Errno 28\] No space left on device: 700000 bytes were to be written, (\d+) are free; "
        rf"make space and run again: '{tmp_path}/shard.tar'",
        lines[0],
    )
    assert 300_000 < int(said[1]) < 450_000  # what is left beside the ballast, not beside a half-written file
    assert lines[1:] == ["[('ballast', 600000), ('shard.tar', 3)] b'old'", "{'shard.tar': 700000}"]
