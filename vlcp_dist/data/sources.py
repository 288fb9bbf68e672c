"""Data sets as they lie on disk (image folders, WebDataset tars, the digits) -> samples and their bytes."""

import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from vlcp_dist.data.classes import (
    ClassInfo,
    SourceError,
    find_listing,
    ids_of_labels,
    load_classes,
    select_ids,
)
from vlcp_dist.data.tars import IMAGE_EXTENSIONS, extension_of, tar_samples

# What data sets call their splits -> what they are here.
_SPLITS = {"train": "train", "val": "test", "validation": "test", "test": "test"}

Wanted = list[str] | str | None
Names = str | Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: `key` is unique in its source, of `[A-Za-z0-9_-]` only; `split` is train, test, or all (the
    source has no splits); `ref` tells the source where the bytes are."""

    key: str
    class_id: str
    split: str
    ref: str


class Source(Protocol):
    """A data set."""

    def classes(self) -> list[ClassInfo]:
        """The classes, sorted by id."""

    def samples(self) -> Iterator[Sample]:
        """All samples, sorted by split, class id and key. Reads no pixels."""

    def read(self, ref: str) -> bytes:
        """The encoded image of a sample. Thread-safe, and cheap in a new process: no scan of the source."""


def open_source(
    kind: str,
    *,
    path: str | None,
    image_size: int,
    classes: Wanted = None,
    class_names: Names = None,
) -> Source:
    """The data set of a kind: "digits" (needs no path), "imagefolder" or "webdataset" (a local folder).

    `image_size` is the side in pixels to which the 8 x 8 digits are enlarged; other kinds keep their bytes.
    `classes` limits the source to these ids, or to a subset of `classes.SUBSETS`. `class_names` is a listing
    file or a mapping of id to name, where the one beside the images will not do (see `classes.load_classes`).
    Raises `SourceError` for data that cannot be used as it is.
    """
    if kind == "digits":
        if path is not None:
            raise SourceError(f"the digits come with scikit-learn and have no path, got {path!r}; leave it out")
        return Digits(image_size, classes, class_names)
    if kind not in ("imagefolder", "webdataset"):
        raise SourceError(f"unknown kind of source {kind!r}: use digits, imagefolder or webdataset")
    if path is None:
        raise SourceError(f"a source of kind {kind} needs a path")
    if "://" in path:
        raise SourceError(f"{path}: images are read from a local or mounted folder; mount or copy it first")
    root = Path(path)
    if not root.is_dir():
        raise SourceError(f"{path}: {'not a folder' if root.exists() else 'no such folder'}; check the path")
    return (ImageFolder if kind == "imagefolder" else WebDataset)(root, classes, class_names)


class Digits:
    """scikit-learn's 1797 handwritten digits, enlarged and PNG-encoded on reading."""

    def __init__(self, image_size: int, classes: Wanted, class_names: Names):
        from sklearn.datasets import load_digits

        if image_size < 1:
            raise SourceError(f"the digits need a positive image size, got {image_size}")
        words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        names = class_names or {f"digit-{i}": f"digit {word}" for i, word in enumerate(words)}
        self._classes = load_classes(select_ids([f"digit-{i}" for i in range(10)], classes), listing=names)
        self._size = image_size
        digits = load_digits()
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self._labels = digits.target

    def classes(self) -> list[ClassInfo]:
        return self._classes

    def samples(self) -> Iterator[Sample]:
        for info in self._classes:
            for index in np.flatnonzero(self._labels == int(info.id.removeprefix("digit-"))):
                yield Sample(f"{info.id}-{index:04d}", info.id, "all", str(index))

    def read(self, ref: str) -> bytes:
        small = Image.fromarray(self._images[int(ref)])
        buffer = io.BytesIO()
        small.resize((self._size, self._size), Image.Resampling.BICUBIC).save(buffer, "PNG")
        return buffer.getvalue()


class ImageFolder:
    """`<root>/<class>/**/<image>`, or the same below `<root>/train` and `<root>/val` (validation, test)."""

    def __init__(self, root: Path, classes: Wanted, class_names: Names):
        self._root = root
        self._splits = _split_folders(root)
        found = {split: _class_folders(root / folder) for split, folder in self._splits.items()}
        self._classes = _choose(root, found, classes, class_names or find_listing(root))

    def classes(self) -> list[ClassInfo]:
        return self._classes

    def samples(self) -> Iterator[Sample]:
        seen: dict[str, str] = {}
        for split, prefix in sorted(self._splits.items()):
            for info in self._classes:
                folder = prefix + info.id
                refs: dict[str, str] = {}
                for ref in _image_files(self._root, folder):
                    below = ref.removeprefix(folder + "/").rpartition(".")[0]
                    # ImageNet's files carry their wnid already.
                    name = below if below.startswith(f"{info.id}_") else f"{info.id}/{below}"
                    key = _key(name if split == "all" else f"{split}/{name}", origin=ref)
                    _claim(seen, key, ref, self._root)
                    refs[key] = ref
                if not refs:
                    raise SourceError(
                        f"{self._root / folder}: a class folder without images; add some "
                        f"({', '.join(sorted(IMAGE_EXTENSIONS))}), remove it, or select other classes"
                    )
                yield from (Sample(key, info.id, split, refs[key]) for key in sorted(refs))

    def read(self, ref: str) -> bytes:
        return (self._root / ref).read_bytes()


class WebDataset:
    """`<root>/*.tar`, named train-* and val-* (or validation-*, or test-*) where the set is split.

    Each sample is one image member and a label: a `.cls` member, or "label" or "class" in a `.json` member.
    """

    def __init__(self, root: Path, classes: Wanted, class_names: Names):
        self._root = root
        self._wanted = classes
        self._listing = class_names or find_listing(root)
        self._tars = _tar_splits(root)

    def classes(self) -> list[ClassInfo]:
        return self._scan[0]

    def samples(self) -> Iterator[Sample]:
        return iter(self._scan[1])

    def read(self, ref: str) -> bytes:
        tar, offset, size = ref.rsplit(":", 2)
        with (self._root / tar).open("rb") as file:
            file.seek(int(offset))
            data = file.read(int(size))
        if len(data) != int(size):
            raise SourceError(f"{self._root / tar}: shorter than when it was indexed; restore it or index anew")
        return data

    @cached_property
    def _scan(self) -> tuple[list[ClassInfo], list[Sample]]:
        seen: dict[str, str] = {}
        places: dict[str, str] = {}
        entries = []
        for tar, split in self._tars.items():
            for sample in tar_samples(self._root / tar):
                key = _key(f"{tar.removesuffix('.tar')}/{sample.key}", origin=f"{tar}/{sample.key}")
                ref = f"{tar}:{sample.offset}:{sample.size}"
                _claim(seen, key, ref, self._root)
                places.setdefault(sample.label, f"{self._root / tar}: {sample.key}")
                entries.append((split, key, sample.label, ref))
        if not entries:
            raise SourceError(f"{self._root}: no samples in its {len(self._tars)} tar files; check the path")
        ids = ids_of_labels(places, listing=self._listing)
        found: dict[str, set[str]] = {split: set() for split in self._tars.values()}
        for split, _, label, _ in entries:
            found[split].add(ids[label])
        classes = _choose(self._root, found, self._wanted, self._listing)
        keep = {info.id for info in classes}
        samples = [Sample(key, ids[label], split, ref) for split, key, label, ref in entries if ids[label] in keep]
        samples.sort(key=lambda sample: (sample.split, sample.class_id, sample.key))
        return classes, samples


def _split_folders(root: Path) -> dict[str, str]:
    """Split -> prefix of its class folders; {"all": ""} for a tree without splits."""
    folders = [entry.name for entry in _visible(root) if entry.is_dir()]
    named = [name for name in folders if name.lower() in _SPLITS]
    if not named:
        return {"all": ""}
    if others := sorted(set(folders) - set(named)):
        raise SourceError(
            f"{root}: split folders ({', '.join(named)}) beside others ({', '.join(others[:8])}); "
            f"keep either train and one of val, validation, test there, or only class folders"
        )
    _check_one_each(root, named)
    return {_SPLITS[name.lower()]: f"{name}/" for name in named}


def _tar_splits(root: Path) -> dict[str, str]:
    """Name of each tar -> its split, sorted by name."""
    tars = [entry.name for entry in _visible(root) if entry.name.endswith(".tar")]
    if not tars:
        raise SourceError(f"{root}: no *.tar files; check the path (compressed tars must be unpacked to .tar)")
    matches = {tar: re.match(r"(train|val|validation|test)(?![a-z])", tar.lower()) for tar in tars}
    if not any(matches.values()):
        return dict.fromkeys(tars, "all")
    if unnamed := [tar for tar, match in matches.items() if not match]:
        raise SourceError(
            f"{root}: some tars are named by split, but {unnamed[0]} is not; name all of them train-* or val-*, or none"
        )
    words = {tar: match[1] for tar, match in matches.items() if match}
    _check_one_each(root, set(words.values()))
    return {tar: _SPLITS[word] for tar, word in words.items()}


def _check_one_each(root: Path, names: Collection[str]) -> None:
    """No two sets for one split (val and test): which one is reported must be somebody's choice."""
    for split in ("train", "test"):
        if len(same := sorted(name for name in names if _SPLITS[name.lower()] == split)) > 1:
            raise SourceError(f"{root}: {' and '.join(same)} would both be the {split} split; move all but one away")


def _choose(root: Path, found: Mapping[str, Collection[str]], wanted: Wanted, listing: Names | Path) -> list[ClassInfo]:
    """The wanted ones of the class ids found in each split, all of which every split must have."""
    if not any(found.values()):
        raise SourceError(f"{root}: no class folders; expected {root}/<class>/<image>, check the path")
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


def _class_folders(folder: Path) -> list[str]:
    names = []
    for entry in _visible(folder):
        if entry.is_dir():
            names.append(entry.name)
        elif extension_of(entry.name) in IMAGE_EXTENSIONS:
            raise SourceError(f"{entry.path}: an image outside any class folder; move it into {folder}/<class>/")
    return names


def _image_files(root: Path, folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The images anywhere below a folder, as paths relative to `root`."""
    status = (root / folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise SourceError(f"{root / folder}: a link to a folder that holds it, so it has no end; remove it")
    for entry in _visible(root / folder):
        if entry.is_dir():
            yield from _image_files(root, f"{folder}/{entry.name}", above | {here})
        elif extension_of(entry.name) in IMAGE_EXTENSIONS:
            yield f"{folder}/{entry.name}"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)


def _key(name: str, *, origin: str) -> str:
    """`name` as a key: `/` becomes `-`; what else is unsafe becomes `_`, and a hash of `origin` is added."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name.replace("/", "-"))
    if safe == name.replace("/", "-") and len(safe) <= 96:
        return safe
    try:
        digest = hashlib.sha256(origin.encode()).hexdigest()
    except UnicodeEncodeError:
        raise SourceError(f"{origin!r}: the name is not UTF-8; rename the file") from None
    return f"{safe[:80]}-{digest[:8]}"


def _claim(seen: dict[str, str], key: str, ref: str, root: Path) -> None:
    if (other := seen.setdefault(key, ref)) != ref:
        raise SourceError(f"{root}: {other} and {ref} would both have the key {key}; rename one of them")
