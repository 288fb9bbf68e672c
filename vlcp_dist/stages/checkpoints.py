"""Where a long training is kept while it runs: a unit that was killed or stopped goes on from its last checkpoint."""

import time

from vlcp_dist.data import storage
from vlcp_dist.data.manifest import StageFolder, Unit
from vlcp_dist.errors import Stopped
from vlcp_dist.models.training import Training


class Checkpoints:
    """One unit's checkpoint: written every so many seconds and when a stop is asked for, obsolete when it is done.

    Called after every epoch with its `Training`.

    Raises:
        Stopped: it was asked to stop; the checkpoint holds everything up to this epoch.
    """

    def __init__(self, folder: StageFolder, unit: Unit, *, every: float):
        self.name = f"{unit.name}.checkpoint.safetensors"
        self._folder, self._unit, self._every = folder, unit, every
        self._saved_at = time.monotonic()

    def load(self) -> bytes | None:
        """What an earlier attempt left, if any."""
        path = self._folder.path / self.name
        return storage.fetch([path])[0] if path.exists() else None

    def __call__(self, training: Training) -> None:
        stop = self._folder.stop_requested()
        now = time.monotonic()
        self._folder.heartbeat(self._unit.name, training.epoch, training.epochs)
        if stop or now - self._saved_at >= self._every:
            storage.write(self._folder.path / self.name, training.state())
            self._saved_at = now
        if stop:
            raise Stopped(f"{self._unit.name} stopped after epoch {training.epoch} of {training.epochs}")
