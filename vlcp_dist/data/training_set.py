"""What a training reads: where every sample's latent lies in the shards, and its text, both memory-mapped.

Two files describe the set with a few bytes per sample, so a process holds neither keys nor descriptions, and of the
shards it touches the bytes of its own samples only.
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from vlcp_dist.data import storage
from vlcp_dist.data.shards import ShardError, parse_npy
from vlcp_dist.data.sources import SourceError
from vlcp_dist.data.storage import Location
from vlcp_dist.data.tars import members
from vlcp_dist.data.threads import concurrently

SAMPLES, TEXT = "inputs-samples.safetensors", "inputs-text.npy"
NO_TEXT = 0  # the row of the empty description


class Place(NamedTuple):
    """Where in a shard's tar the `.npy` of a latent lies, and that of the mirrored image (0: there is none)."""

    offset: int
    size: int
    flipped: int = 0


def places(path: Location) -> dict[str, Place]:
    """The latents of one shard by sample key.

    Raises:
        ShardError: the tar is cut short or damaged.
    """
    copy = storage.local(path)
    found: dict[str, Place] = {}
    flipped: dict[str, int] = {}
    try:
        with copy.open("rb") as file:
            for name, offset, size in members(file, path, 0, copy.stat().st_size):
                key, _, extension = name.partition(".")
                if extension == "npy":
                    found[key] = Place(offset, size)
                elif extension == "flip.npy":
                    flipped[key] = offset
    except SourceError as error:
        raise ShardError(f"{error}: delete {path} and run again") from error
    return {key: place._replace(flipped=flipped.get(key, 0)) for key, place in found.items()}


def write(
    folder: Location, shards: Sequence[str], columns: Mapping[str, np.ndarray], text: Path, facts: Mapping[str, Any]
) -> None:
    """Describe a set of n samples; the file that makes it count comes last.

    Args:
        shards: names of the tars, which `columns` refer to by number.
        columns: int64 (n,) each: `shard`, `position` in the shard, `offset`, `size`, `flipped`, `text`.
        text: a local `.npy` (m, ...) of what stands for the distinct descriptions; row 0 is the empty one.
        facts: JSON-ready, for `TrainingSet.facts`.
    """
    storage.write(folder / TEXT, text)
    metadata = {"shards": json.dumps(list(shards)), "facts": json.dumps(facts)}
    tensors = {name: np.ascontiguousarray(column, np.int64) for name, column in columns.items()}
    storage.write(folder / SAMPLES, save(tensors, metadata))


class TrainingSet:
    """The samples that `write` described: latents by row from the tars in `latents`, and what stands for their text."""

    def __init__(self, folder: Location, latents: Location):
        with safe_open(storage.local(folder / SAMPLES), framework="numpy") as file:
            metadata = file.metadata()
            self._columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.shards: list[str] = json.loads(metadata["shards"])
        self.facts: dict[str, Any] = json.loads(metadata["facts"])
        self._text = np.load(storage.local(folder / TEXT), mmap_mode="r", allow_pickle=False)
        copies = concurrently(storage.local, [latents / f"{name}.tar" for name in self.shards], threads=4)
        self._maps = [_map(copy) for copy in copies]

        self.shape: tuple[int, ...] = self.latents(np.array([0])).shape[1:]  # of a latent

    def __len__(self) -> int:
        return len(self._columns["shard"])

    def latents(self, rows: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Latents (b, c, h, w) fp16; of the mirrored image where `flip` (b,) says so and there is one."""
        offsets = self._columns["offset"][rows]
        if flip is not None:
            flipped = self._columns["flipped"][rows]
            offsets = np.where(flip & (flipped > 0), flipped, offsets)
        shards, sizes = self._columns["shard"][rows], self._columns["size"][rows]
        return np.stack(
            [parse_npy(memoryview(self._maps[s])[o : o + n]) for s, o, n in zip(shards, offsets, sizes, strict=True)]
        )

    def text(self, rows: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        """Rows (b, ...) of the texts; of the empty description where `keep` (b,) is false."""
        texts = self._columns["text"][rows]
        return self._text[texts if keep is None else np.where(keep, texts, NO_TEXT)]

    def place(self, row: int) -> tuple[str, int]:
        """Shard and position in it of a sample, which is what the index needs to name it."""
        return self.shards[self._columns["shard"][row]], int(self._columns["position"][row])


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
