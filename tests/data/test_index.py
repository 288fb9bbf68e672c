"""The index: how classes are split and shards are cut, and that each part can be read by itself."""

import json
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
import pytest

from vlcp_dist.data import ranges
from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.index import Index, Row, SplitError, assign, files
from vlcp_dist.data.samples import Sample

CLASSES = [ClassInfo("a", "an a"), ClassInfo("b", "a « b »"), ClassInfo("c", "a c")]
SIZES = {"a": 7, "b": 11, "c": 4}


def samples(own_test: bool = False) -> list[Sample]:
    train = [
        Sample(f"{c}-{i:03d}", c, "train" if own_test else "all", f"{c}/{i}.png")
        for c, n in SIZES.items()
        for i in range(n)
    ]
    test = [Sample(f"test-{c}-{i}", c, "test", f"val/{c}/{i}.png") for c in SIZES for i in range(3)]
    return test + train if own_test else train


def index_of(folder, given, *, shard_size=4, validation=0.2, test=0.2, limit_per_class=None, seed=0) -> Index:
    settings = {"validation": validation, "test": test, "limit_per_class": limit_per_class, "seed": seed}
    table = assign(given, shard_size=shard_size, **settings)
    folder.mkdir(exist_ok=True)
    for name, content in files(table, CLASSES, shard_size=shard_size).items():
        (folder / name).write_bytes(content)
    return Index.load(folder)


def rows_of(index: Index) -> list[Row]:
    return [row for split in ("train", "validation", "test") for row in index.split(split)]


def test_every_sample_is_in_one_split_in_fixed_shares(tmp_path):
    index = index_of(tmp_path, samples())
    rows = rows_of(index)
    assert sorted(row.key for row in rows) == [s.key for s in samples()]
    refs = {s.key: (s.class_id, s.ref) for s in samples()}
    assert all(refs[row.key] == (row.class_id, row.ref) for row in rows)
    for split in ("validation", "test"):
        counts = {c: sum(row.class_id == c for row in index.split(split)) for c in SIZES}
        assert counts == {c: round(n * 0.2) for c, n in SIZES.items()}


def test_shards_are_cut_from_training_rows_sorted_by_class_and_key(tmp_path):
    index = index_of(tmp_path, samples())
    train = list(index.split("train"))
    assert train == sorted(train, key=lambda row: (row.class_id, row.key))
    assert [row.shard for row in train] == [f"{i // 4:06d}" for i in range(len(train))]
    assert {row.shard for split in ("validation", "test") for row in index.split(split)} == {""}
    for split in ("validation", "test"):
        others = list(index.split(split))
        assert others == sorted(others, key=lambda row: (row.class_id, row.key))


def test_the_split_is_a_permutation_by_seed_and_class(tmp_path):
    """As it has always been: a change here would make other experiments of the same configuration."""
    index = index_of(tmp_path, samples(), seed=3)
    digest = 0x27521E257E43CBE5  # sha256 of "3/b", its first eight bytes
    order = np.random.default_rng(digest).permutation(SIZES["b"])
    chosen = {split: [row.key for row in index.split(split) if row.class_id == "b"] for split in ("test", "validation")}
    assert chosen == {
        "test": [f"b-{i:03d}" for i in sorted(order[:2])],
        "validation": [f"b-{i:03d}" for i in sorted(order[2:4])],
    }
    # A class is split alike whatever other classes there are.
    alone = index_of(tmp_path / "alone", [s for s in samples() if s.class_id == "b"], seed=3)
    assert [row.key for row in alone.split("test")] == chosen["test"]


def test_the_test_split_of_the_source_is_kept_whole(tmp_path):
    index = index_of(tmp_path, samples(own_test=True), test=None)
    assert [row.key for row in index.split("test")] == [s.key for s in samples(own_test=True)[:9]]
    assert index.split_sizes == {"train": 22 - 4, "validation": 4, "test": 9}


def test_a_limit_takes_fewer_training_images_only(tmp_path):
    whole, few = index_of(tmp_path / "whole", samples()), index_of(tmp_path / "few", samples(), limit_per_class=2)
    assert few.class_sizes == {"a": 2, "b": 2, "c": 2}
    for split in ("validation", "test"):
        assert list(few.split(split)) == list(whole.split(split))
    assert {row.key for row in few.split("train")} < {row.key for row in whole.split("train")}


def test_the_order_in_which_samples_come_does_not_matter(tmp_path):
    table = [assign(given, validation=0.2, test=0.2, shard_size=4, limit_per_class=None, seed=0)
             for given in (samples(), samples()[::-1], iter(samples()))]  # fmt: skip
    first, *others = [files(t, CLASSES, shard_size=4) for t in table]
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("own_test", "test", "message"), [(True, 0.2, "remove data.test=0.2"), (False, None, "data.test")]
)
def test_a_share_that_does_not_go_with_the_data(own_test, test, message):
    with pytest.raises(SplitError, match=message):
        assign(samples(own_test), validation=0.1, test=test, shard_size=4, limit_per_class=None, seed=0)


def test_shards_json_describes_every_row_group(tmp_path):
    index_of(tmp_path, samples())
    described = json.loads((tmp_path / "shards.json").read_text())
    with pq.ParquetFile(tmp_path / "samples.parquet") as file:
        assert file.num_row_groups == len(described)
        for number, group in enumerate(described):
            rows = file.read_row_group(number).to_pylist()
            assert group["row_group"] == number and group["images"] == len(rows) <= 4
            assert {row["split"] for row in rows} == {group["split"]}
            counts = {c: len(list(same)) for c, same in groupby(rows, key=lambda row: row["class_id"])}
            assert group["classes"] == counts
            if group["split"] == "train":
                assert {row["shard"] for row in rows} == {group["name"]}
        repeating = [
            column for column in range(5) if "RLE_DICTIONARY" in file.metadata.row_group(0).column(column).encodings
        ]
        assert [file.schema.column(column).name for column in repeating] == ["class_id", "split", "shard"]
    names = [group["name"] for group in described]
    assert len(set(names)) == len(names) and names[-1] == "test-000000"


def test_what_the_small_files_tell_and_what_each_part_gives(tmp_path):
    index = index_of(tmp_path, samples())
    train = list(index.split("train"))
    assert index.classes == CLASSES
    assert (index.names, index.labels) == ({"a": "an a", "b": "a « b »", "c": "a c"}, {"a": 0, "b": 1, "c": 2})
    assert index.shards == {name: len(list(rows)) for name, rows in groupby(train, key=lambda row: row.shard)}
    assert index.class_sizes == {c: sum(row.class_id == c for row in train) for c in SIZES}
    assert sum(index.split_sizes.values()) == sum(SIZES.values())
    for name in index.shards:
        assert index.shard(name) == [row for row in train if row.shard == name]
    for class_id in SIZES:
        assert index.of_class(class_id) == [row for row in train if row.class_id == class_id]
    assert index.of_class("zebra") == []
    for name in ("000099", "test-000000"):
        with pytest.raises(KeyError, match=name):
            index.shard(name)


def test_only_the_row_groups_asked_for_are_read(tmp_path):
    """What lies elsewhere in the file may even be destroyed."""
    index = index_of(tmp_path, samples())
    path = tmp_path / "samples.parquet"
    with ranges.open_parquet(path) as file:
        start = (
            file.metadata.row_group(1).column(0).dictionary_page_offset
            or file.metadata.row_group(1).column(0).data_page_offset
        )
        footer = path.stat().st_size - 8 - file.metadata.serialized_size
    content = bytearray(path.read_bytes())
    content[start:footer] = bytes(footer - start)
    path.write_bytes(content)
    assert [row.shard for row in index.shard("000000")] == ["000000"] * 4
    with pytest.raises(OSError):
        index.shard("000001")


def test_a_class_without_training_images_counts_none(tmp_path):
    given = [*samples(own_test=True), Sample("x", "c2", "test", "x")]
    table = assign(given, validation=0, test=None, shard_size=100, limit_per_class=None, seed=0)
    for name, content in files(table, [*CLASSES, ClassInfo("c2", "c2")], shard_size=100).items():
        (tmp_path / name).write_bytes(content)
    index = Index.load(tmp_path)
    assert index.class_sizes == {**SIZES, "c2": 0}
    assert index.of_class("c2") == [] and index.split_sizes["validation"] == 0 and not list(index.split("validation"))
