"""WebDataset tars as a data set: each sample an image member beside a label."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vlcp_dist.data.classes import ClassInfo, SourceError, find_listing, ids_of_labels
from vlcp_dist.data.folders import visible
from vlcp_dist.data.ranges import read_ranges
from vlcp_dist.data.samples import (
    SPLITS,
    Names,
    OnProgress,
    Sample,
    Wanted,
    check_one_each,
    choose,
    claim,
    make_key,
    splits_by_name,
    threads_for,
)
from vlcp_dist.data.storage import Location
from vlcp_dist.data.tars import tar_range, tar_ref, tar_samples


class WebDataset:
    """`<root>/*.tar`, named train-* and val-* (or validation-*, or test-*) where the set is split.

    Each sample is one image member and a label: a `.cls` member, or "label" or "class" in a `.json` member.
    """

    def __init__(self, root: Location, classes: Wanted, class_names: Names):
        self._root = root
        self._wanted = classes
        self._class_names = class_names
        self._found: tuple[list[ClassInfo], list[Sample]] | None = None

    def classes(self) -> list[ClassInfo]:
        return self._scan()[0]

    def samples(self, on_progress: OnProgress | None = None) -> Iterator[Sample]:
        return iter(self._scan(on_progress)[1])

    def read(self, refs: Sequence[str]) -> list[bytes | OSError | SourceError]:
        return read_ranges(self._root, [tar_range(ref) for ref in refs])

    def _scan(self, on_progress: OnProgress | None = None) -> tuple[list[ClassInfo], list[Sample]]:
        """Classes and samples: which classes there are is known only once every label has been seen."""
        if self._found is None:
            self._found = self._list_all(on_progress)
        return self._found

    def _list_all(self, on_progress: OnProgress | None) -> tuple[list[ClassInfo], list[Sample]]:
        tars = self._splits()
        listing = self._class_names or find_listing(self._root)
        seen: dict[str, str] = {}
        places: dict[str, str] = {}
        labelled: list[Sample] = []
        with ThreadPoolExecutor(threads_for(self._root)) as pool:
            for done, (found, first) in enumerate(pool.map(self._list, tars.items()), 1):
                for sample in found:
                    claim(seen, sample, self._root)
                labelled += found
                places = first | places
                if on_progress:
                    on_progress(done, len(tars))
        if not labelled:
            raise SourceError(f"{self._root}: no samples in its {len(tars)} tar files; check the path")
        ids = ids_of_labels(places, listing=listing)
        present: dict[str, set[str]] = {split: set() for split in tars.values()}
        for _, label, split, _ in labelled:
            present[split].add(ids[label])
        classes = choose(self._root, present, self._wanted, listing)
        keep = {info.id for info in classes}
        samples = [Sample(key, ids[label], split, ref) for key, label, split, ref in labelled if ids[label] in keep]
        samples.sort(key=lambda sample: (sample.split, sample.class_id, sample.key))
        return classes, samples

    def _splits(self) -> dict[str, str]:
        words = splits_by_name(self._root, [name for name, _ in visible(self._root) if name.endswith(".tar")], "tar")
        check_one_each(self._root, set(words.values()))
        return {tar: SPLITS.get(word, word) for tar, word in words.items()}

    def _list(self, item: tuple[str, str]) -> tuple[list[Sample], dict[str, str]]:
        """The samples of a tar, with labels where class ids will be; the place where each label is seen first."""
        tar, split = item
        path, stem = self._root / tar, tar.removesuffix(".tar")
        samples, places = [], dict[str, str]()
        for key, label, offset, size in tar_samples(path):
            safe = make_key(f"{stem}/{key}", origin=f"{tar}/{key}")
            samples.append(Sample(safe, label, split, tar_ref(tar, offset, size)))
            if label not in places:
                places[label] = f"{path}: {key}"
        return samples, places
