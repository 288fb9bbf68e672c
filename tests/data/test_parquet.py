"""Parquet files as the hub has them: labels and their names, splits, and images read back from their row groups."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlcp_dist.data import parquet
from vlcp_dist.data.classes import ClassInfo, SourceError
from vlcp_dist.data.sources import Sample, open_source

NAMES = ["tench, Tinca tinca", "crane bird", "crane"]
ROWS = 7


def image(file: str, row: int) -> bytes:
    return f"{file}/{row} ".encode() * (row + 1)


def write(path: Path, labels: list, *, names: list[str] | None = NAMES, plain: bool = False, group: int = 3) -> Path:
    """A file of the hub's layout whose images say where they are."""
    contents = [image(path.name, row) for row in range(len(labels))]
    images = pa.array(contents, pa.binary())
    if not plain:
        paths = pa.array([f"{row}.JPEG" for row in range(len(labels))])
        images = pa.StructArray.from_arrays([images, paths], ["bytes", "path"])
    table = pa.table({"image": images, "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def opened(root: Path, **options):
    return open_source("parquet", path=str(root), image_size=8, **options)


def check_images(root: Path, samples: list[Sample]) -> None:
    """Every reference gives back the image that lies there, in any order and in one call."""
    mixed = samples[::2] + samples[1::2]
    for sample, content in zip(mixed, opened(root).read([s.ref for s in mixed]), strict=True):
        stem, _, number = sample.key.rpartition("-")
        assert content == image(f"{stem}.parquet", int(number))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("folder", ["data", "."])
def test_files_of_the_hub(tmp_path, folder, plain):
    for number in range(2):
        labels = [(number + row) % 3 for row in range(ROWS)]
        write(tmp_path / folder / f"train-{number:05d}-of-00002.parquet", labels, plain=plain)
    write(tmp_path / folder / "validation-00000-of-00001.parquet", [2, 1, 0], plain=plain)
    source = opened(tmp_path)
    seen: list[tuple[int, int]] = []
    samples = list(source.samples(lambda done, total: seen.append((done, total))))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert samples == sorted(samples, key=lambda s: (s.split, s.class_id, s.key))
    assert source.classes() == [
        ClassInfo("crane", "crane"),
        ClassInfo("crane_bird", "crane bird"),
        ClassInfo("tench_Tinca_tinca", "tench, Tinca tinca"),
    ]
    first = next(s for s in samples if s.key == "train-00001-of-00002-000004")
    assert (first.class_id, first.split) == ("crane", "train")
    assert first.ref == f"{'data/' if folder == 'data' else ''}train-00001-of-00002.parquet:1:1"
    assert sum(s.split == "test" for s in samples) == 3 and len(samples) == 2 * ROWS + 3
    check_images(tmp_path, samples)


def test_a_row_group_is_decoded_once_a_call(tmp_path, monkeypatch):
    write(tmp_path / "x.parquet", [0] * 12, group=4)
    refs = [s.ref for s in opened(tmp_path).samples()]
    opens = []
    real = parquet.open_parquet
    monkeypatch.setattr(parquet, "open_parquet", lambda path: opens.append(path) or real(path))
    assert opened(tmp_path).read(refs[::-1] + refs) == [image("x.parquet", i) for i in [*range(11, -1, -1), *range(12)]]
    assert len(opens) == 3


def test_a_test_split_without_labels_is_left_out_and_said(tmp_path, caplog):
    write(tmp_path / "data/train-0.parquet", [0, 1, 2])
    write(tmp_path / "data/validation-0.parquet", [0, 1, 2])
    write(tmp_path / "data/test-0.parquet", [-1, -1])
    samples = list(opened(tmp_path).samples())
    assert {s.ref.partition(":")[0] for s in samples} == {"data/train-0.parquet", "data/validation-0.parquet"}
    assert f"{tmp_path / 'data/test-0.parquet'}: a test split without labels" in caplog.text
    write(tmp_path / "data/test-0.parquet", [0, 1, 2])
    with pytest.raises(SourceError, match="test and validation would both be the test split"):
        opened(tmp_path).classes()


def test_labels_as_text_and_lists_beside_the_files(tmp_path):
    write(tmp_path / "x.parquet", ["b c", "a", "b c"], names=None)
    assert [(s.key, s.class_id) for s in opened(tmp_path).samples()] == [
        ("x-000001", "a"),
        ("x-000000", "b_c"),
        ("x-000002", "b_c"),
    ]
    assert opened(tmp_path, class_names={"a": "an a", "b c": "bc"}).classes()[1] == ClassInfo("b c", "bc")
    write(tmp_path / "x.parquet", [1, 0], names=None)
    with pytest.raises(SourceError, match=r"x\.parquet: the label \d is a number and no list"):
        opened(tmp_path).classes()
    (tmp_path / "classes.txt").write_text("n01440764\ttench\nn02012849\tcrane\n")
    assert [s.class_id for s in opened(tmp_path).samples()] == ["n01440764", "n02012849"]


def test_imagenets_own_listing_turns_numbers_into_wnids(tmp_path):
    """Two classes are called crane, so names alone would not do."""
    write(tmp_path / "x.parquet", [2, 1, 0])
    listing = tmp_path / "LOC_synset_mapping.txt"
    listing.write_text("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    assert [s.class_id for s in opened(tmp_path).samples()] == ["n01440764", "n02012849", "n03126707"]
    listing.write_text("n02012849 crane\nn01440764 tench, Tinca tinca\nn03126707 crane\n")
    with pytest.raises(SourceError, match=r"tench, Tinca tinca is line 1 \(from 0\), but its label .* is 0"):
        opened(tmp_path).classes()


def test_wnids_need_names(tmp_path):
    write(tmp_path / "x.parquet", [0, 1], names=["n01440764", "n02012849"])
    with pytest.raises(SourceError, match="no names for n01440764"):
        opened(tmp_path).classes()
    names = {"n01440764": "tench", "n02012849": "crane"}
    assert [info.name for info in opened(tmp_path, class_names=names).classes()] == ["tench", "crane"]


def test_chosen_classes(tmp_path):
    write(tmp_path / "x.parquet", [2, 1, 0, 2])
    samples = list(opened(tmp_path, classes=["crane"]).samples())
    assert [s.key for s in samples] == ["x-000000", "x-000003"]
    check_images(tmp_path, samples)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 3], {}, r"x\.parquet: the label 3 has no name: the metadata lists 3"),
        ([0, -1], {}, r"x\.parquet: rows with negative labels"),
        ([0, None], {}, r"x\.parquet: 1 rows without a label in column label"),
        ([0.5, 1.0], {}, r"x\.parquet: column label is double"),
        ([0, 1], {"names": ["a b", "a_b", "c"]}, r"'a b'.*'a_b'|'a_b'.*'a b'"),
        ([], {}, r"no rows in its 1 parquet"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, options, message):
    if not labels:
        labels = pa.array([], pa.int64())
    write(tmp_path / "x.parquet", labels, **options)
    with pytest.raises(SourceError, match=message) as error:
        opened(tmp_path).classes()
    assert str(tmp_path) in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(SourceError, match=r"no \*\.parquet files"):
        opened(tmp_path).classes()
    path = write(tmp_path / "x.parquet", [0, 1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"x\.parquet: not a whole parquet file"):
        opened(tmp_path).classes()
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), path)
    with pytest.raises(SourceError, match=r"x\.parquet: no column image or img among picture, label"):
        opened(tmp_path).classes()
    write(path, [0, 1])
    write(tmp_path / "y.parquet", [0], names=["another", "set"])
    with pytest.raises(SourceError, match=r"x\.parquet and y\.parquet name the labels differently"):
        opened(tmp_path).classes()


def test_images_that_are_gone_are_values(tmp_path):
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.parquet", [0, 1, 2, 0])
    source = opened(tmp_path)
    refs = [f"{name}.parquet:1:0" for name in "abcd"] + ["a.parquet:0:2"]
    (tmp_path / "b.parquet").unlink()
    write(tmp_path / "c.parquet", [0])
    content = bytearray((tmp_path / "d.parquet").read_bytes())
    content[4:-200] = bytes(len(content) - 204)
    (tmp_path / "d.parquet").write_bytes(content)
    a, b, c, d, last = source.read(refs)
    assert (a, last) == (image("a.parquet", 3), image("a.parquet", 2))
    assert isinstance(b, FileNotFoundError) and "b.parquet" in str(b)
    assert isinstance(c, SourceError) and "c.parquet" in str(c)
    assert isinstance(d, SourceError | OSError) and "d.parquet" in str(d)


def test_an_image_that_is_only_a_path(tmp_path):
    images = pa.StructArray.from_arrays(
        [pa.array([None, b"x"], pa.binary()), pa.array(["a.png", "b.png"])], ["bytes", "path"]
    )
    pq.write_table(pa.table({"image": images, "label": ["a", "a"]}), tmp_path / "x.parquet")
    source = opened(tmp_path)
    missing, there = source.read([s.ref for s in source.samples()])
    assert there == b"x" and isinstance(missing, SourceError) and "no bytes" in str(missing)
