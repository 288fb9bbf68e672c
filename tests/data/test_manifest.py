"""Only an intact marker makes a unit count, on a disk and on an object store."""

import json
import pickle

import pytest
from s3fs import S3FileSystem

import s3
from vlcp_dist.data import manifest, storage
from vlcp_dist.data.manifest import Failure, Outcome, StageFolder, Unit
from vlcp_dist.errors import InputError

UNITS = [Unit("000000", 3), Unit("ipc=10/n01440764", 2), Unit("a/b=1/c.d", 1)]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return storage.locate(str(tmp_path / "root"))
    return storage.locate(request.getfixturevalue("bucket") + "/root")


@pytest.fixture
def folder(root):
    return StageFolder(root / "caption-1a2b", {"stage": "caption"})


def outcome(unit: Unit, text: str = "x", **facts) -> Outcome:
    files = {f"{unit.name}.tar": f"{text} {unit.name}".encode(), f"more/{unit.name}/0.png": b""}
    return Outcome(files, unit.size, **facts)


def fill(folder: StageFolder) -> None:
    for unit in UNITS:
        folder.commit(unit, outcome(unit), seconds=1.0)


def test_a_unit_is_done_once_its_marker_is_there(folder, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * 5000)
    storage.write(folder.path / "checkpoint", b"")
    failed = [Failure("k1", "is no image", "k1.png")]
    made = Outcome({"unet/w": weights, "log.json": b"{}"}, 3, failed, {"device": "cpu"}, obsolete=["checkpoint", "not"])
    assert folder.scan(UNITS) == manifest.Scan({}, {})
    assert folder.marker("000000") is None
    marker = folder.commit(UNITS[0], made, seconds=2.0, read_seconds=0.5, wait_seconds=0.25)
    assert folder.marker("000000") == folder.scan(UNITS).done["000000"] == marker
    assert {name: facts["bytes"] for name, facts in marker["files"].items()} == {"unet/w": 5000, "log.json": 2}
    assert (marker["n_in"], marker["n_ok"], marker["n_failed"]) == (3, 2, 1)
    assert marker["failed"] == [{"key": "k1", "reason": "is no image", "source": "k1.png"}]
    assert (marker["seconds"], marker["read_seconds"], marker["wait_seconds"]) == (2.0, 0.5, 0.25)
    assert marker["write_seconds"] >= 0
    assert storage.listing(folder.path).keys() == {"unet/w", "log.json", "done/000000.json"}


def test_a_crash_before_the_marker_leaves_the_unit_undone(folder, monkeypatch):
    write = storage.write

    def killed(path, content):
        if path.name == "000000.json":
            raise OSError("killed here")
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", killed)
        with pytest.raises(OSError, match="killed here"):
            folder.commit(UNITS[0], outcome(UNITS[0]), seconds=1.0)
    assert "000000.tar" in storage.listing(folder.path)
    assert folder.scan(UNITS).done == {}


def test_scan_tells_what_is_done_and_why_the_rest_is_not(folder):
    fill(folder)
    assert folder.scan(UNITS).done.keys() == {unit.name for unit in UNITS}
    assert folder.scan(UNITS).done == {unit.name: folder.marker(unit.name) for unit in UNITS}
    assert folder.scan(UNITS[:1]).done.keys() == {"000000"}
    storage.remove(folder.path / "000000.tar")
    storage.write(folder.path / "ipc=10" / "n01440764.tar", b"short")
    marker = folder.path / "done" / "a" / "b=1" / "c.d.json"
    whole = storage.fetch([marker])[0]
    storage.write(marker, whole[:100])
    scan = folder.scan(UNITS)
    assert scan.done == {}
    assert scan.damaged == {
        "000000": f"{folder.path}/000000.tar is gone, its marker says 8 bytes",
        "ipc=10/n01440764": f"{folder.path}/ipc=10/n01440764.tar has 5 bytes, its marker says 18 bytes",
        "a/b=1/c.d": f"{marker} is no whole marker (100 bytes)",
    }
    assert [folder.marker(unit.name) for unit in UNITS] == [None] * 3
    for content in (
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"files": {}}',
        b'{"files": {"a": 1}}',
        b'{"files": {"a": {}}}',
        b"\xff",
    ):
        storage.write(marker, content)
        assert folder.scan(UNITS).damaged["a/b=1/c.d"] == f"{marker} is no whole marker ({len(content)} bytes)"
        assert folder.marker("a/b=1/c.d") is None
    fill(folder)
    assert folder.scan(UNITS).done.keys() == {unit.name for unit in UNITS}


def test_verify_finds_what_has_kept_its_size(folder):
    fill(folder)
    markers = folder.scan(UNITS).done
    assert list(folder.verify(markers.values())) == []
    storage.write(folder.path / "000000.tar", b"y 000000")
    storage.remove(folder.path / "a/b=1/c.d.tar")
    (unit, file, why), gone = sorted(folder.verify(markers.values()))
    assert (unit, file) == ("000000", "000000.tar")
    assert why.endswith(f"its marker says {markers['000000']['files']['000000.tar']['sha256']}")
    assert gone == ("a/b=1/c.d", "a/b=1/c.d.tar", "is gone")


def test_an_attempt_that_comes_late_changes_nothing(folder):
    first = folder.commit(UNITS[0], outcome(UNITS[0]), seconds=1.0)
    before = storage.listing(folder.path)
    assert folder.commit(UNITS[0], outcome(UNITS[0], "later"), seconds=9.0) == first
    assert storage.listing(folder.path) == before
    assert list(folder.verify(folder.scan(UNITS).done.values())) == []


def test_a_marker_is_replaced_by_whom_it_was_named_to_and_a_damaged_one_by_all(folder):
    first = folder.commit(UNITS[0], outcome(UNITS[0]), seconds=1.0)
    again = Unit("000000", 3, replaces=first["finished"])
    second = folder.commit(again, outcome(again, "mended"), seconds=2.0)
    assert second["files"] != first["files"]
    assert second == folder.marker("000000")
    if second["finished"] != first["finished"]:
        assert folder.commit(again, outcome(again, "late"), seconds=3.0) == second
    storage.remove(folder.path / "000000.tar")
    assert folder.commit(UNITS[0], outcome(UNITS[0], "third"), seconds=3.0)["seconds"] == 3.0


def test_a_folder_says_what_it_was_made_from(folder):
    assert folder.inputs() is None
    folder.open()
    assert folder.inputs() is None
    assert json.loads(storage.fetch([folder.path / "plan.json"])[0]) == {"stage": "caption"}
    folder.open({"index": {"index": "d1"}})
    folder.open({"encode": {"0": "d2"}, "index": {"other": "d3"}})
    folder.open({"encode": {"0": "d4"}})
    assert folder.inputs() == {"index": {"index": "d1", "other": "d3"}, "encode": {"0": "d4"}}
    storage.write(folder.path / "inputs.json", b"{")
    with pytest.raises(InputError, match=f"{folder.path}/inputs.json is damaged"):
        folder.inputs()


def test_opening_clears_what_the_last_run_left(folder):
    folder.open()
    folder.write_failures([{"unit": "a", "message": "é"}, {"unit": "b"}])
    folder.request_stop()
    first, second = map(json.loads, storage.fetch([folder.failures])[0].splitlines())
    assert (first["message"], second) == ("é", {"unit": "b"})
    assert folder.stop_requested()
    folder.open()
    assert storage.listing(folder.path).keys() == {"plan.json"}
    assert not StageFolder(folder.path).stop_requested()


def test_a_folder_is_set_aside_whole(folder):
    for i in (1, 2):
        folder.open({"index": {"index": "d"}})
        fill(folder)
        files = storage.listing(folder.path)
        folder.supersede()
        assert storage.listing(folder.path) == {}
        aside = folder.path.with_name(f"caption-1a2b.superseded-{i}")
        assert storage.listing(aside).keys() == files.keys()
        assert list(StageFolder(aside).verify(StageFolder(aside).scan(UNITS).done.values())) == []


def test_heartbeats_are_written_once_in_a_while_and_at_the_end(folder, monkeypatch):
    assert folder.last_heartbeat() is None
    now = 1000.0
    monkeypatch.setattr(manifest.time, "monotonic", lambda: now)
    folder.heartbeat("unet", 1, 9, loss=0.5)
    folder.heartbeat("unet", 2, 9, loss=0.4)
    assert folder.last_heartbeat() == {"phase": "unet", "step": 1, "steps": 9, "loss": 0.5}
    now += 6
    folder.heartbeat("unet", 3, 9)
    assert folder.last_heartbeat() == {"phase": "unet", "step": 3, "steps": 9}
    folder.heartbeat("unet", 9, 9, loss=0.1)
    assert folder.last_heartbeat()["step"] == 9


def test_a_stop_request_is_looked_for_once_in_a_while(folder, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(manifest.time, "monotonic", lambda: now)
    assert not folder.stop_requested()
    StageFolder(folder.path).request_stop()
    assert not folder.stop_requested()
    now += 2
    assert folder.stop_requested()
    assert pickle.loads(pickle.dumps(folder)).stop_requested()


def test_a_store_that_refuses_every_third_request_is_no_obstacle(bucket, s3_server, monkeypatch):
    with s3.refusing(s3_server, every=3) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        S3FileSystem.clear_instance_cache()
        folder = StageFolder(storage.locate(f"{bucket}/stage-1"), {"stage": "a"})
        units = [Unit(f"ipc=1/{i}", 1) for i in range(2)]
        for unit in units:
            folder.commit(unit, Outcome({f"{unit.name}/{i}.png": b"%d" % i for i in range(2)}, 1), seconds=1.0)
        scan = folder.scan(units)
        assert scan.done.keys() == {unit.name for unit in units}
        assert list(folder.verify(scan.done.values())) == []
    S3FileSystem.clear_instance_cache()
