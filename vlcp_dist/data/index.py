"""The table of all samples: which class, which split, which shard, and where the bytes are."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.ranges import open_parquet
from vlcp_dist.data.samples import Sample
from vlcp_dist.data.storage import Location
from vlcp_dist.errors import InputError

SPLITS = ("train", "validation", "test")
_BATCH = 10_000  # samples that are Python objects at a time; the rest lie packed in columns


class Row(NamedTuple):
    """One sample. `split` is train, validation or test; only training samples belong to a shard."""

    key: str
    class_id: str
    split: str
    ref: str
    shard: str


class SplitError(InputError):
    """The data and the split asked for do not go together."""


@dataclass(frozen=True)
class RowGroup:
    """A row group of `samples.parquet`: a shard of training samples, or a part of another split."""

    name: str
    split: str
    row_group: int
    images: int
    classes: dict[str, int]  # class id -> images


def assign(
    samples: Iterable[Sample],
    *,
    validation: float,
    test: float | None,
    shard_size: int,
    limit_per_class: int | None,
    seed: int,
) -> pa.Table:
    """Split every class (stratified, by a permutation that depends on seed and class id alone) and cut shards.

    Returns the columns of `Row`, all text. Training rows come first, sorted by class and key, in shards of
    `shard_size`; the others follow.

    Raises:
        SplitError: a test share is missing, or given although the source has a test split of its own.
    """
    table = _sorted_columns(samples)
    held_out = pc.equal(table["split"], "test").to_numpy()
    if held_out.any() and test is not None:
        raise SplitError(f"the source has a test split of its own; remove data.test={test}")
    if not held_out.any() and test is None:
        raise SplitError("the source has no test split; give data.test, such as 0.2")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for class_id, start, end in _runs(table["class_id"]):
        members = np.arange(start, end)
        parts["test"].append(members[held_out[start:end]])
        rest = members[~held_out[start:end]]
        order = _generator(seed, class_id).permutation(len(rest))
        n_test = round(len(rest) * test) if test else 0
        n_validation = round(len(rest) * validation)
        cuts = np.split(order, [n_test, n_test + n_validation])
        train = cuts[2][:limit_per_class] if limit_per_class else cuts[2]
        for name, chosen in (("test", cuts[0]), ("validation", cuts[1]), ("train", train)):
            parts[name].append(rest[np.sort(chosen)])
    rows = {name: np.concatenate([np.empty(0, np.int64), *parts[name]]) for name in SPLITS}
    table = table.take(np.concatenate(list(rows.values())))
    shards = [f"{i // shard_size:06d}" for i in range(len(rows["train"]))]
    shards += [""] * (len(table) - len(shards))
    splits = np.repeat(SPLITS, [len(rows[name]) for name in SPLITS])
    return pa.table([table["key"], table["class_id"], pa.array(splits), table["ref"], pa.array(shards)], Row._fields)


def files(table: pa.Table, classes: list[ClassInfo], *, shard_size: int) -> dict[str, bytes]:
    """The files of an index: `samples.parquet` with a row group for every shard and at most `shard_size` samples of
    the other splits, `shards.json` with what is in each row group, `classes.json`."""
    buffer = io.BytesIO()
    groups: list[RowGroup] = []
    # Only what repeats is worth a dictionary; keys and paths are alike in their beginnings, which zstd sees.
    repeating = ["class_id", "split", "shard"]
    with pq.ParquetWriter(buffer, table.schema, use_dictionary=repeating, compression="zstd") as writer:
        for split, start, end in _runs(table["split"]):
            for number, first in enumerate(range(start, end, shard_size)):
                rows = table.slice(first, min(shard_size, end - first))
                writer.write_table(rows, row_group_size=shard_size)
                name = rows["shard"][0].as_py() or f"{split}-{number:06d}"
                groups.append(RowGroup(name, split, len(groups), len(rows), _counts(rows["class_id"])))
    return {
        "samples.parquet": buffer.getvalue(),
        "classes.json": _json([asdict(info) for info in classes]),
        "shards.json": _json([asdict(group) for group in groups]),
    }


class Index:
    """The index of a run. What is asked for is read when it is asked for; loading reads two small files."""

    def __init__(self, folder: Location, classes: list[ClassInfo], groups: list[RowGroup]):
        self._path = folder / "samples.parquet"
        self._groups = groups
        self.classes = classes

    @classmethod
    def load(cls, folder: Location) -> "Index":
        classes = json.loads((folder / "classes.json").read_bytes())
        groups = json.loads((folder / "shards.json").read_bytes())
        return cls(folder, [ClassInfo(**item) for item in classes], [RowGroup(**item) for item in groups])

    @cached_property
    def names(self) -> dict[str, str]:
        return {info.id: info.name for info in self.classes}

    @cached_property
    def labels(self) -> dict[str, int]:
        """Position of every class in the order of its id, which is the label classifiers train on."""
        return {info.id: label for label, info in enumerate(self.classes)}

    @cached_property
    def shards(self) -> dict[str, int]:
        """Training shard -> images."""
        return {group.name: group.images for group in self._groups if group.split == "train"}

    @cached_property
    def class_sizes(self) -> dict[str, int]:
        """Class id -> training images; sorted by id, 0 where the split left none."""
        sizes = {info.id: 0 for info in self.classes}
        for group in self._groups:
            if group.split == "train":
                for class_id, images in group.classes.items():
                    sizes[class_id] += images
        return sizes

    @cached_property
    def split_sizes(self) -> dict[str, int]:
        """Split (train, validation, test) -> images."""
        return {name: sum(group.images for group in self._groups if group.split == name) for name in SPLITS}

    def classes_of(self, split: str) -> set[str]:
        """The ids of the classes that a split holds images of."""
        return {class_id for group in self._groups if group.split == split for class_id in group.classes}

    def shard(self, name: str) -> list[Row]:
        """The rows of a training shard.

        Raises:
            KeyError: there is no such shard.
        """
        for group in self._groups:
            if group.name == name and group.split == "train":
                return self._read(group)
        raise KeyError(name)

    def of_class(self, class_id: str) -> list[Row]:
        """The training rows of a class, sorted by key."""
        groups = [group for group in self._groups if group.split == "train" and class_id in group.classes]
        return [row for group in groups for row in self._read(group) if row.class_id == class_id]

    def split(self, name: str) -> Iterator[Row]:
        """The rows of a split, sorted by class and key; one row group is in memory at a time."""
        return (row for group in self._groups if group.split == name for row in self._read(group))

    def _read(self, group: RowGroup) -> list[Row]:
        with open_parquet(self._path, self._metadata) as file:
            columns = file.read_row_group(group.row_group, columns=list(Row._fields)).to_pydict()
        return list(map(Row, *(columns[name] for name in Row._fields)))

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        with open_parquet(self._path) as file:
            return file.metadata


def _sorted_columns(samples: Iterable[Sample]) -> pa.Table:
    """Samples as columns, sorted by class and key."""
    schema = pa.schema([(name, pa.string()) for name in Sample._fields])
    rows = iter(samples)
    batches = []
    while batch := list(islice(rows, _BATCH)):
        batches.append(pa.record_batch([pa.array(column, pa.string()) for column in zip(*batch, strict=True)], schema))
    return pa.Table.from_batches(batches, schema).sort_by([("class_id", "ascending"), ("key", "ascending")])


def _runs(column: pa.ChunkedArray) -> Iterator[tuple[str, int, int]]:
    """(value, start, end) of every stretch of equal values."""
    codes = pc.dictionary_encode(column.combine_chunks())
    if isinstance(codes, pa.ChunkedArray):
        codes = codes.combine_chunks()
    starts = np.flatnonzero(np.diff(codes.indices.to_numpy(), prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(codes)]):
        yield codes.dictionary[codes.indices[start].as_py()].as_py(), start, end


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {value: end - start for value, start, end in _runs(column)}


def _generator(seed: int, class_id: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{class_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
