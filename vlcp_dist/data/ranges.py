"""Reads of parts of files, many at once, from local or mounted folders and from object stores."""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import pyarrow.parquet as pq
from upath import UPath

from vlcp_dist.data.classes import SourceError
from vlcp_dist.data.storage import Location

# Read ahead of a header in an object store: a few small members or one image's start, far less than a whole tar.
_AHEAD = 32 * 1024
_THREADS = 16  # files read at once from a mounted folder, which may be on a network


class Range(NamedTuple):
    """`size` bytes from `offset` of the file `path` below a root; the whole file when `size` is None."""

    path: str
    offset: int = 0
    size: int | None = None


def read_ranges(root: Location, ranges: Sequence[Range]) -> list[bytes | OSError | SourceError]:
    """The bytes of many ranges, in their order. What cannot be had is a value: FileNotFoundError for a file that
    is gone, `SourceError` for one that has become shorter, another OSError for what may pass."""
    found: Sequence[bytes | Exception]
    if isinstance(root, Path):
        with ThreadPoolExecutor(max(1, min(_THREADS, len(ranges)))) as pool:
            found = list(pool.map(lambda part: _read_local(root, part), ranges))
    else:
        found = _read_remote(root, ranges)
    return [_checked(below(root, part.path), part, content) for part, content in zip(ranges, found, strict=True)]


def below(root: Location, path: str) -> str:
    """`path` below `root` as the file system of `root` names it."""
    return str(root / path) if isinstance(root, Path) else f"{root.path.rstrip('/')}/{path}"


def open_hops(path: Location) -> BinaryIO:
    """A file for many small reads that are far apart."""
    if isinstance(path, Path):
        return path.open("rb")
    return cast(BinaryIO, path.fs.open(path.path, "rb", block_size=_AHEAD, cache_type="readahead"))


def open_parquet(path: Location, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A parquet file of which only the parts asked for are fetched. `metadata` spares reading them again."""
    if isinstance(path, Path):
        return pq.ParquetFile(str(path), metadata=metadata)
    file = path.fs.open(path.path, "rb", cache_type="none")
    return pq.ParquetFile(file, metadata=metadata, pre_buffer=True)


def named(error: Exception, path: str) -> OSError:
    """What the storage said, with the path in it, which not every file system puts there."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return error if isinstance(error, OSError) and path in str(error) else OSError(f"{path}: {error!r}")


def _read_local(root: Path, part: Range) -> bytes | OSError:
    try:
        with (root / part.path).open("rb") as file:
            file.seek(part.offset)
            return file.read(-1 if part.size is None else part.size)
    except OSError as error:
        return error


def _read_remote(root: UPath, ranges: Sequence[Range]) -> list[bytes | Exception]:
    asked = [part for part in ranges if part.size != 0]  # a range of no bytes cannot be asked for
    options = {"max_concurrency": 1} if "s3" in root.fs.protocol else {}  # else s3fs asks for every size first
    contents = root.fs.cat_ranges(
        [below(root, part.path) for part in asked],
        [None if part.size is None else part.offset for part in asked],
        [None if part.size is None else part.offset + part.size for part in asked],
        on_error="return",
        **options,
    )
    answers = iter(contents)
    return [b"" if part.size == 0 else next(answers) for part in ranges]


def _checked(path: str, part: Range, content: bytes | Exception) -> bytes | OSError | SourceError:
    if isinstance(content, Exception):
        behind_the_end = isinstance(content, OSError) and content.errno == errno.EINVAL  # as object stores answer
        if not (part.size and behind_the_end):
            return named(content, path)
        content = b""
    if part.size is not None and len(content) != part.size:
        return SourceError(f"{path}: shorter than when it was indexed; restore it or index anew")
    return content
