"""The table of all samples: which class, which split, which shard, and where the bytes are."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.sources import Sample
from vlcp_dist.errors import InputError

COLUMNS = ("key", "class_id", "split", "ref", "shard")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample. `split` is train, validation or test; only training samples belong to a shard."""

    key: str
    class_id: str
    split: str
    ref: str
    shard: str


class SplitError(InputError):
    """The data and the split asked for do not go together."""


def assign(
    samples: Iterable[Sample],
    *,
    validation: float,
    test: float | None,
    shard_size: int,
    limit_per_class: int | None,
    seed: int,
) -> list[Row]:
    """Split every class (stratified, by a permutation that depends on seed and class id alone) and cut shards.

    Training rows come first, sorted by class and key, in shards of `shard_size`; the others follow.

    Raises:
        SplitError: a test share is missing, or given although the source has a test split of its own.
    """
    samples = list(samples)
    splits = {sample.split for sample in samples}
    if "test" in splits and test is not None:
        raise SplitError(f"the source has a test split of its own; remove data.test={test}")
    if "test" not in splits and test is None:
        raise SplitError("the source has no test split; give data.test, such as 0.2")
    parts: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    ordered = sorted(samples, key=lambda s: (s.class_id, s.key))
    for class_id, group in groupby(ordered, key=lambda s: s.class_id):
        members = list(group)
        parts["test"] += [s for s in members if s.split == "test"]
        rest = [s for s in members if s.split != "test"]
        order = _generator(seed, class_id).permutation(len(rest))
        n_test = round(len(rest) * test) if test else 0
        n_validation = round(len(rest) * validation)
        cuts = np.split(order, [n_test, n_test + n_validation])
        train = cuts[2][:limit_per_class] if limit_per_class else cuts[2]
        for name, chosen in (("test", cuts[0]), ("validation", cuts[1]), ("train", train)):
            parts[name] += [rest[i] for i in sorted(chosen)]
    return [
        Row(s.key, s.class_id, split, s.ref, f"{i // shard_size:06d}" if split == "train" else "")
        for split in ("train", "validation", "test")
        for i, s in enumerate(parts[split])
    ]


class Index:
    """The index of a run: `classes.json` and `samples.parquet` in one folder."""

    def __init__(self, rows: list[Row], classes: list[ClassInfo]):
        self.rows = rows
        self.classes = classes

    @classmethod
    def load(cls, folder: Path) -> "Index":
        table = pq.read_table(folder / "samples.parquet").to_pydict()
        rows = [Row(*values) for values in zip(*(table[name] for name in COLUMNS), strict=True)]
        listing = json.loads((folder / "classes.json").read_text())
        return cls(rows, [ClassInfo(**item) for item in listing])

    def files(self) -> dict[str, bytes]:
        columns = {name: [getattr(row, name) for row in self.rows] for name in COLUMNS}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        shards = [{"name": name, "images": len(rows)} for name, rows in self.shards.items()]
        classes = [{"id": info.id, "name": info.name} for info in self.classes]
        return {
            "samples.parquet": buffer.getvalue(),
            "classes.json": _json(classes),
            "shards.json": _json(shards),
        }

    @cached_property
    def names(self) -> dict[str, str]:
        return {info.id: info.name for info in self.classes}

    @cached_property
    def labels(self) -> dict[str, int]:
        """Position of every class in the order of its id, which is the label classifiers train on."""
        return {info.id: label for label, info in enumerate(self.classes)}

    @cached_property
    def shards(self) -> dict[str, list[Row]]:
        return {name: list(rows) for name, rows in groupby(self.split("train"), key=lambda r: r.shard)}

    @cached_property
    def by_class(self) -> dict[str, list[Row]]:
        """Training rows of every class, sorted by key."""
        return {name: list(rows) for name, rows in groupby(self.split("train"), key=lambda r: r.class_id)}

    def split(self, name: str) -> Iterator[Row]:
        return (row for row in self.rows if row.split == name)


def _generator(seed: int, class_id: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{class_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
