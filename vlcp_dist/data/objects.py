"""Requests to an object store: whole objects put, read, hashed and listed, with errors that say which."""

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from vlcp_dist.data.threads import THREADS

BLOCK = 16 * 2**20  # bytes of one ranged request

# A store that a whole cluster asks at once answers 503 for a while. botocore's `legacy` mode goes on asking, each time
# after a longer pause; its `standard` mode has a budget of retries that many threads in trouble at once use up.
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"retries": {"mode": "legacy", "max_attempts": 10}, "max_pool_connections": 2 * THREADS}
}
# s3fs asks for the size before it reads an object whole, unless it is told to read with one request.
ONE_REQUEST = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}


def put(path: UPath, content: bytes | Path) -> None:
    if isinstance(content, Path):
        path.fs.put_file(str(content), path.path)
    else:
        path.fs.pipe_file(path.path, content)


def get(path: UPath) -> bytes:
    data: bytes = path.fs.cat_file(path.path, **ONE_REQUEST.get(path.protocol, {}))
    return data


def remove(path: UPath) -> None:
    path.fs.rm_file(path.path)


def sha256(path: UPath, size: int | None = None) -> str:
    """Of what the store holds. `size` in bytes, where it is known, saves asking for it."""
    if size is not None and size <= BLOCK:
        return hashlib.sha256(get(path)).hexdigest()
    digest = hashlib.sha256()
    size = int(path.fs.info(path.path)["size"])
    for begin in range(0, size, 4 * BLOCK):  # a few blocks at a time: it may be larger than memory
        starts = list(range(begin, min(begin + 4 * BLOCK, size), BLOCK))
        ends = [min(start + BLOCK, size) for start in starts]
        for block in path.fs.cat_ranges([path.path] * len(starts), starts, ends, on_error="raise"):
            digest.update(block)
    return digest.hexdigest()


def below(folder: UPath) -> dict[str, dict[str, Any]]:
    """What the store says of every object below `folder`, by relative name, in one listing."""
    prefix = folder.path.rstrip("/") + "/"
    return {
        name.removeprefix(prefix): info
        for name, info in folder.fs.find(folder.path, detail=True).items()
        if name.startswith(prefix) and not name.endswith("/")  # some tools put empty objects for folders
    }


def versions(path: UPath) -> dict[str, tuple[int, str]]:
    """Size and identity of an object (its name is ""), or of all below a folder, by relative name."""
    info = path.fs.info(path.path)
    found = {"": info} if info["type"] == "file" else below(path)
    return {name: (int(info["size"]), identity(info)) for name, info in found.items()}


def identity(info: dict[str, Any]) -> str:
    """What changes when an object is put anew: its ETag, or all that the store says of it."""
    return str(info.get("ETag") or info.get("etag") or info)


@contextlib.contextmanager
def naming(path: UPath) -> Iterator[None]:
    """Gives errors the location that they lack: "the specified key does not exist".

    Raises:
        OSError: for any error; of its kind where it is one of FileNotFoundError, PermissionError, TimeoutError.
    """
    numbers = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename == str(path):
            raise
        number = getattr(error, "errno", None) or next((n for k, n in numbers.items() if isinstance(error, k)), None)
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise OSError(number or errno.EIO, reason, str(path)) from error
