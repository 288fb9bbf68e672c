"""scikit-learn's handwritten digits as a data set, for trials without any data."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from vlcp_dist.data.classes import ClassInfo, SourceError, load_classes, select_ids
from vlcp_dist.data.samples import Names, OnProgress, Sample, Wanted


class Digits:
    """The 1797 digits, enlarged and PNG-encoded on reading."""

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

    def samples(self, on_progress: OnProgress | None = None) -> Iterator[Sample]:
        for info in self._classes:
            for index in np.flatnonzero(self._labels == int(info.id.removeprefix("digit-"))):
                yield Sample(f"{info.id}-{index:04d}", info.id, "all", str(index))

    def read(self, refs: Sequence[str]) -> list[bytes | OSError | SourceError]:
        return [self._encode(int(ref)) for ref in refs]

    def _encode(self, index: int) -> bytes:
        buffer = io.BytesIO()
        large = Image.fromarray(self._images[index]).resize((self._size, self._size), Image.Resampling.BICUBIC)
        large.save(buffer, "PNG")
        return buffer.getvalue()
