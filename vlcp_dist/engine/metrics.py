"""What a run has done so far, as Ray metrics: Prometheus finds them on the driver's node, labelled by stage."""

from collections import Counter as Sums

from ray.util.metrics import Counter, Gauge

from vlcp_dist.engine.executor import Event

COUNTERS = {
    "vlcp_units_done": "units whose result is on storage",
    "vlcp_units_failed": "units given up for good",
    "vlcp_units_retried": "further attempts at units",
    "vlcp_units_stopped": "units that gave up midway because they were asked to",
    "vlcp_samples": "samples in the units done",
    "vlcp_samples_failed": "samples left out of the units done",
    "vlcp_compute_seconds": "seconds in which workers computed",
    "vlcp_read_seconds": "seconds in which workers read",
    "vlcp_wait_seconds": "seconds in which workers could not compute because data were missing",
    "vlcp_write_seconds": "seconds in which workers wrote",
    "vlcp_written_bytes": "bytes of the files that units left",
}
WORKERS = "vlcp_workers"
_UNITS = {"done": "vlcp_units_done", "failed": "vlcp_units_failed", "retry": "vlcp_units_retried"}


class Metrics:
    """Sums up events and hands the sums to Ray when told to: a call of Ray's for every unit would cost more."""

    def __init__(self, stage: str):
        self._tags = {"stage": stage}
        self._counters = {name: Counter(name, text, tag_keys=("stage",)) for name, text in COUNTERS.items()}
        self._workers = Gauge(WORKERS, "actors that are up", tag_keys=("stage",))
        self._sums: Sums[str] = Sums()

    def count(self, event: Event) -> None:
        self._sums[_UNITS.get(event.kind, "vlcp_units_stopped")] += 1
        if marker := event.marker:
            self._sums["vlcp_samples"] += marker["n_in"]
            self._sums["vlcp_samples_failed"] += marker["n_failed"]
            for name, key in (("compute", "seconds"), ("read", "read_seconds"), ("wait", "wait_seconds")):
                self._sums[f"vlcp_{name}_seconds"] += marker[key]
            self._sums["vlcp_write_seconds"] += marker["write_seconds"]
            self._sums["vlcp_written_bytes"] += sum(file["bytes"] for file in marker["files"].values())

    def send(self, workers: int) -> None:
        for name, value in self._sums.items():
            if value:
                self._counters[name].inc(value, tags=self._tags)
        self._sums.clear()
        self._workers.set(workers, tags=self._tags)
