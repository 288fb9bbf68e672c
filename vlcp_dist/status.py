"""How far each stage is and what the rest will cost: summed from markers, never from memory."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vlcp_dist.data.manifest import Marker, StageFolder, Unit
from vlcp_dist.stages import base


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is. `units` is None as long as the index it follows from is not there.

    `damaged` says of each unit that was done once why its marker no longer counts.
    """

    stage: base.Stage
    folder: StageFolder
    units: list[Unit] | None
    markers: dict[str, Marker]
    damaged: dict[str, str]
    gpus_per_worker: float | None
    workers_per_unit: int = 1

    @property
    def todo(self) -> list[Unit]:
        return [unit for unit in self.units or [] if unit.name not in self.markers]

    @property
    def complete(self) -> bool:
        return self.units is not None and len(self.markers) == len(self.units)

    def without_markers(self, why: str) -> "StageStatus":
        return replace(self, markers={}, damaged=self.damaged | dict.fromkeys(self.markers, why))

    def summary(self) -> dict[str, Any]:
        """The row of this stage in `vlcp status` and `vlcp plan`, JSON-ready."""
        totals = {
            name: sum(marker[name] for marker in self.markers.values())
            for name in ("n_in", "n_ok", "n_failed", "seconds")
        }
        return {
            "stage": self.stage.name,
            "folder": str(self.folder.path),
            "units": None if self.units is None else len(self.units),
            "done": len(self.markers),
            "damaged": self.damaged,
            "samples": totals["n_in"],
            "samples_ok": totals["n_ok"],
            "samples_failed": totals["n_failed"],
            "bytes": _bytes(self.markers),
            "worker_seconds": round(totals["seconds"], 1),
            "notices": self.notices(),
            "gpu_hours": round(self._gpus(self._device()) * totals["seconds"] / 3600, 4),
            "samples_left": None if self.units is None else sum(unit.size for unit in self.todo),
            **self.estimate(),
        }

    def notices(self) -> dict[str, int]:
        """What the stage's markers count that a user should hear of, in words; what did not happen is left out."""
        sums = {
            words: sum(marker["info"].get(name, 0) for marker in self.markers.values())
            for name, words in self.stage.notices.items()
        }
        return {words: count for words, count in sums.items() if count}

    def estimate(self) -> dict[str, Any]:
        """What the units left will take, at the rate of those that are done; None where none is done yet.

        A single long unit that was interrupted has its steps to go by. `gpu_hours_left` is 0 where the rate was
        measured on a CPU.
        """
        unknown = dict.fromkeys(("rate_from", "worker_seconds_left", "gpu_hours_left", "bytes_left", "device"))
        steps_done = self._steps()
        if self.units is None or (not self.markers and not steps_done):
            return unknown
        left = sum(self.stage.work(unit) for unit in self.todo)
        if self.markers:
            done = [unit for unit in self.units if unit.name in self.markers]
            work = sum(self.stage.work(unit) for unit in done) or 1
            seconds = left * self.workers_per_unit * sum(marker["seconds"] for marker in self.markers.values()) / work
            bytes_left: int | None = round(left * _bytes(self.markers) / work)
            device = self._device()
            rate_from = f"{len(done)} units"
        else:
            assert steps_done is not None
            step, steps, seconds_per_step, device = steps_done
            seconds, bytes_left = (steps - step) * seconds_per_step * self.workers_per_unit, None
            rate_from = f"{step} steps"
        return {
            "rate_from": rate_from,
            "worker_seconds_left": round(seconds, 1),
            "gpu_hours_left": round(seconds * self._gpus(device) / 3600, 3),
            "bytes_left": bytes_left if left else 0,
            "device": device,
        }

    def _device(self) -> str:
        """What the units were measured on: `cpu`, or the name of a GPU."""
        return next((marker["info"].get("device", "cpu") for marker in self.markers.values()), "cpu")

    def _gpus(self, device: str) -> float:
        return 0.0 if device == "cpu" else (1.0 if self.gpus_per_worker is None else self.gpus_per_worker)

    def _steps(self) -> tuple[int, int, float, str] | None:
        beat = self.folder.last_heartbeat() or {}
        if "seconds_per_step" not in beat:
            return None
        return beat["step"], beat["steps"], beat["seconds_per_step"], beat["device"]


def stage_status(run: base.Run, stage: base.Stage) -> StageStatus:
    """A stage's state, from its markers and files alone."""
    folder = run.folders[stage.name]
    known = stage.name == "index" or run.folders["index"].marker("index") is not None
    units = stage.units(run) if known else None
    scan = folder.scan(units or [])
    gpus = run.cfg.engine.placement(stage.name).gpus_per_worker
    workers = run.cfg.finetune.workers if stage.launch else 1
    return StageStatus(stage, folder, units, scan.done, scan.damaged, gpus, workers)


def digests(state: StageStatus) -> dict[str, str]:
    """What of each finished unit decides whether that which was made from it still holds: its failed samples.

    Not its bytes: another GPU gives other last digits, and a file that was lost and made again must cost no more.
    """
    return {
        name: hashlib.sha256("\n".join(sorted(f["key"] for f in marker["failed"])).encode()).hexdigest()[:16]
        for name, marker in state.markers.items()
    }


def stale_stages(states: Iterable[StageStatus]) -> dict[str, str]:
    """The stages, with the reason, that were made from units done again with another outcome, and what follows."""
    stale: dict[str, str] = {}
    now: dict[str, dict[str, str]] = {}
    for state in states:
        now[state.stage.name] = digests(state)
        before = state.folder.inputs()
        if not before:
            continue
        for name in state.stage.upstream:
            changed = [u for u, digest in before.get(name, {}).items() if now.get(name, {}).get(u, digest) != digest]
            if name in stale or changed:
                stale.setdefault(state.stage.name, f"it was made from {name}, parts of which have been made anew since")
    return stale


def failures(statuses: Iterable[StageStatus]) -> list[dict[str, str]]:
    """Samples that were left out, each once, with the first stage that failed on it."""
    first: dict[str, dict[str, str]] = {}
    for item in statuses:
        for marker in item.markers.values():
            for failure in marker["failed"]:
                first.setdefault(failure["key"], {"stage": item.stage.name, **failure})
    return list(first.values())


def _bytes(markers: dict[str, Marker]) -> int:
    return sum(facts["bytes"] for marker in markers.values() for facts in marker["files"].values())
