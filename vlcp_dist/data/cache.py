"""Copies of objects on the disk of a node, for what needs files: memory maps, model loaders."""

import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from upath import UPath

from vlcp_dist.data import objects
from vlcp_dist.data.locks import flock
from vlcp_dist.data.threads import concurrently

Versions = dict[str, tuple[int, str]]


def folder() -> Path:
    """Where this node keeps its copies: `$VLCP_CACHE`, else `~/.cache/vlcp_dist`."""
    return Path(os.environ.get("VLCP_CACHE") or Path.home() / ".cache" / "vlcp_dist")


def copy_of(path: UPath) -> Path:
    """A file or folder of an object store, downloaded once per node and reused while it is unchanged.

    Copies lie in `folder()`, named by URL, sizes and ETags. They may be deleted whenever no run is going on.

    Raises:
        FileNotFoundError: there is no such file or folder.
        OSError: it changed while it was read, or the disk of the cache is full; the message names `path`.
    """
    with objects.naming(path):
        versions = objects.versions(path)
    cache = folder()
    entry = cache / hashlib.sha256(repr((str(path), sorted(versions.items()))).encode()).hexdigest()[:24]
    copy = entry / path.name
    if not _whole(copy, versions):
        cache.mkdir(parents=True, exist_ok=True)
        # One process of a node downloads and the others wait for it: a U-Net is not fetched once per GPU.
        with entry.with_suffix(".lock").open("w") as file:
            flock(file.fileno(), fcntl.LOCK_EX, cache)
            if not _whole(copy, versions):
                _download(path, versions, entry)
    return copy


def _whole(copy: Path, versions: Versions) -> bool:
    """Whether the copy is there at full length: a power cut can leave files empty that had been written."""
    try:
        return all((copy / name).stat().st_size == size for name, (size, _) in versions.items())
    except FileNotFoundError:
        return False


def _download(path: UPath, versions: Versions, entry: Path) -> None:
    temporary = entry.with_suffix(".tmp")  # one left there is of a process that was killed: this one holds the lock

    def get(name: str) -> None:
        target = temporary / path.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.fs.get_file((path / name).path if name else path.path, str(target))

    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with objects.naming(path):
            concurrently(get, versions, threads=8)
            if objects.versions(path) != versions or not _whole(temporary / path.name, versions):
                raise OSError(errno.EIO, "changed while it was read; run again", str(path))
        shutil.rmtree(entry, ignore_errors=True)
        temporary.rename(entry)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror} in {entry.parent}: {sum(size for size, _ in versions.values())} bytes were to be "
            f"written, {shutil.disk_usage(entry.parent).free} are free; delete what is old there, or set VLCP_CACHE",
            str(path),
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
