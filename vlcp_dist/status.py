"""How far each stage is and what the rest will cost: summed from markers, never from memory."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from vlcp_dist import costs
from vlcp_dist.costs import Rate
from vlcp_dist.data.manifest import Marker, StageFolder, Unit
from vlcp_dist.engine.executor import IN_FLIGHT
from vlcp_dist.schema import Config
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
    cfg: Config

    @property
    def todo(self) -> list[Unit]:
        return [unit for unit in self.units or [] if unit.name not in self.markers]

    @property
    def complete(self) -> bool:
        return self.units is not None and len(self.markers) == len(self.units)

    def without_markers(self, why: str) -> "StageStatus":
        return replace(self, markers={}, damaged=self.damaged | dict.fromkeys(self.markers, why))

    @cached_property
    def rate(self) -> Rate | None:
        """What its units took, or the steps of one that was interrupted; None where nothing is done yet."""
        overlap = IN_FLIGHT if self.cfg.engine.kind == "ray" else 1
        measured = costs.measure(self.stage.name, self.cfg, self.units or [], self.markers, overlap)
        beat = self._beat
        if measured or not beat:
            return measured
        seconds = beat["seconds_per_step"] * self.cfg.finetune.workers / self.cfg.finetune.batch_size
        return Rate(f"{beat['step']} steps", beat["device"], seconds)

    def summary(self, rate: Rate | None = None) -> dict[str, Any]:
        """The row of this stage in `vlcp status` and `vlcp plan`, JSON-ready; `rate` as in `estimate`."""
        totals = {
            name: sum(marker[name] for marker in self.markers.values())
            for name in ("n_in", "n_ok", "n_failed", "seconds")
        }
        device = self.rate.device if self.rate else "cpu"
        return {
            "stage": self.stage.name,
            "folder": str(self.folder.path),
            "units": None if self.units is None else len(self.units),
            "done": len(self.markers),
            "damaged": self.damaged,
            "samples": totals["n_in"],
            "samples_ok": totals["n_ok"],
            "samples_failed": totals["n_failed"],
            "bytes": sum(costs.written(marker) for marker in self.markers.values()),
            "worker_seconds": round(totals["seconds"], 1),
            "notices": self.notices(),
            "gpu_hours": round(self._gpus(device) * totals["seconds"] / 3600, 4),
            "samples_left": None if self.units is None else sum(unit.size for unit in self.todo),
            **self.estimate(rate),
        }

    def notices(self) -> dict[str, int]:
        """What the stage's markers count that a user should hear of, in words; what did not happen is left out."""
        sums = {
            words: sum(marker["info"].get(name, 0) for marker in self.markers.values())
            for name, words in self.stage.notices.items()
        }
        return {words: count for words, count in sums.items() if count}

    def estimate(self, rate: Rate | None = None) -> dict[str, Any]:
        """What the units left will take, at the stage's own rate or else the one given; None where there is neither.

        `gpu_hours_left` is 0 where the rate was measured on a CPU.
        """
        rate, name = self.rate or rate, self.stage.name
        if self.units is None or rate is None:
            unknown = "rate", "rate_from", "worker_seconds_left", "gpu_hours_left", "bytes_left", "device"
            return dict.fromkeys(unknown)
        seconds = sum(self.seconds_left(rate))
        volume = sum(costs.WORK[name].volume(self.cfg, unit) for unit in self.todo)
        return {
            "rate": asdict(rate),
            "rate_from": rate.source,
            "worker_seconds_left": round(seconds, 1),
            "gpu_hours_left": round(seconds * self._gpus(rate.device) / 3600, 3),
            "bytes_left": None if rate.volume_bytes is None else round(volume * rate.volume_bytes),
            "device": rate.device,
        }

    def seconds_left(self, rate: Rate) -> list[float]:
        """Of one worker, for each unit that is left; one that was interrupted keeps the steps that it did."""
        beat = self._beat
        # The beat of a training that had finished is of files that are gone: it begins anew.
        share = 1 - beat["step"] / beat["steps"] if beat and beat["step"] < beat["steps"] else 1.0
        return [share * rate.piece_seconds * costs.pieces(self.stage.name, self.cfg, unit) for unit in self.todo]

    def _gpus(self, device: str) -> float:
        """Of one worker that was measured on `device`."""
        asked = self.cfg.engine.placement(self.stage.name).gpus_per_worker
        return 0.0 if device == "cpu" else (1.0 if asked is None else asked)

    @cached_property
    def _beat(self) -> dict[str, Any] | None:
        """How far the last training of many steps came."""
        beat = self.folder.last_heartbeat() or {}
        return beat if "seconds_per_step" in beat else None


def stage_status(run: base.Run, stage: base.Stage) -> StageStatus:
    """A stage's state, from its markers and files alone."""
    folder = run.folders[stage.name]
    known = stage.name == "index" or run.folders["index"].marker("index") is not None
    units = stage.units(run) if known else None
    scan = folder.scan(units or [])
    return StageStatus(stage, folder, units, scan.done, scan.damaged, run.cfg)


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
