"""The one place where files are written: a file is either absent or whole."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from upath import UPath

from vlcp_dist.errors import InputError

# A local path, or a URL that fsspec opens (s3://, gs://). Both speak pathlib.
Location = Path | UPath


def locate(place: str) -> Location:
    """The path or URL as an absolute location.

    Listings of object stores are never cached: other machines write to them all the time.

    Raises:
        InputError: nothing installed here opens such a URL; the message says what to install.
    """
    if "://" not in place:
        return Path(os.path.abspath(place))  # noqa: PTH100 - resolves `..`, follows no links
    try:
        location = UPath(place, use_listings_cache=False)
        _ = location.fs
    except (ImportError, ValueError) as error:
        scheme = place.partition("://")[0]
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme)
        hint = f"install vlcp-dist[{extra}]" if extra else "use a local path, s3:// or gs://"
        raise InputError(f"{place}: {error}; {hint}") from error
    return location


def write(path: Path, content: bytes | Path) -> str:
    """Put `content` (bytes, or a local file to copy) at `path` in one step and return its sha256.

    The bytes go to a hidden temporary file beside the target, are read back and compared, flushed to the disk and
    renamed. A crash at any point leaves the old file or the new one, never a part of it.

    Raises:
        OSError: the disk is full, or what is read back differs from what was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if isinstance(content, Path):
            expected = sha256(content)
            shutil.copyfile(content, temporary)
        else:
            expected = hashlib.sha256(content).hexdigest()
            temporary.write_bytes(content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if sha256(temporary) != expected:
            raise OSError(f"{path}: read back other bytes than were written")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return expected


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold `path` as a lock; the kernel releases it when this process ends, however it ends.

    Raises:
        InputError: another process holds it; the message says which, where and since when.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path.parent} is in use by {path.read_text().strip() or 'another process'}; "
                f"wait for it, stop it, or choose another root"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
        file.flush()
        yield


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path, older_than: float = 3600) -> None:
    """Delete what writers that were killed have left behind; younger ones may belong to a live writer."""
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > older_than:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
