"""Image folders as a data set: a folder for each class, and ImageNet's flat `val` beside its labels."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from vlcp_dist.data.classes import ClassInfo, SourceError, find_listing
from vlcp_dist.data.ranges import Range, read_ranges
from vlcp_dist.data.samples import (
    IMAGE_EXTENSIONS,
    SPLITS,
    Names,
    OnProgress,
    Sample,
    Wanted,
    check_one_each,
    choose,
    claim,
    class_key,
    extension_of,
    threads_for,
)
from vlcp_dist.data.storage import Location
from vlcp_dist.data.validation import images_of_class


class _Layout(NamedTuple):
    """What the folders at the top say, before any class folder is looked into."""

    splits: Mapping[str, str]  # split -> prefix of its class folders
    flat: Mapping[str, list[str]] | None  # class id -> images of the test split, where no folders tell the class
    classes: list[ClassInfo]


class ImageFolder:
    """`<root>/<class>/**/<image>`, or the same below `<root>/train` and `<root>/val` (validation, test).

    A `val` that holds the images themselves, as ImageNet's does, gets its labels from a file (see `validation`).
    """

    def __init__(self, root: Location, classes: Wanted, class_names: Names):
        self._root = root
        self._wanted = classes
        self._class_names = class_names

    def classes(self) -> list[ClassInfo]:
        return self._layout.classes

    def samples(self, on_progress: OnProgress | None = None) -> Iterator[Sample]:
        folders = [(split, info.id) for split in sorted(self._layout.splits) for info in self._layout.classes]
        seen: dict[str, str] = {}
        with ThreadPoolExecutor(threads_for(self._root)) as pool:
            for done, found in enumerate(pool.map(self._list, folders), 1):
                for sample in found:
                    claim(seen, sample, self._root)
                yield from found
                if on_progress:
                    on_progress(done, len(folders))

    def read(self, refs: Sequence[str]) -> list[bytes | OSError | SourceError]:
        return read_ranges(self._root, [Range(ref) for ref in refs])

    @cached_property
    def _layout(self) -> _Layout:
        splits = _split_folders(self._root)
        found: dict[str, list[str]] = {}
        flat = None
        for split, prefix in splits.items():
            folder = self._root / prefix
            entries = visible(folder)
            images = [name for name, is_folder in entries if not is_folder and extension_of(name) in IMAGE_EXTENSIONS]
            found[split] = [name for name, is_folder in entries if is_folder]
            if images and split == "test" and not found[split]:
                flat = images_of_class([self._root, folder], images, of=folder)
                found[split] = list(flat)
            elif images:
                raise SourceError(
                    f"{folder / images[0]}: an image outside any class folder; move it into {folder}/<class>/"
                )
        if not any(found.values()):
            raise SourceError(f"{self._root}: no class folders; expected {self._root}/<class>/<image>, check the path")
        listing = self._class_names or find_listing(self._root)
        return _Layout(splits, flat, choose(self._root, found, self._wanted, listing))

    def _list(self, item: tuple[str, str]) -> list[Sample]:
        """The samples of a class in a split, sorted by key."""
        split, class_id = item
        prefix = self._layout.splits[split]
        if split == "test" and self._layout.flat is not None:
            names = self._layout.flat[class_id]
        else:
            prefix = f"{prefix}{class_id}/"
            names = _images_below(self._root / prefix)
        if not names:
            raise SourceError(
                f"{self._root / prefix}: a class folder without images; add some "
                f"({', '.join(sorted(IMAGE_EXTENSIONS))}), remove it, or select other classes"
            )
        samples = [
            Sample(class_key(name.rpartition(".")[0], class_id, split, origin=ref), class_id, split, ref)
            for name in names
            for ref in (prefix + name,)
        ]
        samples.sort(key=attrgetter("key"))
        return samples


def visible(folder: Location) -> list[tuple[str, bool]]:
    """What is in a folder and not hidden: names, and whether they are folders; sorted."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    here = folder.path.rstrip("/")
    paths = [(info["name"].rstrip("/"), info["type"] == "directory") for info in folder.fs.ls(here, detail=True)]
    names = [(path.rpartition("/")[2], is_folder) for path, is_folder in paths if path != here]
    return sorted((name, is_folder) for name, is_folder in names if not name.startswith("."))


def _split_folders(root: Location) -> dict[str, str]:
    """Split -> prefix of its class folders; {"all": ""} for a tree without splits."""
    folders = [name for name, is_folder in visible(root) if is_folder]
    named = [name for name in folders if name.lower() in SPLITS]
    if not named:
        return {"all": ""}
    if others := sorted(set(folders) - set(named)):
        raise SourceError(
            f"{root}: split folders ({', '.join(named)}) beside others ({', '.join(others[:8])}); "
            f"keep either train and one of val, validation, test there, or only class folders"
        )
    check_one_each(root, named)
    return {SPLITS[name.lower()]: f"{name}/" for name in named}


def _images_below(folder: Location) -> list[str]:
    """The images anywhere below a folder, as paths relative to it."""
    if isinstance(folder, Path):
        return _local_images(folder)
    start = len(folder.path.rstrip("/")) + 1
    names = [path[start:] for path in folder.fs.find(folder.path)]  # one listing, however deep
    return [name for name in names if extension_of(name) in IMAGE_EXTENSIONS and "/." not in f"/{name}"]


def _local_images(folder: Path, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> list[str]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise SourceError(f"{folder}: a link to a folder that holds it, so it has no end; remove it")
    found = []
    for name, is_folder in visible(folder):
        if is_folder:
            found += _local_images(folder / name, f"{prefix}{name}/", above | {here})
        elif extension_of(name) in IMAGE_EXTENSIONS:
            found.append(prefix + name)
    return found
