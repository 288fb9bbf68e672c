"""Every kind of source on an object store gives what it gives on a local disk, and says so when something is gone."""

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from vlcp_dist.data.classes import SourceError
from vlcp_dist.data.index import Index, assign, files
from vlcp_dist.data.sources import open_source
from vlcp_dist.data.storage import locate

BUCKET = "sets"


@pytest.fixture(scope="module")
def store(s3_server):
    """One bucket on the S3 of this machine; the environment leads there."""
    settings = {
        "ENDPOINT_URL": s3_server,
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        fs.mkdir(BUCKET)
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def upload(store, folder: Path, name: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{BUCKET}/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{BUCKET}/{name}"


def check_same(kind: str, folder: Path, url: str, **options) -> list[str]:
    """Classes, samples and bytes are those of the local copy; returns the references."""
    here = open_source(kind, path=str(folder), image_size=8, **options)
    there = open_source(kind, path=url, image_size=8, **options)
    samples = list(there.samples())
    assert samples == list(here.samples()) and samples
    assert there.classes() == here.classes()
    refs = [sample.ref for sample in samples]
    contents = open_source(kind, path=url, image_size=8, **options).read(refs)
    assert all(isinstance(content, bytes) for content in contents)
    assert contents == here.read(refs)
    return refs


def image(name: str) -> bytes:
    return name.encode() * 50


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            (path.parent / "member").write_bytes(content)
            tar.add(path.parent / "member", name)
    (path.parent / "member").unlink()


def test_image_folders(store, tmp_path):
    folder = tmp_path / "set"
    names = ["train/a/1.png", "train/a/deep/2[x]*.png", "train/a/.hidden/3.png", "train/b/1.png", "train/b/empty.png"]
    for name in [*names, "val/a/1.png", "val/b/.x.png", "val/b/1.jpg", "val/b/notes.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if "empty" in name else image(name))
    (folder / "classes.txt").write_text("a\tan a\nb\ta b\n")
    url = upload(store, folder, "folders")
    store.touch(f"{BUCKET}/folders/train/")  # as some tools mark folders
    refs = check_same("imagefolder", folder, url)
    assert len(refs) == 6
    store.rm(f"{BUCKET}/folders/{refs[1]}")
    first, gone, *_ = open_source("imagefolder", path=url, image_size=8).read(refs)
    assert isinstance(first, bytes) and isinstance(gone, FileNotFoundError) and f"folders/{refs[1]}" in str(gone)


def test_a_folder_that_is_not_there(store):
    with pytest.raises(SourceError, match=f"s3://{BUCKET}/nothing: no such folder"):
        open_source("imagefolder", path=f"s3://{BUCKET}/nothing", image_size=8)


def test_tars(store, tmp_path):
    for tar in ("train-0", "train-1", "val-0"):
        members = {f"{i}.{e}": image(f"{tar}/{i}") if e == "png" else b"ab"[i % 2 : i % 2 + 1]
                   for i in range(4) for e in ("png", "cls")}  # fmt: skip
        write_tar(tmp_path / f"{tar}.tar", members | {"big.bin": os.urandom(100_000)})
    url = upload(store, tmp_path, "tars")
    refs = check_same("webdataset", tmp_path, url)
    content = store.cat_file(f"{BUCKET}/tars/train-1.tar")
    store.pipe_file(f"{BUCKET}/tars/train-1.tar", content[:1600])  # the first header is whole, its image is not
    store.rm(f"{BUCKET}/tars/val-0.tar")
    kinds = {
        ref: type(found)
        for ref, found in zip(refs, open_source("webdataset", path=url, image_size=8).read(refs), strict=True)
    }
    assert {kind for ref, kind in kinds.items() if ref.startswith("train-0")} == {bytes}
    assert {kind for ref, kind in kinds.items() if ref.startswith("train-1")} == {SourceError}
    assert {kind for ref, kind in kinds.items() if ref.startswith("val-0")} == {FileNotFoundError}
    with pytest.raises(SourceError, match=r"tars/train-1\.tar: cut short"):
        open_source("webdataset", path=url, image_size=8).classes()


def test_imagenet_archives(store, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    inner = {}
    for wnid in ("n01440764", "n02012849"):
        write_tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": image(f"{wnid}_{i}") * 30 for i in range(3)})
        inner[f"{wnid}.tar"] = (tmp_path / f"{wnid}.tar").read_bytes()
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    write_tar(folder / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{i}.JPEG": image(str(i)) for i in (1, 2)})
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("n02012849\nn01440764\n")
    (folder / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn02012849 crane\n")
    assert len(check_same("imagenet", folder, upload(store, folder, "imagenet"))) == 8


def test_parquet(store, tmp_path):
    for split in ("train", "validation"):
        images = pa.array([{"bytes": image(f"{split}{i}"), "path": None} for i in range(6)])
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pa.table({"image": images, "label": ["a", "b"] * 3})
        pq.write_table(table, tmp_path / f"data/{split}-0.parquet", row_group_size=2)
    url = upload(store, tmp_path, "parquet")
    refs = check_same("parquet", tmp_path, url)
    store.rm(f"{BUCKET}/parquet/data/train-0.parquet")
    found = open_source("parquet", path=url, image_size=8).read(refs)
    assert [type(content) is FileNotFoundError for content in found] == ["train" in ref for ref in refs]


def test_an_index_in_a_bucket(store, tmp_path):
    source = open_source("digits", path=None, image_size=8)
    table = assign(source.samples(), validation=0.1, test=0.2, shard_size=300, limit_per_class=None, seed=0)
    for name, content in files(table, source.classes(), shard_size=300).items():
        (tmp_path / name).write_bytes(content)
    here, there = Index.load(tmp_path), Index.load(locate(upload(store, tmp_path, "index")))
    assert (there.classes, there.shards, there.class_sizes) == (here.classes, here.shards, here.class_sizes)
    assert there.shard("000001") == here.shard("000001")
    assert there.of_class("digit-7") == here.of_class("digit-7") and len(here.of_class("digit-7")) > 100
    assert list(there.split("test")) == list(here.split("test"))
