"""ImageNet as it is distributed: archives in archives, validation images whose labels lie in a file of their own."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from vlcp_dist.data.classes import SourceError
from vlcp_dist.data.imagenet import TRAIN, VALIDATION
from vlcp_dist.data.sources import open_source
from vlcp_dist.data.validation import LIST, TABLE

WNIDS = ["n01440764", "n02012849", "n03126707"]
MAPPING = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n"
PER_CLASS, VAL_PER_CLASS = 5, 2


def jpeg(name: str) -> bytes:
    """Bytes of different lengths that tell which image they are; sources do not look into them."""
    return f"the image {name} ".encode() * (1 + sum(name.encode()) % 120)


TRAIN_IMAGES = {w: {f"{w}_{i * 37}.JPEG": jpeg(f"{w}_{i}") for i in range(PER_CLASS)} for w in WNIDS}
# Shuffled on purpose: image i shows class i modulo 3, and files are labelled in the order of their names.
VAL_IMAGES = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(f"val{i}") for i in range(VAL_PER_CLASS * len(WNIDS))}
VAL_WNIDS = [WNIDS[i % 3] for i in range(len(VAL_IMAGES))]
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 3 4 5 6 \n"
    for name, wnid in reversed(list(zip(VAL_IMAGES, VAL_WNIDS, strict=True)))
)


def tar_bytes(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_archives(root: Path, labels: str = LIST, format: int = tarfile.GNU_FORMAT) -> Path:
    root.mkdir(exist_ok=True)
    inner = {f"{wnid}.tar": tar_bytes(TRAIN_IMAGES[wnid], format) for wnid in reversed(WNIDS)}
    (root / TRAIN).write_bytes(tar_bytes(inner, format))
    (root / VALIDATION).write_bytes(tar_bytes(dict(reversed(VAL_IMAGES.items())), format))
    (root / labels).write_text("\n".join(VAL_WNIDS) + "\n" if labels == LIST else SOLUTION)
    (root / "LOC_synset_mapping.txt").write_text(MAPPING)
    return root


def write_folders(root: Path, labels: str = LIST) -> Path:
    for wnid, images in TRAIN_IMAGES.items():
        (root / "train" / wnid).mkdir(parents=True)
        for name, content in images.items():
            (root / "train" / wnid / name).write_bytes(content)
    (root / "val").mkdir()
    for name, content in VAL_IMAGES.items():
        (root / "val" / name).write_bytes(content)
    (root / labels).write_text("\n".join(VAL_WNIDS) if labels == LIST else SOLUTION)
    (root / "LOC_synset_mapping.txt").write_text(MAPPING)
    return root


def images_of(kind: str, root: Path, **options) -> dict[str, tuple[str, str, bytes]]:
    """{key: (class, split, bytes)}."""
    source = open_source(kind, path=str(root), image_size=8, **options)
    samples = list(source.samples())
    assert samples == sorted(samples, key=lambda s: (s.split, s.class_id, s.key))
    contents = open_source(kind, path=str(root), image_size=8, **options).read([s.ref for s in samples])
    return {s.key: (s.class_id, s.split, content) for s, content in zip(samples, contents, strict=True)}


EXPECTED = {
    f"train-{name.removesuffix('.JPEG')}": (wnid, "train", content)
    for wnid, images in TRAIN_IMAGES.items()
    for name, content in images.items()
} | {
    f"test-{wnid}-{name.removesuffix('.JPEG')}": (wnid, "test", content)
    for (name, content), wnid in zip(VAL_IMAGES.items(), VAL_WNIDS, strict=True)
}


@pytest.mark.parametrize("labels", [LIST, TABLE])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_are_read_in_place(tmp_path, labels, format):
    assert images_of("imagenet", write_archives(tmp_path, labels, format)) == EXPECTED
    assert {path.name for path in tmp_path.iterdir()} == {TRAIN, VALIDATION, labels, "LOC_synset_mapping.txt"}


@pytest.mark.parametrize("labels", [LIST, TABLE])
def test_a_flat_validation_folder_gives_the_same_samples(tmp_path, labels):
    root = write_folders(tmp_path, labels)
    assert images_of("imagefolder", root) == EXPECTED
    (root / labels).rename(root / "val" / labels)
    assert images_of("imagefolder", root) == EXPECTED


def test_names_and_progress(tmp_path):
    source = open_source("imagenet", path=str(write_archives(tmp_path)), image_size=8)
    seen: list[tuple[int, int]] = []
    assert len(list(source.samples(lambda done, total: seen.append((done, total))))) == len(EXPECTED)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [info.name for info in source.classes()] == ["tench, Tinca tinca", "crane", "crane"]


@pytest.mark.parametrize("kind", ["imagenet", "imagefolder"])
def test_chosen_classes_alone(tmp_path, kind):
    root = (write_archives if kind == "imagenet" else write_folders)(tmp_path / "set")
    found = images_of(kind, root, classes=["n02012849"])
    assert found == {key: value for key, value in EXPECTED.items() if value[0] == "n02012849"}


@pytest.mark.parametrize("kind", ["imagenet", "imagefolder"])
def test_labels_that_are_missing_or_do_not_fit(tmp_path, kind):
    root = (write_archives if kind == "imagenet" else write_folders)(tmp_path / "set")
    (root / LIST).write_text("\n".join(VAL_WNIDS[1:]))
    with pytest.raises(SourceError, match=rf"{LIST}: 5 labels for 6 images, .* use the whole validation set"):
        images_of(kind, root)
    (root / LIST).unlink()
    with pytest.raises(SourceError, match=rf"val.*: .*labels are needed: put {TABLE} or {LIST} into {root}"):
        images_of(kind, root)
    (root / TABLE).write_text(SOLUTION.replace("ILSVRC2012_val_00000003,", "ILSVRC2012_val_00000009,"))
    with pytest.raises(SourceError, match=rf"{TABLE}: no label for 1 of 6 images \(the first is .*00000003\.JPEG\)"):
        images_of(kind, root)
    (root / TABLE).write_text(SOLUTION.replace(WNIDS[2], WNIDS[0]))
    with pytest.raises(SourceError, match=rf"{root}: the test split lacks 1 of 3 classes \({WNIDS[2]}\)"):
        images_of(kind, root)


@pytest.mark.parametrize("name", [TRAIN, VALIDATION])
def test_an_archive_that_is_not_there(tmp_path, name):
    (write_archives(tmp_path) / name).unlink()
    with pytest.raises(SourceError, match=rf"{tmp_path / name}: no such file; .* use imagefolder"):
        images_of("imagenet", tmp_path)


@pytest.mark.parametrize("name", [TRAIN, VALIDATION])
def test_a_cut_archive_names_its_last_whole_member(tmp_path, name):
    path = write_archives(tmp_path) / name
    last = "n02012849.tar" if name == TRAIN else "ILSVRC2012_val_00000002.JPEG"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data
    os.truncate(path, end + 10)
    with pytest.raises(SourceError, match=rf"{path}: cut short .* \(the last is {last}\)"):
        images_of("imagenet", tmp_path)


def inner_place(path: Path, wnid: str) -> tuple[int, list[int]]:
    """Where the inner tar begins, and where the headers of its members do."""
    with tarfile.open(path) as tar:
        start = tar.getmember(f"{wnid}.tar").offset_data
        inner = tar.extractfile(f"{wnid}.tar")
        with tarfile.open(fileobj=inner) as members:
            return start, [start + member.offset for member in members.getmembers()]


def test_a_damaged_inner_tar_names_both(tmp_path):
    path = write_archives(tmp_path) / TRAIN
    _, headers = inner_place(path, "n02012849")
    with path.open("r+b") as file:
        file.seek(headers[2] + 3)
        file.write(b"?")
    place = rf"{path}: n02012849\.tar: cut short or damaged after 2 whole members \(the last is n02012849_37\.JPEG\)"
    with pytest.raises(SourceError, match=place):
        images_of("imagenet", tmp_path)
    assert len(images_of("imagenet", tmp_path, classes=["n01440764"])) == PER_CLASS + VAL_PER_CLASS


def test_an_inner_tar_that_ends_early_does_not_run_into_the_next(tmp_path):
    root = write_archives(tmp_path)
    inner = {f"{wnid}.tar": tar_bytes(TRAIN_IMAGES[wnid]) for wnid in WNIDS}
    with tarfile.open(fileobj=io.BytesIO(inner["n01440764.tar"])) as tar:
        inner["n01440764.tar"] = inner["n01440764.tar"][: tar.getmembers()[3].offset]  # whole members, no end mark
    (root / TRAIN).write_bytes(tar_bytes(inner))
    with pytest.raises(SourceError, match=r"n01440764\.tar: cut short .* after 3 whole members"):
        images_of("imagenet", root)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"n01440764.tar": b"no tar" * 200}, r"n01440764\.tar: not an uncompressed tar"),
        ({"n01440764.tar": tar_bytes({"README.txt": b""})}, r"n01440764\.tar: a class without images"),
        ({"n01440764_1.JPEG": b""}, r"member n01440764_1\.JPEG is not one tar for each class"),
    ],
)
def test_other_things_in_the_training_archive(tmp_path, inner, message):
    (write_archives(tmp_path) / TRAIN).write_bytes(tar_bytes({f"{w}.tar": b"" for w in WNIDS} | inner))
    with pytest.raises(SourceError, match=message):
        images_of("imagenet", tmp_path, classes=["n01440764"])
