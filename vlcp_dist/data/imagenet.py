"""ImageNet's archives as they are distributed, read in place: nothing is unpacked."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from vlcp_dist.data.classes import ClassInfo, SourceError, find_listing
from vlcp_dist.data.ranges import open_hops, read_ranges
from vlcp_dist.data.samples import (
    IMAGE_EXTENSIONS,
    Names,
    OnProgress,
    Sample,
    Wanted,
    choose,
    claim,
    class_key,
    extension_of,
    threads_for,
)
from vlcp_dist.data.storage import Location
from vlcp_dist.data.tars import Member, members, size_of, tar_range, tar_ref
from vlcp_dist.data.validation import images_of_class

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"


class _Layout(NamedTuple):
    train: dict[str, Member]  # wnid -> the tar of its images, inside the training archive
    test: dict[str, list[Member]]  # wnid -> its validation images
    classes: list[ClassInfo]


class ImageNet:
    """`<root>/ILSVRC2012_img_train.tar`, a tar of one tar for each class, and `<root>/ILSVRC2012_img_val.tar` with
    a label file beside it (see `validation`). Keys are those of the same images in folders."""

    def __init__(self, root: Location, classes: Wanted, class_names: Names):
        self._root = root
        self._wanted = classes
        self._class_names = class_names

    def classes(self) -> list[ClassInfo]:
        return self._layout.classes

    def samples(self, on_progress: OnProgress | None = None) -> Iterator[Sample]:
        _, test, classes = self._layout
        seen: dict[str, str] = {}
        for info in classes:
            found = _samples(VALIDATION, test[info.id], info.id, "test")
            for sample in found:
                claim(seen, sample, self._root)
            yield from found
        with ThreadPoolExecutor(threads_for(self._root)) as pool:
            for done, found in enumerate(pool.map(self._list, [info.id for info in classes]), 1):
                for sample in found:
                    claim(seen, sample, self._root)
                yield from found
                if on_progress:
                    on_progress(done, len(classes))

    def read(self, refs: Sequence[str]) -> list[bytes | OSError | SourceError]:
        return read_ranges(self._root, [tar_range(ref) for ref in refs])

    @cached_property
    def _layout(self) -> _Layout:
        if missing := [name for name in (TRAIN, VALIDATION) if not (self._root / name).is_file()]:
            raise SourceError(
                f"{self._root / missing[0]}: no such file; the kind imagenet is a folder with {TRAIN} and {VALIDATION}"
                f" (for unpacked images use imagefolder)"
            )
        train: dict[str, Member] = {}
        for member in self._members(TRAIN):
            wnid, _, extension = member.name.removeprefix("./").rpartition(".")
            if extension != "tar" or wnid in train:
                raise SourceError(
                    f"{self._root / TRAIN}: member {member.name} is not one tar for each class; "
                    f"fetch the archive as it is distributed"
                )
            train[wnid] = member
        images = {member.name: member for member in self._members(VALIDATION) if _is_image(member)}
        named = images_of_class([self._root], list(images), of=self._root / VALIDATION)
        test = {wnid: [images[name] for name in names] for wnid, names in named.items()}
        listing = self._class_names or find_listing(self._root)
        return _Layout(train, test, choose(self._root, {"train": train, "test": test}, self._wanted, listing))

    def _members(self, archive: str) -> list[Member]:
        with open_hops(self._root / archive) as file:
            return list(members(file, self._root / archive, 0, size_of(file)))

    def _list(self, class_id: str) -> list[Sample]:
        """The training samples of a class, sorted by key."""
        inner = self._layout.train[class_id]
        place = f"{self._root / TRAIN}: {inner.name}"
        with open_hops(self._root / TRAIN) as file:
            images = [
                member for member in members(file, place, inner.offset, inner.offset + inner.size) if _is_image(member)
            ]
        if not images:
            raise SourceError(f"{place}: a class without images; fetch the archive again or select other classes")
        return _samples(TRAIN, images, class_id, "train")


def _samples(archive: str, images: Sequence[Member], class_id: str, split: str) -> list[Sample]:
    samples = []
    for member in images:
        stem = member.name.removeprefix("./").rpartition(".")[0]
        key = class_key(stem, class_id, split, origin=f"{archive}/{member.name}")
        samples.append(Sample(key, class_id, split, tar_ref(archive, member.offset, member.size)))
    samples.sort(key=attrgetter("key"))
    return samples


def _is_image(member: Member) -> bool:
    return extension_of(member.name) in IMAGE_EXTENSIONS
