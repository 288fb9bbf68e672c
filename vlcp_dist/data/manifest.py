"""What is to be done and what is done: units, outcomes, and the markers that alone make a unit count as done."""

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import vlcp_dist
from vlcp_dist.data import storage
from vlcp_dist.data.storage import Location
from vlcp_dist.data.threads import concurrently
from vlcp_dist.errors import InputError

BEAT_EVERY = 1.0  # seconds between heartbeats, on a disk
BEAT_EVERY_REMOTE = 5.0  # and on an object store, where each is a request that the training waits for
LOOK_EVERY = 2.0  # seconds between looks for a stop request


@dataclass(frozen=True, slots=True)
class Unit:
    """A named piece of a stage's work; `size` counts its samples, `payload` is JSON-ready.

    `replaces` is the `finished` of the one intact marker that a new one may take the place of.
    """

    name: str
    size: int
    payload: dict[str, Any] = field(default_factory=dict)
    replaces: float | None = None


@dataclass(frozen=True)
class Failure:
    """A sample that was left out, and why."""

    key: str
    reason: str
    source: str = ""


@dataclass
class Outcome:
    """What a worker made of a unit: files by path inside the stage folder, and the samples that failed.

    A file is given as bytes, or as a local path to copy from (for model weights).
    """

    files: Mapping[str, bytes | Path]
    n_in: int
    failed: list[Failure] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    obsolete: list[str] = field(default_factory=list)  # files of the unit's way here, deleted once it is done
    wait_seconds: float = 0.0  # of its computing, in which what it computes with was not ready yet


Marker = dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """The intact markers of the units asked for, and why the others that were found do not count; both by unit."""

    done: dict[str, Marker]
    damaged: dict[str, str]


class StageFolder:
    """`<root>/<stage>-<fingerprint>/`: the files of a stage and, in `done/`, a marker for each finished unit."""

    def __init__(self, path: Location, plan: Mapping[str, Any] | None = None):
        self.path = path
        self._plan = plan
        self._next_beat = self._next_look = 0.0
        self._stop_seen = False

    def __reduce__(self) -> tuple[Any, ...]:  # times of this machine mean nothing on another
        return type(self), (self.path, self._plan)

    def open(self, inputs: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Make the folder ready for work: leave `plan.json`, which its name is the fingerprint of, and clear up.

        `inputs` says what it is made from, {upstream stage: {unit: digest}}; it is added to what is known already.
        """
        if self._plan and not (self.path / "plan.json").exists():
            storage.write(self.path / "plan.json", _json(self._plan))
        known = self.inputs() or {}
        merged = known | {stage: known.get(stage, {}) | dict(digests) for stage, digests in (inputs or {}).items()}
        if merged != known:
            storage.write(self._inputs_path, _json(merged))
        storage.remove_temporaries(self.path)
        storage.remove(self.failures)
        storage.remove(self._stop_path)
        self._stop_seen = False

    def inputs(self) -> dict[str, dict[str, str]] | None:
        """What the folder is made from, {upstream stage: {unit: digest}}; None if that was never written down."""
        return _read_json(self._inputs_path)

    def supersede(self) -> None:
        """Set the folder aside, because what it was made from has changed."""
        for i in itertools.count(1):
            aside = self.path.with_name(f"{self.path.name}.superseded-{i}")
            if not aside.exists():
                # If that is cut short, no marker may be left of it, and as long as anything is, what it was made from.
                storage.move(self.path, aside, first="done", last=self._inputs_path.name)
                return

    @property
    def failures(self) -> Location:
        """Units that failed for good in the last run, one JSON line each."""
        return self.path / "failures.jsonl"

    def write_failures(self, records: list[dict[str, Any]]) -> None:
        storage.write(self.failures, b"".join(json.dumps(record).encode() + b"\n" for record in records))

    def commit(
        self,
        unit: Unit,
        outcome: Outcome,
        *,
        seconds: float,
        read_seconds: float = 0.0,
        wait_seconds: float = 0.0,
        start_seconds: float = 0.0,
    ) -> Marker:
        """Write a unit's files, then its marker; only the marker makes it count. Returns the marker that stands.

        An intact marker that is there already, and is not the one this unit replaces, stands: this is then an attempt
        that was given up as lost and came late.
        """
        before = self.marker(unit.name)
        if before is not None and before["finished"] != unit.replaces:
            return before
        began = time.perf_counter()
        contents = dict(outcome.files)
        digests = concurrently(lambda name: storage.write(self.path / name, contents[name]), contents)
        marker = {
            "unit": unit.name,
            "n_in": outcome.n_in,
            "n_ok": outcome.n_in - len(outcome.failed),
            "n_failed": len(outcome.failed),
            "failed": [asdict(failure) for failure in outcome.failed],
            "files": {
                name: {"bytes": storage.size_of(content), "sha256": digest}
                for (name, content), digest in zip(contents.items(), digests, strict=True)
            },
            "info": outcome.info,
            "seconds": round(seconds, 3),
            "read_seconds": round(read_seconds, 3),
            "wait_seconds": round(wait_seconds, 3),
            "start_seconds": round(start_seconds, 3),
            "write_seconds": round(time.perf_counter() - began, 3),
            "finished": round(time.time(), 3),
            "version": vlcp_dist.__version__,
        }
        storage.write(self._marker_path(unit.name), _json(marker))
        for name in outcome.obsolete:
            storage.remove(self.path / name)
        return marker

    def scan(self, units: Iterable[Unit]) -> Scan:
        """Which of the units are done, from one listing of the folder and their markers.

        A marker counts if it is whole and its files are there in the size that it says.
        """
        sizes = storage.listing(self.path)
        names = [unit.name for unit in units if f"done/{unit.name}.json" in sizes]
        contents = storage.fetch([self._marker_path(name) for name in names], missing=b"")
        scan = Scan({}, {})
        for name, content in zip(names, contents, strict=True):
            marker = _parse(content)
            if marker is None:
                scan.damaged[name] = f"{self._marker_path(name)} is no whole marker ({len(content)} bytes)"
            elif why := next(self._damages(marker, sizes), None):
                scan.damaged[name] = why
            else:
                scan.done[name] = marker
        return scan

    def marker(self, name: str) -> Marker | None:
        """The marker of one unit if it is done."""
        marker = _parse(storage.fetch([self._marker_path(name)], missing=b"")[0])
        if marker is None:
            return None
        sizes = dict(zip(marker["files"], concurrently(self._size, marker["files"]), strict=True))
        return None if any(self._damages(marker, sizes)) else marker

    def verify(self, markers: Iterable[Marker]) -> Iterator[tuple[str, str, str]]:
        """Read every file of these markers and yield (unit, file, why) for those that are not what was written."""
        files = [(marker["unit"], *item) for marker in markers for item in marker["files"].items()]
        for i in range(0, len(files), 64):
            batch = files[i : i + 64]
            digests = concurrently(lambda item: self._digest(item[1]), batch, threads=8)
            for (unit, file, facts), found in zip(batch, digests, strict=True):
                if found is None:
                    yield unit, file, "is gone"
                elif found != facts["sha256"]:
                    yield unit, file, f"has sha256 {found}, its marker says {facts['sha256']}"

    def heartbeat(self, phase: str, step: int, steps: int, **facts: float | str) -> None:
        """Let whoever watches know how far a long unit is, with facts such as its loss.

        May be called at every step: it is written once in a while, and at the end.
        """
        now = time.monotonic()
        if step < steps and now < self._next_beat:
            return
        self._next_beat = now + (BEAT_EVERY if isinstance(self.path, Path) else BEAT_EVERY_REMOTE)
        storage.publish(self.path / "heartbeat.json", _json({"phase": phase, "step": step, "steps": steps, **facts}))

    def last_heartbeat(self) -> dict[str, Any] | None:
        return _read_json(self.path / "heartbeat.json")

    def request_stop(self) -> None:
        """Ask whoever works on a long unit of this folder to save how far it is and raise `Stopped`."""
        storage.publish(self._stop_path, b"")

    def stop_requested(self) -> bool:
        """Whether that was asked for. May be called at every step: it looks once in a while."""
        now = time.monotonic()
        if not self._stop_seen and now >= self._next_look:
            self._next_look = now + LOOK_EVERY
            self._stop_seen = self._stop_path.exists()
        return self._stop_seen

    def _damages(self, marker: Marker, sizes: Mapping[str, int | None]) -> Iterator[str]:
        for name, facts in marker["files"].items():
            size = sizes.get(name)
            if size != facts["bytes"]:
                state = "is gone" if size is None else f"has {size} bytes"
                yield f"{self.path / name} {state}, its marker says {facts['bytes']} bytes"

    def _size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def _digest(self, name: str) -> str | None:
        try:
            return storage.sha256(self.path / name)
        except FileNotFoundError:
            return None

    def _marker_path(self, name: str) -> Location:
        return self.path / "done" / f"{name}.json"

    @property
    def _inputs_path(self) -> Location:
        return self.path / "inputs.json"

    @property
    def _stop_path(self) -> Location:
        return self.path / "stop"


def _parse(content: bytes) -> Marker | None:
    """A marker, or None if that is not a whole one."""
    try:
        marker: Marker = json.loads(content)
        whole = {"unit", "finished"} <= marker.keys()
        return marker if whole and all({"bytes", "sha256"} <= f.keys() for f in marker["files"].values()) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_json(path: Location) -> dict[str, Any] | None:
    try:
        data: dict[str, Any] = json.loads(storage.fetch([path])[0])
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run again") from error
    return data


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
