"""A worker that does what a unit's payload says, and how tests meet it: by files, which outlive any process."""

import os
import signal
import threading
import time
from pathlib import Path

from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.errors import Stopped

PATIENCE = 60.0  # seconds after which somebody who waits for a file gives up, so that a broken test ends


class Misbehaving:
    """`act` says what goes wrong in the first `times` attempts; `await` names a file that processing waits for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, unit: Unit) -> int:
        leave(self._folder / f"{unit.name}.reading")
        if unit.payload.get("act") == "unreadable":
            raise OSError("the storage does not answer")
        return self._attempt(unit)

    def process(self, unit: Unit, data: int) -> Outcome:
        leave(self._folder / f"{unit.name}.on-{node()}")
        leave(self._folder / f"{unit.name}.computing")
        if unit.payload.get("times", 99) >= data:
            _act(unit.payload.get("act"), data)
        for name in unit.payload.get("await", []):
            meet(self._folder / name)
        info = {"pid": os.getpid(), "node": node(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        failed = [Failure(f"{unit.name}-{i}", "broken") for i in range(unit.payload.get("broken", 0))]
        return Outcome({f"{unit.name}.txt": unit.name.encode()}, n_in=unit.size, failed=failed, info=info)

    def _attempt(self, unit: Unit) -> int:
        """The number of this attempt; `<unit>.attempt<n>` holds the process that makes it."""
        attempt = 1
        while True:
            try:
                with (self._folder / f"{unit.name}.attempt{attempt}").open("x") as file:
                    file.write(str(os.getpid()))
                return attempt
            except FileExistsError:
                attempt += 1


def _act(act: str | None, attempt: int) -> None:
    if act == "raise":
        raise OSError(f"attempt {attempt}")
    if act == "value":
        raise ValueError("bad input")
    if act == "cuda":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if act == "stop":
        raise Stopped("saved at step 7")
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "eat":
        hold = []
        while True:  # until somebody kills this process
            hold.append(b"x" * 2**26)
            time.sleep(0.1)
            if len(hold) > 48:
                raise MemoryError("3 GiB, and nobody minded")
    if act == "hang":
        threading.Event().wait()


class Unbuildable:
    def __init__(self, folder: Path):
        raise OSError("no such model")


class Unreadable:
    """An argument that no other process can unpickle, as when a module is missing there."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise ModuleNotFoundError("No module named 'elsewhere'")


def node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()[:12] if ray.is_initialized() else "here"


def leave(path: Path) -> None:
    path.touch()


def meet(path: Path) -> None:
    """Wait until somebody has left the file.

    Raises:
        TimeoutError: nobody did for a minute.
    """
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was never left")
        time.sleep(0.01)


def attempts(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}.attempt*")))
