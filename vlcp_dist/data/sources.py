"""Data sets as they lie in folders and object stores -> samples and their bytes. Each kind has a file beside this."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from vlcp_dist.data.classes import ClassInfo, SourceError
from vlcp_dist.data.digits import Digits
from vlcp_dist.data.folders import ImageFolder
from vlcp_dist.data.imagenet import ImageNet
from vlcp_dist.data.parquet import Parquet
from vlcp_dist.data.samples import Names, OnProgress, Sample, Wanted
from vlcp_dist.data.storage import Location, locate
from vlcp_dist.data.webdatasets import WebDataset

__all__ = ["Sample", "Source", "SourceError", "open_source"]

_IN_A_FOLDER: Mapping[str, Callable[[Location, Wanted, Names], "Source"]] = {
    "imagefolder": ImageFolder,
    "imagenet": ImageNet,
    "parquet": Parquet,
    "webdataset": WebDataset,
}


class Source(Protocol):
    """A data set. Opening one is cheap in a new process: nothing is listed before `classes` or `samples`."""

    def classes(self) -> list[ClassInfo]:
        """The classes, sorted by id."""

    def samples(self, on_progress: OnProgress | None = None) -> Iterator[Sample]:
        """All samples, sorted by split, class id and key. Reads no pixels.

        `on_progress(done, total)` is called as parts of the source (class folders, tars, files) are listed.
        """

    def read(self, refs: Sequence[str]) -> list[bytes | OSError | SourceError]:
        """The encoded images of many samples, in their order. Thread-safe; needs no scan.

        An image that cannot be had is a value: FileNotFoundError when it is gone, `SourceError` when the data has
        changed since it was indexed, another OSError for what may pass with another attempt.
        """


def open_source(
    kind: str,
    *,
    path: str | None,
    image_size: int,
    classes: Wanted = None,
    class_names: Names = None,
) -> Source:
    """The data set of a kind: "digits" (needs no path), or "imagefolder", "imagenet" (the archives as they are
    distributed), "parquet" (as on the Hugging Face hub) or "webdataset" in a folder, local or a URL.

    `image_size` is the side in pixels to which the 8 x 8 digits are enlarged; other kinds keep their bytes.
    `classes` limits the source to these ids, or to a subset of `classes.SUBSETS`. `class_names` is a listing
    file or a mapping of id to name, where the one beside the images will not do (see `classes.load_classes`).

    Raises:
        SourceError: an unknown kind or a folder that is not there.
    """
    if kind == "digits":
        if path is not None:
            raise SourceError(f"the digits come with scikit-learn and have no path, got {path!r}; leave it out")
        return Digits(image_size, classes, class_names)
    if kind not in _IN_A_FOLDER:
        raise SourceError(f"unknown kind of source {kind!r}: use digits, {', '.join(_IN_A_FOLDER)}")
    if path is None:
        raise SourceError(f"a source of kind {kind} needs a path")
    root = locate(path)
    if not root.is_dir():
        raise SourceError(f"{path}: {'not a folder' if root.exists() else 'no such folder'}; check the path")
    return _IN_A_FOLDER[kind](root, classes, class_names)
