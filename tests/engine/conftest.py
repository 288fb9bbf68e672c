"""How the tests of the engines run units and what must hold whatever happens."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from misbehaving import Misbehaving

from vlcp_dist.data.manifest import Marker, StageFolder, Unit
from vlcp_dist.engine.executor import Event, Job, Resources, never

TWO = Resources(workers=2, gpus=0)

# Actors import this folder's modules. A worker's environment is that of its node, which this process starts.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@dataclass
class Ran:
    """What a run left: each unit's last event, all events, the stage's folder, the markers, and the meeting place."""

    final: dict[str, str]
    events: list[Event]
    folder: StageFolder
    markers: dict[str, Marker]
    scratch: Path

    def messages(self, kind: str) -> dict[str, str]:
        return {e.unit.name: e.message for e in self.events if e.kind == kind}

    def files(self) -> dict[str, bytes]:
        """Every file that units left, by name."""
        return {path.name: path.read_bytes() for path in self.folder.path.glob("*.txt")}


@pytest.fixture
def scratch(tmp_path):
    """Where units and tests leave files for each other."""
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@pytest.fixture
def run(tmp_path, scratch):
    """run(engine, units, ...) -> Ran; every unit has ended in exactly one event, and what is done has its files."""

    def run(
        engine, units: list[Unit], *, resources=TWO, stage="test", unit_timeout=None, on_event=None, should_stop=never
    ):
        folder = StageFolder(tmp_path / "stage")
        events: list[Event] = []

        def note(event: Event) -> None:
            events.append(event)
            if on_event:
                on_event(event)

        job = Job(stage, folder, Misbehaving, scratch, resources=resources, unit_timeout=unit_timeout)
        engine.run(job, units, note, should_stop)
        final = [(e.unit.name, e.kind) for e in events if e.kind != "retry"]
        assert max(Counter(name for name, _ in final).values()) == 1
        assert should_stop() or {name for name, _ in final} == {unit.name for unit in units}
        markers = {unit.name: marker for unit in units if (marker := folder.marker(unit.name))}
        assert set(markers) == {name for name, kind in final if kind == "done"}
        ran = Ran(dict(final), events, folder, markers, scratch)
        assert {name: ran.files()[f"{name}.txt"] for name in markers} == {name: name.encode() for name in markers}
        return ran

    return run
