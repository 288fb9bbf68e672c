"""The one place where files are written: a file is either absent or whole."""

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path


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


def create(path: Path, content: bytes) -> bool:
    """Write `path` if nobody has: of several writers at once exactly one gets True."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_bytes(content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _sync_folder(path.parent)
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Delete what writers that were killed have left behind."""
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
