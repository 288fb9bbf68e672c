"""What all kinds of data sets share: a sample and its key, the names of splits, the choice of classes."""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from vlcp_dist.data.classes import ClassInfo, SourceError, load_classes, select_ids
from vlcp_dist.data.storage import Location

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
# What data sets call their splits -> what they are here.
SPLITS = {"train": "train", "val": "test", "validation": "test", "test": "test"}
# Folders or files listed at once. Network file systems and object stores answer late, but many at a time; on a local
# disk, where every answer is there at once, more threads only wait for each other.
_THREADS, _THREADS_OF_A_STORE = 8, 32

Wanted = list[str] | str | None
Names = str | Mapping[str, str] | None
OnProgress = Callable[[int, int], None]

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


class Sample(NamedTuple):
    """One image: `key` is unique in its source, of `[A-Za-z0-9_-]` only; `split` is train, test, or all (the
    source has no splits); `ref` tells the source where the bytes are."""

    key: str
    class_id: str
    split: str
    ref: str


def threads_for(root: Location) -> int:
    """How many folders or files of a source are to be listed at once. The result is the same for any number."""
    return _THREADS if isinstance(root, Path) else _THREADS_OF_A_STORE


def extension_of(name: str) -> str:
    """What follows the last dot of a file name, in lower case; empty without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def make_key(name: str, *, origin: str) -> str:
    """`name` as a key: `/` becomes `-`; what else is unsafe becomes `_`, and a hash of `origin` is added.

    Raises:
        SourceError: a name that is not UTF-8.
    """
    flat = name.replace("/", "-")
    if not _UNSAFE.search(flat) and len(flat) <= 96:
        return flat
    try:
        digest = hashlib.sha256(origin.encode()).hexdigest()
    except UnicodeEncodeError:
        raise SourceError(f"{origin!r}: the name is not UTF-8; rename the file") from None
    return f"{_UNSAFE.sub('_', flat)[:80]}-{digest[:8]}"


def class_key(stem: str, class_id: str, split: str, *, origin: str) -> str:
    """The key of a file `stem` of a class: the same for a data set in folders and in its archives.

    ImageNet's training files carry their wnid already, which is not repeated.
    """
    name = stem if stem.startswith(f"{class_id}_") else f"{class_id}/{stem}"
    return make_key(name if split == "all" else f"{split}/{name}", origin=origin)


def claim(seen: dict[str, str], sample: Sample, root: Location) -> None:
    """Note whose key it is.

    Raises:
        SourceError: two samples would have one key.
    """
    if (other := seen.setdefault(sample.key, sample.ref)) != sample.ref:
        raise SourceError(f"{root}: {other} and {sample.ref} would both have the key {sample.key}; rename one of them")


def splits_by_name(root: Location, files: Collection[str], extension: str) -> dict[str, str]:
    """File -> the word for a split (a key of `SPLITS`) that its name begins with, or "all" where none has one.

    Raises:
        SourceError: there are no files, or some are named by split and others are not.
    """
    if not files:
        raise SourceError(f"{root}: no *.{extension} files; check the path (compressed files must be unpacked first)")
    names = {file: file.rpartition("/")[2].lower() for file in sorted(files)}
    words = {file: re.match(r"(train|val|validation|test)(?![a-z])", name) for file, name in names.items()}
    if not any(words.values()):
        return dict.fromkeys(words, "all")
    if unnamed := [file for file, match in words.items() if not match]:
        raise SourceError(
            f"{root}: some files are named by split, but {unnamed[0]} is not; name all train-* or val-*, or none"
        )
    return {file: match[1] for file, match in words.items() if match}


def check_one_each(root: Location, words: Collection[str]) -> None:
    """No two sets for one split (val and test): which one is reported must be somebody's choice.

    Raises:
        SourceError: there are two.
    """
    for split in ("train", "test"):
        if len(same := sorted(word for word in words if SPLITS.get(word.lower()) == split)) > 1:
            raise SourceError(f"{root}: {' and '.join(same)} would both be the {split} split; move all but one away")


def choose(
    root: Location, found: Mapping[str, Collection[str]], wanted: Wanted, listing: Names | Location
) -> list[ClassInfo]:
    """The wanted ones of the class ids found in each split, all of which every split must have.

    Raises:
        SourceError: a class is missing or has no name.
    """
    try:
        classes = load_classes(select_ids(set().union(*found.values()), wanted), listing=listing)
    except SourceError as error:
        raise SourceError(f"{root}: {error}") from None
    for split, ids in found.items():
        if missing := [info.id for info in classes if info.id not in ids]:
            raise SourceError(
                f"{root}: the {split} split lacks {len(missing)} of {len(classes)} classes "
                f"({', '.join(missing[:8])}); add them or select other classes"
            )
    return classes
