"""The one place where files are written: a file is either absent or whole."""

import contextlib
import hashlib
import os
import shutil
import time
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
