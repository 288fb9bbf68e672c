"""WebDataset tars: packed to the same bytes every time, read in order or by key through a memory map."""

import io
import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import webdataset as wds

from vlcp_dist.data import storage
from vlcp_dist.data.sources import SourceError
from vlcp_dist.data.storage import Location
from vlcp_dist.data.tars import members
from vlcp_dist.data.threads import concurrently
from vlcp_dist.errors import InputError


class ShardError(InputError):
    """A tar that cannot be trusted; the message names it and says what to do."""


def pack(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """Tar `(key, {extension: bytes})` samples. Times and owners are fixed, so equal samples give equal bytes."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, mtime=0, user="vlcp", group="vlcp", encoder=False) as writer:
        for key, parts in samples:
            writer.write({"__key__": key, **parts})
    return buffer.getvalue()


def read(path: Location, keys: Collection[str] | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar in their order, or of them only those with these keys: the bytes of others are not read.

    Raises:
        ShardError: the tar is cut short or damaged.
    """
    key, parts = "", dict[str, bytes]()
    copy = storage.local(path)
    with copy.open("rb") as file:
        for name, offset, size in _members(copy, path):
            stem, _, extension = name.partition(".")
            if keys is not None and stem not in keys:
                continue
            if stem != key and parts:
                yield key, parts
                parts = {}
            key = stem
            file.seek(offset)
            parts[extension] = file.read(size)
    if parts:
        yield key, parts


class Arrays(Mapping[str, np.ndarray]):
    """The array of each sample of many tars, by key: its member with the extension asked for.

    Nothing is copied; tars of an object store are downloaded first.
    """

    def __init__(self, paths: Iterable[Location], extension: str = "npy"):
        self._maps: list[mmap.mmap] = []
        self._where: dict[str, tuple[int, int, int]] = {}
        paths = list(paths)
        for path, copy in zip(paths, concurrently(storage.local, paths, threads=4), strict=True):
            members = list(_members(copy, path))
            with copy.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            for name, offset, size in members:
                key, _, found = name.partition(".")
                if found == extension:
                    self._where[key] = (len(self._maps) - 1, offset, size)

    def __getitem__(self, key: str) -> np.ndarray:
        shard, offset, size = self._where[key]
        return parse_npy(memoryview(self._maps[shard])[offset : offset + size])

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_npy(data: memoryview | bytes) -> np.ndarray:
    """A read-only view of `.npy` bytes, without a copy."""
    header = io.BytesIO(bytes(data[:128]))
    version = np.lib.format.read_magic(header)
    if version != (1, 0):
        raise ShardError(f"unexpected .npy version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if fortran or dtype.hasobject:
        raise ShardError(f"unexpected .npy layout: fortran={fortran}, dtype={dtype}")
    return np.frombuffer(data, dtype=dtype, offset=header.tell()).reshape(shape)


def _members(copy: Path, path: Location) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of what is in the local file `copy` of the tar at `path`."""
    try:
        with copy.open("rb") as file:
            for member in members(file, path, 0, copy.stat().st_size):
                yield member.name, member.offset, member.size
    except SourceError as error:
        raise ShardError(f"{error}: delete {path} and run again") from error
