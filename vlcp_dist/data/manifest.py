"""What is to be done and what is done: units, outcomes, and the markers that alone make a unit count as done."""

import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import vlcp_dist
from vlcp_dist.data import storage


@dataclass(frozen=True)
class Unit:
    """A named piece of a stage's work; `size` counts its samples, `payload` is JSON-ready."""

    name: str
    size: int
    payload: dict[str, Any] = field(default_factory=dict)
    replaces: float | None = None  # `finished` of the one marker that a new one may take the place of


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


Marker = dict[str, Any]


class StageFolder:
    """`<root>/<stage>-<fingerprint>/`: the files of a stage and, in `done/`, a marker for each finished unit."""

    def __init__(self, path: Path, plan: Mapping[str, Any] | None = None):
        self.path = path
        self._plan = plan
        self._last_heartbeat = 0.0

    def open(self) -> None:
        """Make the folder ready for work: leave `plan.json`, which its name is the fingerprint of, and clear up."""
        if self._plan and not (self.path / "plan.json").exists():
            storage.write(self.path / "plan.json", _json(self._plan))
        storage.remove_temporaries(self.path)
        self.failures.unlink(missing_ok=True)

    def supersede(self) -> None:
        """Set the folder aside, because what it was made from has changed."""
        for i in itertools.count(1):
            aside = self.path.with_name(f"{self.path.name}.superseded-{i}")
            if not aside.exists():
                self.path.rename(aside)
                return

    @property
    def failures(self) -> Path:
        """Units that failed for good in the last run, one JSON line each."""
        return self.path / "failures.jsonl"

    def commit(
        self, unit: Unit, outcome: Outcome, *, seconds: float, read_seconds: float = 0.0, wait_seconds: float = 0.0
    ) -> Marker:
        """Write a unit's files, then its marker. Only the marker makes it count."""
        there = self.marker(unit.name)
        if there is not None and there["finished"] != unit.replaces:
            return there
        began = time.perf_counter()
        files = {}
        for name, content in outcome.files.items():
            digest = storage.write(self.path / name, content)
            files[name] = {"bytes": (self.path / name).stat().st_size, "sha256": digest}
        marker = {
            "unit": unit.name,
            "n_in": outcome.n_in,
            "n_ok": outcome.n_in - len(outcome.failed),
            "n_failed": len(outcome.failed),
            "failed": [asdict(failure) for failure in outcome.failed],
            "files": files,
            "info": outcome.info,
            "seconds": round(seconds, 3),
            "read_seconds": round(read_seconds, 3),
            "wait_seconds": round(wait_seconds, 3),
            "write_seconds": round(time.perf_counter() - began, 3),
            "finished": round(time.time(), 3),
            "version": vlcp_dist.__version__,
        }
        storage.write(self._marker_path(unit.name), _json(marker))
        for name in outcome.obsolete:
            (self.path / name).unlink(missing_ok=True)
        return marker

    def done(self, units: Iterable[Unit]) -> dict[str, Marker]:
        """The markers of those units that are done: a marker whose files are missing or of another size is not."""
        markers = {}
        for unit in units:
            marker = self.marker(unit.name)
            if marker is not None:
                markers[unit.name] = marker
        return markers

    def marker(self, name: str) -> Marker | None:
        try:
            marker: Marker = json.loads(self._marker_path(name).read_bytes())
        except FileNotFoundError:
            return None
        return marker if all(self._intact(file, facts) for file, facts in marker["files"].items()) else None

    def heartbeat(self, phase: str, step: int, steps: int, loss: float) -> None:
        """Let whoever watches know how far a long unit is; written at most once a second and at the end."""
        now = time.monotonic()
        if step < steps and now - self._last_heartbeat < 1:
            return
        self._last_heartbeat = now
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".heartbeat.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({"phase": phase, "step": step, "steps": steps, "loss": loss}))
        temporary.replace(self.path / "heartbeat.json")

    def last_heartbeat(self) -> dict[str, Any] | None:
        try:
            beat: dict[str, Any] = json.loads((self.path / "heartbeat.json").read_text())
        except FileNotFoundError:
            return None
        return beat

    def _intact(self, name: str, facts: Mapping[str, Any]) -> bool:
        try:
            return (self.path / name).stat().st_size == facts["bytes"]
        except FileNotFoundError:
            return False

    def _marker_path(self, name: str) -> Path:
        return self.path / "done" / f"{name}.json"


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
