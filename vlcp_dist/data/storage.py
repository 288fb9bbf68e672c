"""The one place where files of a run are read and written, on local paths and object stores: absent or whole."""

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from upath import UPath

from vlcp_dist.data import cache, locks, objects
from vlcp_dist.data.threads import concurrently
from vlcp_dist.errors import InputError

# A local path, or a URL that fsspec opens (s3://, gs://). Both speak pathlib.
Location = Path | UPath


def locate(place: str) -> Location:
    """The path or URL as an absolute location.

    Listings of object stores are never cached: other machines write to them all the time.

    Raises:
        InputError: nothing installed here opens such a URL; the message says what to install.
    """
    if "://" not in place or place.startswith("file://"):
        return Path(os.path.abspath(place.removeprefix("file://")))  # noqa: PTH100 - resolves `..`, follows no links
    scheme = place.partition("://")[0]
    options = objects.S3_OPTIONS if scheme in ("s3", "s3a") else {}
    try:
        location = UPath(place, use_listings_cache=False, **options)
        _ = location.fs
    except (ImportError, ValueError) as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme)
        hint = f"install vlcp-dist[{extra}]" if extra else "use a local path, s3:// or gs://"
        raise InputError(f"{place}: {error}; {hint}") from error
    return location


def write(path: Location, content: bytes | Path) -> str:
    """Put `content` (bytes, or a local file to copy) at `path` in one step, read it back, and return its sha256.

    On a disk the bytes go to a hidden temporary file beside the target, are read back and compared, flushed and
    renamed: a crash at any point leaves the old file or the new one, never a part of it. A store puts whole objects.

    Raises:
        OSError: the disk is full, the store refuses, or what is read back differs; the message names `path`.
    """
    expected = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    if isinstance(path, Path):
        with _temporary(path, content) as temporary:
            _flush(temporary)
            _check(path, expected, sha256(temporary))
        _flush(path.parent)
        return expected
    with objects.naming(path):
        objects.put(path, content)
        # Checksum headers would be cheaper, but they differ from store to store and some only accept them. Reading back
        # is certain everywhere, and shows that what readers get is what was meant. It costs one read within the
        # store's region (a second for a shard of 65 MB, half a minute for a U-Net of 3.4 GB), which no GPU waits for.
        found = objects.sha256(path, size_of(content))
        if found != expected:
            objects.remove(path)
    _check(path, expected, found)
    return expected


def publish(path: Location, content: bytes) -> None:
    """Put `content` at `path` in one step, for what may be lost in a crash: heartbeats, progress.

    Raises:
        OSError: as `write`.
    """
    if isinstance(path, Path):
        with _temporary(path, content):
            pass
    else:
        with objects.naming(path):
            objects.put(path, content)


def fetch(paths: Sequence[Location], *, missing: bytes | None = None) -> list[bytes]:
    """The contents of many small files, read concurrently. `missing` stands for a file that is not there.

    Raises:
        FileNotFoundError: a file is not there and `missing` is not given.
        OSError: a file cannot be read; the message names it.
    """

    def read(path: Location) -> bytes:
        try:
            if isinstance(path, Path):
                return path.read_bytes()
            with objects.naming(path):
                return objects.get(path)
        except FileNotFoundError:
            if missing is None:
                raise
            return missing

    return concurrently(read, paths)


def listing(folder: Location) -> dict[str, int]:
    """Every file below `folder`: its path relative to it, with `/`, and its bytes. Empty if there is no such folder."""
    if isinstance(folder, Path):
        return dict(_walk(str(folder), ""))
    with objects.naming(folder):
        return {name: int(info["size"]) for name, info in objects.below(folder).items()}


def local(path: Location) -> Path:
    """A file or folder as a local path: itself, or the node's copy of it (see `cache`), reused while it is unchanged.

    Raises:
        FileNotFoundError: there is no such file or folder on the store.
        OSError: it changed while it was read, or the disk of the cache is full.
    """
    return path if isinstance(path, Path) else cache.copy_of(path)


@contextlib.contextmanager
def exclusive(path: Location) -> Iterator[locks.FileLock | locks.Lease]:
    """Hold `path` as a lock. `lost()` of what is yielded says whether it was lost: whoever held it must then stop.

    On a disk the kernel keeps it, and releases it when this process ends, however it ends. On an object store it is a
    lease (see `locks`): others may take it once it has not been renewed for long.

    Raises:
        InputError: another process holds it (the message says which, where and since when), it cannot be written, or
            the file system has no locks.
    """
    if isinstance(path, Path):
        with locks.hold_file(path) as lock:
            yield lock
    else:
        with locks.hold_lease(path) as lease:
            yield lease


def move(folder: Location, target: Location, first: str, last: str = "") -> None:
    """Rename a folder. Where that is copying and deleting, the sub-folder `first` goes first and the file `last` last.

    So wherever a crash cuts it short, what makes the folder count is gone before all else, and what tells its origin
    after all else.
    """
    if isinstance(folder, Path):
        folder.rename(str(target))
        return
    source, goal = folder, UPath(target)
    turns: tuple[list[str], ...] = ([], [], [])
    for name in listing(source):
        turns[0 if name.startswith(f"{first}/") else 2 if name == last else 1].append(name)
    with objects.naming(source):
        for names in turns:
            concurrently(lambda name: source.fs.cp_file((source / name).path, (goal / name).path), names)
            concurrently(lambda name: objects.remove(source / name), names)


def remove(path: Location) -> None:
    """Delete a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if isinstance(path, Path):
            path.unlink()
        else:
            with objects.naming(path):
                objects.remove(path)


def sha256(path: Location) -> str:
    if isinstance(path, Path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with objects.naming(path):
        return objects.sha256(path)


def remove_temporaries(folder: Location, older_than: float = 3600) -> None:
    """Delete what writers that were killed have left behind; younger ones may belong to a live writer.

    An object store has none: an object that was not put whole does not appear.
    """
    if not isinstance(folder, Path):
        return
    for name, _ in _walk(str(folder), ""):
        file = name.rpartition("/")[2]
        if file.startswith(".") and file.endswith(".tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - (folder / name).stat().st_mtime > older_than:
                    (folder / name).unlink()


def size_of(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


@contextlib.contextmanager
def _temporary(path: Path, content: bytes | Path) -> Iterator[Path]:
    """`content` in a hidden file beside `path`, which takes its place if the body ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            temporary.write_bytes(content)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno is None:  # ours, which names the path
            raise
        reason = str(error.strerror)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
            reason += f": {size_of(content)} bytes were to be written, {free} are free; make space and run again"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Files below a local folder with their sizes. What vanishes meanwhile is passed over."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        else:
            with contextlib.suppress(FileNotFoundError):
                yield prefix + entry.name, entry.stat().st_size


def _check(path: Location, expected: str, found: str) -> None:
    if found != expected:
        raise OSError(f"{path}: read back other bytes than were written (sha256 {found}, not {expected})")
