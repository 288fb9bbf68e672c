"""Parquet files with encoded images inside, laid out as on the Hugging Face hub, as a data set."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlcp_dist.data.classes import ClassInfo, SourceError, find_listing, id_of, ids_of_labels, read_listing
from vlcp_dist.data.folders import visible
from vlcp_dist.data.ranges import named, open_parquet
from vlcp_dist.data.samples import (
    SPLITS,
    Names,
    OnProgress,
    Sample,
    Wanted,
    check_one_each,
    choose,
    make_key,
    splits_by_name,
    threads_for,
)
from vlcp_dist.data.storage import Location

_IMAGES = ("image", "img")
_LABELS = ("label", "fine_label")
_DECODED = 4  # row groups decoded at once: each may be hundreds of MB
_log = logging.getLogger(__name__)


class _File(NamedTuple):
    """What the index needs of a file: the rows of each of its row groups, and the label of every row."""

    groups: list[int]
    labels: pa.Array
    names: list[str] | None  # of the labels, from the hub's metadata


class Parquet:
    """`<root>/data/*.parquet` or `<root>/*.parquet`, named train-* and validation-* (or test-*) where it is split.

    Columns: `image` (or `img`), a struct of `bytes` and `path` or plain binary; `label` (or `fine_label`), a number or
    text. Names of numbers are those in the files' Hugging Face metadata, or the lines of a listing beside the files.
    A test split without labels (all -1, as ImageNet's on the hub) is left out, and a warning is logged.

    A row group is decoded whole for each call of `read` that wants any of its rows: files whose rows are in the order
    of their classes, or with small row groups, are read faster.
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
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (file, row group) -> (place in the answer, row)
        for place, ref in enumerate(refs):
            file, group, row = ref.rsplit(":", 2)
            wanted.setdefault((file, int(group)), []).append((place, int(row)))
        found: list[bytes | OSError | SourceError] = [b""] * len(refs)
        with ThreadPoolExecutor(_DECODED) as pool:
            for rows, contents in zip(wanted.values(), pool.map(self._read_group, wanted.items()), strict=True):
                for (place, _), content in zip(rows, contents, strict=True):
                    found[place] = content
        return found

    def _read_group(
        self, item: tuple[tuple[str, int], list[tuple[int, int]]]
    ) -> Sequence[bytes | OSError | SourceError]:
        (file, group), rows = item
        path = self._root / file
        try:
            with open_parquet(path) as parquet:
                column = _column(parquet, _IMAGES, path)
                nested = pa.types.is_struct(parquet.schema_arrow.field(column).type)
                table = parquet.read_row_group(group, columns=[f"{column}.bytes" if nested else column])
        except OSError as error:
            return [named(error, str(path))] * len(rows)
        except SourceError as error:
            return [error] * len(rows)
        except (pa.ArrowException, IndexError) as error:
            return [SourceError(f"{path}: {error}; restore the file or index anew")] * len(rows)
        images = pc.struct_field(table[column], "bytes") if nested else table[column]
        return [_content(images, row, f"{path}: row {row} of row group {group}") for _, row in rows]

    def _scan(self, on_progress: OnProgress | None = None) -> tuple[list[ClassInfo], list[Sample]]:
        """Classes and samples: which classes there are is known only once every label has been seen."""
        if self._found is None:
            self._found = self._list_all(on_progress)
        return self._found

    def _list_all(self, on_progress: OnProgress | None) -> tuple[list[ClassInfo], list[Sample]]:
        words = splits_by_name(self._root, _files(self._root), "parquet")
        files: dict[str, _File] = {}
        with ThreadPoolExecutor(threads_for(self._root)) as pool:
            paths = [self._root / name for name in words]
            for done, (name, file) in enumerate(zip(words, pool.map(_label_column, paths), strict=True), 1):
                files[name] = file
                if on_progress:
                    on_progress(done, len(words))
        _leave_out_unlabelled_test(self._root, words, files)
        check_one_each(self._root, {words[name] for name in files})
        splits = {name: SPLITS.get(words[name], words[name]) for name in files}
        ids, listing = self._ids(files)
        found: dict[str, set[str]] = {split: set() for split in splits.values()}
        for name, file in files.items():
            found[splits[name]] |= {ids[label] for label in pc.unique(file.labels).to_pylist()}
        if not any(found.values()):
            raise SourceError(f"{self._root}: no rows in its {len(files)} parquet files; check the path")
        classes = choose(self._root, found, self._wanted, listing)
        keep = {info.id for info in classes}
        samples = [
            sample
            for name, file in files.items()
            for sample in _samples(name, splits[name], file, ids)
            if sample.class_id in keep
        ]
        samples.sort(key=lambda sample: (sample.split, sample.class_id, sample.key))
        return classes, samples

    def _ids(self, files: Mapping[str, _File]) -> tuple[dict[Any, str], Names | Location]:
        """The class id of every label, and where the names of classes are."""
        first, names = next(((name, file.names) for name, file in files.items() if file.names), ("", None))
        if other := next((name for name, file in files.items() if file.names not in (names, None)), None):
            raise SourceError(f"{self._root}: {first} and {other} name the labels differently; use files of one set")
        places = {
            label: f"{self._root / name}"
            for name, file in reversed(list(files.items()))
            for label in pc.unique(file.labels).to_pylist()
        }
        listing = self._class_names or find_listing(self._root)
        if names is None or any(isinstance(label, str) for label in places):
            by_text = ids_of_labels({str(label): place for label, place in places.items()}, listing=listing)
            return {label: by_text[str(label)] for label in places}, listing
        if beyond := [label for label in places if label >= len(names)]:
            raise SourceError(
                f"{places[beyond[0]]}: the label {beyond[0]} has no name: the metadata lists {len(names)}; restore it"
            )
        if isinstance(listing, Mapping) or listing is None:
            by_name = ids_of_labels({names[label]: place for label, place in places.items()}, listing=None)
            ids = {label: by_name[names[label]] for label in places}
            own = {ids[label]: names[label] for label in places}
            return ids, listing or (None if all(id == name for id, name in own.items()) else own)
        _check_same_order(listing, names)
        by_text = ids_of_labels({str(label): place for label, place in places.items()}, listing=listing)
        return {label: by_text[str(label)] for label in places}, listing


def _files(root: Location) -> list[str]:
    """The parquet files in `data/`, else in the root itself."""
    prefix = "data/" if (root / "data").is_dir() else ""
    return [prefix + name for name, _ in visible(root / prefix) if name.endswith(".parquet")]


def _label_column(path: Location) -> _File:
    try:
        with open_parquet(path) as parquet:
            _column(parquet, _IMAGES, path)
            column = _column(parquet, _LABELS, path)
            labels = parquet.read(columns=[column])[column].combine_chunks()
            metadata = parquet.metadata
            names = _names(parquet.schema_arrow.metadata or {}, column)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a whole parquet file ({error}); fetch it again") from None
    if pa.types.is_dictionary(labels.type):
        labels = labels.dictionary_decode()
    types = pa.types
    if not any(fits(labels.type) for fits in (types.is_integer, types.is_string, types.is_large_string)):
        raise SourceError(f"{path}: column {column} is {labels.type}; a label must be a number or text")
    if labels.null_count:
        raise SourceError(f"{path}: {labels.null_count} rows without a label in column {column}; remove them")
    return _File([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], labels, names)


def _leave_out_unlabelled_test(root: Location, words: Mapping[str, str], files: dict[str, _File]) -> None:
    for name, file in list(files.items()):
        if not pa.types.is_integer(file.labels.type) or not pc.any(pc.less(file.labels, 0)).as_py():
            continue
        if words[name] != "test" or pc.any(pc.greater_equal(file.labels, 0)).as_py():
            raise SourceError(f"{root / name}: rows with negative labels, which name no class; remove them")
        _log.warning("%s: a test split without labels (all are -1) is left out", root / name)
        del files[name]


def _samples(name: str, split: str, file: _File, ids: Mapping[Any, str]) -> Iterator[Sample]:
    stem = name.removeprefix("data/").removesuffix(".parquet")
    labels = iter(file.labels.to_pylist())
    number = 0
    for group, rows in enumerate(file.groups):
        for row in range(rows):
            key = make_key(f"{stem}-{number:06d}", origin=f"{name}/{number}")
            yield Sample(key, ids[next(labels)], split, f"{name}:{group}:{row}")
            number += 1


def _check_same_order(listing: str | Location, names: Sequence[str]) -> None:
    """The numbers count the lines of the listing: where it has the names that the files give them, it must agree."""
    lines = read_listing(listing, ids=names)
    uses = Counter(info.name for info in lines)
    place = {info.name: number for number, info in enumerate(lines) if uses[info.name] == 1}
    place |= {info.id: number for number, info in enumerate(lines)}
    for number, name in enumerate(names):
        at = place.get(name, place.get(id_of(name), number))
        if at != number:
            raise SourceError(
                f"{listing}: {name} is line {at} (from 0), but its label in the parquet files is {number}; "
                f"put the lines in the order of the labels"
            )


def _names(metadata: Mapping[bytes, bytes], column: str) -> list[str] | None:
    """`info.features.<column>.names` of the metadata that the `datasets` library writes."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


def _column(parquet: pq.ParquetFile, names: Sequence[str], path: Location) -> str:
    columns = parquet.schema_arrow.names
    if not (found := [name for name in names if name in columns]):
        raise SourceError(f"{path}: no column {' or '.join(names)} among {', '.join(columns)}; rename one")
    return found[0]


def _content(images: pa.ChunkedArray, row: int, place: str) -> bytes | SourceError:
    if row >= len(images):
        return SourceError(f"{place}: fewer rows than when it was indexed; restore the file or index anew")
    content: bytes | None = images[row].as_py()
    return content if content is not None else SourceError(f"{place}: no bytes; write the images into the file")
