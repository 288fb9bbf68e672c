"""Sources: the digits read back alike from all three kinds, and every way in which a data set can be wrong."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlcp_dist.data.classes import SUBSETS, ClassInfo, SourceError
from vlcp_dist.data.images import BadImage, decode, decode_pixels, to_square
from vlcp_dist.data.index import assign, files
from vlcp_dist.data.sources import Sample, open_source
from vlcp_dist.data.tars import members
from vlcp_dist.errors import InputError

SIZE = 16
PER_CLASS = 4


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read_one(source, ref: str) -> bytes:
    (content,) = source.read([ref])
    assert isinstance(content, bytes), content
    return content


def pixels(source) -> dict[tuple[str, bytes], int]:
    """(class, pixels) of every sample -> how often."""
    found: dict[tuple[str, bytes], int] = {}
    for sample in source.samples():
        array = to_square(decode_pixels(read_one(source, sample.ref)), SIZE, crop="squash")
        item = sample.class_id, array.tobytes()
        found[item] = found.get(item, 0) + 1
    return found


def samples_of(kind: str, path: Path, **options) -> list[Sample]:
    return list(open_source(kind, path=str(path), image_size=SIZE, **options).samples())


@pytest.fixture(scope="module")
def digits():
    """{class id: [PNG bytes]} of the first few digits."""
    source = open_source("digits", path=None, image_size=SIZE)
    found: dict[str, list[bytes]] = {}
    for sample in source.samples():
        if len(found.setdefault(sample.class_id, [])) < PER_CLASS:
            found[sample.class_id].append(read_one(source, sample.ref))
    return found


def expected_pixels(digits) -> dict[tuple[str, bytes], int]:
    arrays = [
        (id, to_square(decode_pixels(data), SIZE, crop="squash").tobytes())
        for id, many in digits.items()
        for data in many
    ]
    return {item: arrays.count(item) for item in arrays}


# The digits


def test_digits():
    source = open_source("digits", path=None, image_size=SIZE)
    samples = list(source.samples())
    assert [info.name for info in source.classes()][:2] == ["digit zero", "digit one"]
    assert [info.id for info in source.classes()] == [f"digit-{i}" for i in range(10)]
    assert len(samples) == len({sample.key for sample in samples}) == 1797
    assert {sample.split for sample in samples} == {"all"}
    assert samples == sorted(samples, key=lambda s: (s.split, s.class_id, s.key))
    image = decode(read_one(source, samples[0].ref))
    assert image.size == (SIZE, SIZE)


def test_digits_show_what_scikit_learn_holds():
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = open_source("digits", path=None, image_size=8)
    for sample in list(source.samples())[::100]:
        index = int(sample.ref)
        assert sample.class_id == f"digit-{digits.target[index]}"
        grey = np.asarray(decode(read_one(source, sample.ref)))[:, :, 0]
        assert np.abs(grey / 255 - digits.images[index] / 16).max() < 0.01


def test_digits_with_chosen_classes_and_names():
    source = open_source("digits", path=None, image_size=8, classes=["digit-3"], class_names={"digit-3": "three"})
    assert source.classes() == [ClassInfo("digit-3", "three")]
    assert {sample.class_id for sample in source.samples()} == {"digit-3"}


# The same pixels and labels from all kinds


@pytest.mark.parametrize("split", [False, True])
def test_image_folder_gives_the_digits_back(tmp_path, digits, split):
    files = {
        f"{('train/', 'val/')[i % 2] if split else ''}{id}/{i:03d}.png": data
        for id, many in digits.items()
        for i, data in enumerate(many)
    }
    source = open_source("imagefolder", path=str(write_tree(tmp_path, files)), image_size=SIZE)
    assert pixels(source) == expected_pixels(digits)
    assert {sample.split for sample in source.samples()} == ({"train", "test"} if split else {"all"})


@pytest.mark.parametrize("labels", ["number", "id", "name", "json number", "json class"])
def test_webdataset_gives_the_digits_back(tmp_path, digits, labels):
    ids = sorted(digits, reverse=True)  # numbers count the lines of the list, not the sorted ids
    names = {id: f"digit {id[-1]} by hand" for id in ids}
    (tmp_path / "classes.txt").write_text("".join(f"{id}\t{names[id]}\n" for id in ids))
    label = {
        "number": lambda id: ("cls", f"{ids.index(id)}\n"),
        "id": lambda id: ("cls", id),
        "name": lambda id: ("cls", names[id]),
        "json number": lambda id: ("json", json.dumps({"label": ids.index(id)})),
        "json class": lambda id: ("json", json.dumps({"class": id, "source": "pen"})),
    }[labels]
    members: dict[str, list[tuple[str, bytes]]] = {"train-0.tar": [], "val-0.tar": []}
    for id, many in digits.items():
        for i, data in enumerate(many):
            extension, text = label(id)
            tar = members["train-0.tar" if i % 2 else "val-0.tar"]
            tar += [(f"{id}_{i}.png", data), (f"{id}_{i}.{extension}", text.encode())]
    for name, content in members.items():
        write_tar(tmp_path / name, content)
    source = open_source("webdataset", path=str(tmp_path), image_size=SIZE)
    assert pixels(source) == expected_pixels(digits)
    assert source.classes() == [ClassInfo(id, names[id]) for id in sorted(ids)]
    assert {sample.split for sample in source.samples()} == {"train", "test"}
    samples = list(source.samples())
    assert samples == sorted(samples, key=lambda s: (s.split, s.class_id, s.key))


def test_reading_needs_no_scan_and_works_in_threads(tmp_path, digits):
    members = [
        member
        for id, many in digits.items()
        for i, data in enumerate(many)
        for member in ((f"{id}_{i}.png", data), (f"{id}_{i}.cls", id.encode()))
    ]
    tar = write_tar(tmp_path / "all.tar", members)
    refs = [sample.ref for sample in samples_of("webdataset", tmp_path)]
    fresh = open_source("webdataset", path=str(tmp_path), image_size=SIZE)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda ref: read_one(fresh, ref), refs * 5))
    assert sorted(together[: len(refs)]) == sorted(data for many in digits.values() for data in many)
    assert together == fresh.read(refs) * 5
    os.truncate(tar, 2000)
    after = fresh.read(refs)
    whole = [content for content in after if isinstance(content, bytes)]
    assert 0 < len(whole) < len(refs) and set(whole) < set(together)
    assert {str(content) for content in after if not isinstance(content, bytes)} == {
        f"{tar}: shorter than when it was indexed; restore it or index anew"
    }
    tar.unlink()
    assert {type(content) for content in fresh.read(refs)} == {FileNotFoundError}


def test_cifar10_mini():
    default = Path(__file__).parents[3] / "shared" / "data" / "cifar10-mini"
    path = Path(os.environ.get("VLCP_CIFAR_MINI", default))
    if not path.is_dir():
        pytest.skip(f"no CIFAR-10 sample at {path}; set VLCP_CIFAR_MINI to its folder")
    source = open_source("webdataset", path=str(path), image_size=32)
    samples = list(source.samples())
    assert [info.name for info in source.classes()] == sorted((path / "classes.txt").read_text().split())
    assert len({sample.key for sample in samples}) == len(samples)
    assert {sample.split for sample in samples} == {"train", "test"}
    for sample in samples[:: len(samples) // 20]:
        assert to_square(decode_pixels(read_one(source, sample.ref)), 32, crop="squash").shape == (3, 32, 32)


# Image folders


def test_extensions_nesting_hidden_and_foreign_files(tmp_path):
    names = ["a/1.JPG", "a/2.jpeg", "a/3.PnG", "a/4.webp", "a/5.bmp", "a/6.gif", "a/7.tif", "a/sub/deep/8.TIFF"]
    others = ["a/.hidden.png", "a/.git/9.png", "a/notes.txt", "a/png", "README.md", ".cache/x/1.png"]
    write_tree(tmp_path, dict.fromkeys(names + others, b"x"))
    samples = samples_of("imagefolder", tmp_path)
    assert [sample.ref for sample in samples] == names
    assert [sample.key for sample in samples][:1] == ["a-1"]
    assert samples[-1].key == "a-sub-deep-8"


def test_corrupt_images_are_listed_and_fail_when_decoded(tmp_path):
    write_tree(tmp_path, {"a/bad.jpg": b"\xff\xd8\xff\xe0 cut", "a/good.png": png()})
    source = open_source("imagefolder", path=str(tmp_path), image_size=SIZE)
    bad, good = source.samples()
    with pytest.raises(BadImage):
        decode(read_one(source, bad.ref))
    assert decode(read_one(source, good.ref)).size == (2, 2)


def test_imagenet_keys_are_short_and_stable(tmp_path):
    write_tree(
        tmp_path,
        {
            "train/n02091831/n02091831_123.JPEG": b"",
            "val/n02091831/ILSVRC2012_val_00000293.JPEG": b"",
            "LOC_synset_mapping.txt": b"n02012849 crane\nn02091831 Saluki, gazelle hound\n",
        },
    )
    source = open_source("imagefolder", path=str(tmp_path), image_size=SIZE)
    assert source.classes() == [ClassInfo("n02091831", "Saluki, gazelle hound")]
    assert [(sample.split, sample.key) for sample in source.samples()] == [
        ("test", "test-n02091831-ILSVRC2012_val_00000293"),
        ("train", "train-n02091831_123"),
    ]


def test_odd_names_make_safe_and_different_keys(tmp_path):
    names = ["a/x y.png", "a/x.y.png", "a/x_y.png", "a/ünï.png", f"a/{'long' * 40}.png", "a/x y.jpg"]
    samples = samples_of("imagefolder", write_tree(tmp_path, dict.fromkeys(names, b"")))
    assert len({sample.key for sample in samples}) == len(names)
    for sample in samples:
        assert sample.key.isascii() and len(sample.key) <= 96
        assert set(sample.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
        assert json.loads(json.dumps(sample.ref)) == sample.ref


def test_keys_that_would_collide_name_both(tmp_path):
    write_tree(tmp_path, {"a/1.png": b"", "a/1.jpg": b""})
    with pytest.raises(SourceError, match=r"a/1\.jpg and a/1\.png .* key a-1"):
        samples_of("imagefolder", tmp_path)


def test_keys_that_would_collide_across_classes_name_both(tmp_path):
    write_tree(tmp_path, {"a/b/1.png": b"", "a-b/1.png": b""})
    with pytest.raises(SourceError, match=r"a/b/1\.png.* and .*a-b/1\.png|a-b/1\.png and a/b/1\.png"):
        samples_of("imagefolder", tmp_path)


def test_names_that_are_not_text(tmp_path):
    write_tree(tmp_path, {"a/1.png": b""})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.png")).write_bytes(b"")
    with pytest.raises(SourceError, match="not UTF-8; rename"):
        samples_of("imagefolder", tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    real = write_tree(tmp_path / "real", {"1.png": png()})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(real)
    assert [sample.key for sample in samples_of("imagefolder", tmp_path / "set")] == ["a-1"]
    (real / "again").symlink_to(real)
    with pytest.raises(SourceError, match=r"again: a link to a folder that holds it"):
        samples_of("imagefolder", tmp_path / "set")


def test_only_chosen_classes_are_looked_at(tmp_path):
    files = {f"{id}/1.png": b"" for id in SUBSETS["imagewoof"]}
    write_tree(tmp_path, {**files, "empty/notes.txt": b""})
    names = {id: f"dog {id}" for id in SUBSETS["imagewoof"]}
    samples = samples_of("imagefolder", tmp_path, classes="imagewoof", class_names=names)
    assert [sample.class_id for sample in samples] == sorted(SUBSETS["imagewoof"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (["notes.txt"], "no class folders"),
        (["a/1.png", "b/notes.txt"], r"/b: a class folder without images"),
        (["a/1.png", "2.png"], r"2\.png: an image outside any class folder"),
        (["train/1.png"], r"train/1\.png: an image outside any class folder"),
        (["train/a/1.png", "b/1.png"], r"split folders \(train\) beside others \(b\)"),
        (["train/a/1.png", "val/a/1.png", "test/a/1.png"], "test and val would both be the test split"),
        (["train/a/1.png", "val/b/1.png"], "split lacks 1 of 2 classes"),
        (["train/a/1.png", "val/a/notes.txt"], r"/val/a: a class folder without images"),
        (["n02091831/1.png"], "no names for n02091831"),
    ],
)
def test_bad_image_folders(tmp_path, files, message):
    write_tree(tmp_path, dict.fromkeys(files, b""))
    with pytest.raises(SourceError, match=message) as error:
        samples_of("imagefolder", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_chosen_class_names_the_path(tmp_path):
    write_tree(tmp_path, {"a/1.png": b""})
    with pytest.raises(SourceError, match="found 1 of 2; the data has no zebra") as error:
        samples_of("imagefolder", tmp_path, classes=["a", "zebra"])
    assert str(tmp_path) in str(error.value)


# WebDataset


def test_keys_of_tars_hold_the_tar(tmp_path):
    for tar in ("shard-0.tar", "shard-1.tar"):
        write_tar(tmp_path / tar, [("./0000.png", png()), ("./0000.cls", b"cat")])
    write_tar(tmp_path / "shard-2.tar", [("sub/x.y.png", png()), ("sub/x.cls", b"cat")])
    assert [(sample.key, sample.split) for sample in samples_of("webdataset", tmp_path)] == [
        ("shard-0-0000", "all"),
        ("shard-1-0000", "all"),
        ("shard-2-sub-x", "all"),
    ]


def test_members_that_are_no_samples_are_passed_over(tmp_path):
    members = [("LICENSE", b""), ("README.txt", b""), ("._a.png", b"x"), ("meta.json", b'{"made": 2020}')]
    sample = [("a.jpg", png()), ("a.txt", b"a cat"), ("a.json", b'{"label": "cat"}')]
    write_tar(tmp_path / "x.tar", members + sample)
    assert [sample.key for sample in samples_of("webdataset", tmp_path)] == ["x-a"]


def test_chosen_classes_of_a_webdataset(tmp_path):
    members = [(f"{id}.{e}", png() if e == "png" else id.encode()) for id in "abc" for e in ("png", "cls")]
    write_tar(tmp_path / "x.tar", members)
    source = open_source("webdataset", path=str(tmp_path), image_size=SIZE, classes=["c", "a"])
    assert [info.id for info in source.classes()] == [sample.class_id for sample in source.samples()] == ["a", "c"]


GOOD = [("a.png", png()), ("a.cls", b"cat")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no samples in its 1 tar"),
        ([("a.png", png())], r"sample a has no label: put a a\.cls"),
        ([("a.png", png()), ("a.cls", b" \n")], "sample a has no label"),
        ([("a.png", png()), ("a.json", b'{"width": 2}')], "sample a has no label"),
        ([("a.png", png()), ("a.json", b"[1]")], "sample a has no label"),
        ([("a.png", png()), ("a.json", b"{")], r"a\.json is no JSON"),
        ([("a.png", png()), ("a.json", b'{"label": 1.5}')], "a label must be .* got 1.5"),
        ([("a.png", png()), ("a.json", b'{"label": true}')], "got True"),
        ([("a.png", png()), ("a.cls", b"\xff")], "not UTF-8"),
        ([("a.cls", b"cat")], "sample a has 0 images"),
        ([("a.png", png()), ("a.seg.png", png()), ("a.cls", b"cat")], "sample a has 2 images"),
        ([*GOOD, *GOOD], r"two members a\.png"),
        ([*GOOD, ("b.png", png()), ("b.cls", b"cat"), *GOOD], "both have the key x-a"),
        ([("a.png", png()), ("b.png", png()), ("a.cls", b"cat"), ("b.cls", b"cat")], "sample a has no label"),
        ([("a.png", png()), ("a.cls", b"7")], r"x\.tar: a: the label 7 is a number"),
        ([*GOOD, ("/etc/b.png", png())], "/etc/b.png points outside"),
        ([*GOOD, ("sub/../../b.png", png())], "points outside"),
    ],
)
def test_bad_webdatasets(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(SourceError, match=message) as error:
        samples_of("webdataset", tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(SourceError, match=r"x\.tar: member a\.png is a link, a device"):
        samples_of("webdataset", tmp_path)


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "sub/../../a.png", "sub/..", "/" + "long/" * 30 + "a.png"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_names_that_point_outside_are_refused(tmp_path, name, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.type = kind
        tar.addfile(member)
    with pytest.raises(SourceError, match=r"x\.tar: member .* points outside the tar"):
        samples_of("webdataset", tmp_path)


def test_sparse_members_are_refused(tmp_path):
    # Their bytes do not lie in one piece, so no offset and size could name them.
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "4"}
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(SourceError, match=r"x\.tar: member a\.png is .* sparse"):
        samples_of("webdataset", tmp_path)


def test_folders_in_a_tar_are_fine(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in (("sub/a.png", png()), ("sub/a.cls", b"cat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert [sample.key for sample in samples_of("webdataset", tmp_path)] == ["x-sub-a"]


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    members = [(f"{i}.{e}", png(i) if e == "png" else b"cat") for i in range(3) for e in ("png", "cls")]
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    end = 512 * 2 * len(members)
    for length in range(100, end + 1, 103):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"x\.tar: (cut short|not an uncompressed tar)"):
            samples_of("webdataset", tmp_path)
    (tmp_path / "x.tar").write_bytes(whole[: end + 1024])
    assert len(samples_of("webdataset", tmp_path)) == 3


@pytest.mark.parametrize(
    ("length", "last"),
    [
        (512 * 7 + 2, r"after 3 whole members \(the last is 1\.png\)"),
        (512 * 8, r"after 4 whole members \(the last is 1\.cls\)"),
        (512 * 8 + 100, r"after 4 whole members \(the last is 1\.cls\)"),
    ],
    ids=["in a member", "between members", "in a header"],
)
def test_a_cut_tar_names_its_last_whole_member(tmp_path, length, last):
    members = [(f"{i}.{e}", png(i) if e == "png" else b"cat") for i in range(3) for e in ("png", "cls")]
    tar = write_tar(tmp_path / "x.tar", members)
    os.truncate(tar, length)
    with pytest.raises(SourceError, match=last):
        samples_of("webdataset", tmp_path)


def test_a_damaged_header_is_an_error(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [*GOOD, ("b.png", png()), ("b.cls", b"cat")])
    content = bytearray(tar.read_bytes())
    content[512 * 4 + 10] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(SourceError, match=r"damaged after 2 whole members \(the last is a\.cls\)"):
        samples_of("webdataset", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200])
def test_a_file_that_is_no_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.tar: not an uncompressed tar"):
        samples_of("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        ([], r"no \*\.tar files"),
        (["train-0.tar", "extra-0.tar"], r"extra-0\.tar is not"),
        (["train-0.tar", "val-0.tar", "test-0.tar"], "test and val would both be the test split"),
    ],
)
def test_bad_sets_of_tars(tmp_path, tars, message):
    for tar in tars:
        write_tar(tmp_path / tar, GOOD)
    with pytest.raises(SourceError, match=message):
        samples_of("webdataset", tmp_path)


def test_tar_names_that_begin_with_a_word_like_a_split(tmp_path):
    write_tar(tmp_path / "trains-0.tar", GOOD)
    assert {sample.split for sample in samples_of("webdataset", tmp_path)} == {"all"}


def test_a_class_only_in_one_split_of_tars(tmp_path):
    write_tar(tmp_path / "train-0.tar", [*GOOD, ("b.png", png()), ("b.cls", b"dog")])
    write_tar(tmp_path / "val-0.tar", GOOD)
    with pytest.raises(SourceError, match=r"the test split lacks 1 of 2 classes \(dog\)"):
        samples_of("webdataset", tmp_path)
    assert len(samples_of("webdataset", tmp_path, classes=["cat"])) == 2


# Opening


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("csv", "x", "unknown kind of source 'csv': use digits, imagefolder, imagenet, parquet, webdataset"),
        ("imagefolder", None, "needs a path"),
        ("imagefolder", "/no/such/folder", "/no/such/folder: no such folder"),
        ("webdataset", __file__, "not a folder"),
        ("digits", "/data", "have no path"),
    ],
)
def test_what_cannot_be_opened(kind, path, message):
    with pytest.raises(SourceError, match=message):
        open_source(kind, path=path, image_size=SIZE)


def test_an_address_that_nothing_opens():
    with pytest.raises(InputError, match=r"nowhere://bucket/set: .*use a local path, s3:// or gs://"):
        open_source("webdataset", path="nowhere://bucket/set", image_size=SIZE)


def test_digits_need_a_size():
    with pytest.raises(SourceError, match="positive image size"):
        open_source("digits", path=None, image_size=0)


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_the_order_does_not_depend_on_threads(tmp_path, monkeypatch, kind):
    ids = [f"c{i}" for i in range(20)]
    for number, id in enumerate(ids):
        if kind == "imagefolder":  # many files in the first folders: the last are listed before them
            write_tree(tmp_path, {f"{id}/{i}.png": b"" for i in range(200 if number < 3 else 2)})
        else:
            parts = [(f"{i}.{e}", b"" if e == "png" else ids[-i % 20].encode())
                     for i in range(200 if number < 3 else 2) for e in ("png", "cls")]  # fmt: skip
            write_tar(tmp_path / f"{id}.tar", parts)
    found, written = [], []
    for threads in (1, 3, 16):
        monkeypatch.setattr("vlcp_dist.data.samples._THREADS", threads)
        source = open_source(kind, path=str(tmp_path), image_size=SIZE)
        found.append(list(source.samples()))
        table = assign(source.samples(), validation=0.1, test=0.1, shard_size=50, limit_per_class=None, seed=0)
        written.append(files(table, source.classes(), shard_size=50))
    assert found[0] == found[1] == found[2] and written[0] == written[1] == written[2]
    assert found[0] == sorted(found[0], key=lambda s: (s.split, s.class_id, s.key))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_lie_where_tarfile_finds_them(tmp_path, format):
    names = [f"n{i}.png" for i in range(4)] + [f"{'folder/' * 20}{i}.png" for i in range(2)] + ["./a/b.png"]
    names += ["ünï.png", f"{'ü' * 60}.png"] if format != tarfile.USTAR_FORMAT else []
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = number * 300, number / 2  # halves of seconds need a record in PAX
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with path.open("rb") as file:
        found = list(members(file, path, 0, path.stat().st_size))
    with tarfile.open(path) as tar:
        assert found == [(member.name, member.offset_data, member.size) for member in tar.getmembers()]


def test_no_damaged_header_is_taken_for_a_whole_one(tmp_path):
    """Every bit of a header counts: any flip is an error, or is seen as tarfile sees it."""
    path = write_tar(tmp_path / "x.tar", [("a.png", png()), ("b.png", png())])
    whole = path.read_bytes()
    for place in range(1024, 1024 + 512, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        with path.open("rb") as file, pytest.raises(SourceError, match=r"damaged after 1 whole members"):
            list(members(file, path, 0, len(whole)))
