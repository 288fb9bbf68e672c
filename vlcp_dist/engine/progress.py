"""How far a run is: a live bar on a terminal, a line per interval elsewhere, `progress.json` for everybody else."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Marker, StageFolder, Unit
from vlcp_dist.engine.executor import Event
from vlcp_dist.errors import InputError

FILE_EVERY = 5.0  # seconds between writes of progress.json


class Progress:
    """Follows one stage after the other. A thread of its own keeps it moving while a long unit is under way.

    Where it is given a `file`, that always holds the state of the run as JSON: `state` (running, done, incomplete,
    interrupted, failed), who runs it, and for every stage that was looked at its units, samples, failures and rate.
    """

    def __init__(self, *, interval: float = 10.0, file: storage.Location | None = None):
        self._console = Console(stderr=True)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None
        )
        self._interval = 0.5 if self._live else interval
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._file = file
        self._beat: dict[str, Any] | None = None
        self._beat_before: dict[str, Any] | None = None
        self._file_due = 0.0
        self._stages: dict[str, dict[str, Any]] = {}
        self._run = {"process": os.getpid(), "host": socket.gethostname(), "started": round(time.time(), 3)}

    def say(self, line: str) -> None:
        """A line for the log that belongs to no unit."""
        self._print(line)

    def close(self, state: str) -> None:
        """The run has ended: done, incomplete, interrupted or failed."""
        self._write(state)

    def start(self, stage: str, units: Sequence[Unit], done: Mapping[str, Marker], folder: StageFolder) -> None:
        self._stage, self._folder = stage, folder
        self._units, self._done = len(units), len(done)
        self._samples = sum(unit.size for unit in units)
        self._samples_before = self._samples_done = sum(unit.size for unit in units if unit.name in done)
        self._failed_samples = sum(marker["n_failed"] for marker in done.values())
        self._retries = self._failed_units = 0
        self._began = time.monotonic()
        self._beat = self._beat_before = None
        self._look()
        self._beat, self._beat_before = None, self._beat
        self._write("running")
        if self._done == self._units:
            self._print(f"{stage}: {self._units} of {self._units} units were done before")
            return
        if self._live:
            self._live.update(self._bar())
            self._live.start()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def update(self, event: Event) -> None:
        with self._lock:
            if event.kind == "done":
                self._done += 1
                self._samples_done += event.unit.size
                self._failed_samples += event.marker["n_failed"] if event.marker else 0
            if event.kind == "retry":
                self._retries += 1
            if event.kind == "failed":
                self._failed_units += 1
        if event.kind != "done":
            what = {"retry": "will be tried again", "stopped": "stopped midway"}.get(event.kind, "failed")
            self._print(f"{self._stage}: {event.unit.name} {what}: {event.message}")
        elif self._interval == 0:
            self._print(self._line())

    def finish(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._look()
        if self._live:
            self._live.stop()
        self._write("running")
        self._print(f"{self._line()}  in {duration(time.monotonic() - self._began)}")

    def _watch(self) -> None:
        while not self._stop.wait(self._interval or 1.0):
            self._look()
            if self._live:
                self._live.update(self._bar(), refresh=True)
            elif self._interval:
                self._print(self._line())
            if time.monotonic() >= self._file_due:
                self._write("running")

    def _write(self, state: str) -> None:
        if self._file is None:
            return
        self._file_due = time.monotonic() + FILE_EVERY
        with self._lock:
            if self._stages or state == "running":
                self._stages[self._stage] = self._numbers()
            record = {"state": state, **self._run, "updated": round(time.time(), 3), "stages": self._stages}
            content = json.dumps(record, indent=1).encode()
        try:
            storage.publish(self._file, content)
        except OSError as error:  # a full disk must not hide what the run itself has to say
            self._print(f"{self._file} could not be written: {error}")

    def _numbers(self) -> dict[str, Any]:
        new, seconds = self._samples_done - self._samples_before, time.monotonic() - self._began
        rate = new / seconds if new else None
        left = self._samples - self._samples_done
        return {
            "units": self._units,
            "done": self._done,
            "failed_units": self._failed_units,
            "retries": self._retries,
            "samples": self._samples,
            "samples_done": self._samples_done,
            "failed_samples": self._failed_samples,
            "samples_per_second": rate and round(rate, 3),
            "eta_seconds": rate and round(left / rate, 1),
            "step": self._beat,
        }

    def _line(self) -> str:
        with self._lock:
            parts = [f"{self._stage}: {self._done} of {self._units} units", *self._facts()]
        return "  ".join(parts)

    def _bar(self) -> Table:
        with self._lock:
            grid = Table.grid(padding=(0, 2))
            share = self._step_share() if self._units == 1 else self._samples_done / max(1, self._samples)
            bar = ProgressBar(total=1.0, completed=share, width=30)
            grid.add_row(self._stage, bar, f"{self._done}/{self._units} units", *map(escape, self._facts()))
        return grid

    def _facts(self) -> list[str]:
        new = self._samples_done - self._samples_before
        seconds = time.monotonic() - self._began
        facts = []
        beat = self._beat
        if beat and self._done < self._units:
            loss = f" loss {beat['loss']:.4g}" if "loss" in beat else ""
            facts.append(f"{beat['phase']} step {beat['step']}/{beat['steps']}{loss}")
        if new:
            facts.append(f"{new / seconds:.3g} samples/s")
            if self._done < self._units:
                facts.append(f"ETA {duration((self._samples - self._samples_done) / new * seconds)}")
        if self._failed_samples:
            facts.append(f"{self._failed_samples} failed samples")
        if self._retries:
            facts.append(f"{self._retries} retries")
        return facts

    def _look(self) -> None:
        """See how far a long unit is. Not under the lock, which the driver's loop waits for."""
        try:
            beat = self._folder.last_heartbeat()
        except (OSError, InputError):  # what is only shown must not end what is shown
            return
        self._beat = None if beat == self._beat_before else beat

    def _step_share(self) -> float:
        beat = self._beat
        return beat["step"] / max(1, beat["steps"]) if beat else 0.0

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds as a person writes them, such as `1 min 5 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
