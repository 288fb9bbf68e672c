"""What lies where in a WebDataset tar, from its headers; a tar that is cut short or unsafe is an error."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from vlcp_dist.data.classes import SourceError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})


class TarSample(NamedTuple):
    """An image in a tar: `key` up to the first dot of its name, the label as text, its place in bytes."""

    key: str
    label: str
    offset: int
    size: int


def extension_of(name: str) -> str:
    """What follows the last dot of a file name, in lower case; empty without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def tar_samples(path: Path) -> Iterator[TarSample]:
    """The labelled images of an uncompressed tar, in its order. Members of a sample must be neighbours.

    A label is the text of a `.cls` member, else "label", else "class", in a `.json` member. Members without
    image or label (licences, captions), hidden files and names without a dot are passed over.
    Raises `SourceError` for a file that is no tar, a tar that ends before its end mark (with the last whole
    member), members that are no plain files or point outside, and samples without an image, with two images,
    or without a label.
    """
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
    except tarfile.ReadError as error:
        raise SourceError(f"{path}: not an uncompressed tar file ({error}); unpack or fetch it again") from None
    with tar:
        for key, group in groupby(members_of(tar, path), key=lambda member: _split_name(member.name)[0]):
            members: dict[str, tarfile.TarInfo] = {}
            for member in group:
                extension = _split_name(member.name)[1]
                if extension in members:
                    raise SourceError(f"{path}: two members {member.name}; keys must be unique, rename one")
                members[extension] = member
            images = [members[name] for name in members if extension_of(f".{name}") in IMAGE_EXTENSIONS]
            label = _label(tar, members, f"{path}: {key}")
            if not images and label is None:
                continue
            if len(images) != 1:
                raise SourceError(f"{path}: sample {key} has {len(images)} images, not one; write the tar anew")
            if label is None:
                raise SourceError(
                    f"{path}: sample {key} has no label: put a {key}.cls, or a {key}.json with a label, "
                    f"right beside its image"
                )
            yield TarSample(key, label, images[0].offset_data, images[0].size)


def members_of(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The visible files of a tar, checked to be whole: `tarfile` ends silently at a damaged header."""
    end = path.stat().st_size
    count, last = 0, "none"
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:
            member = None
        if member is None and _has_end_mark(path, tar.offset):
            return
        if member is None or member.offset_data + member.size > end:
            raise SourceError(
                f"{path}: cut short or damaged after {count} whole members (the last is {last}); "
                f"write or fetch this tar again"
            )
        count, last = count + 1, member.name
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise SourceError(f"{path}: member {member.name} points outside the tar; write it with relative names")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise SourceError(f"{path}: member {member.name} is a link, a device or sparse; store it as a plain file")
        file = member.name.rpartition("/")[2]
        if "." in file and not file.startswith("."):
            yield member


def _has_end_mark(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _split_name(name: str) -> tuple[str, str]:
    """Key (with its folder) and extension, parted at the first dot of the file's own name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], place: str) -> str | None:
    if "cls" in members:
        value: object = _text(tar, members["cls"], place).strip()
    elif "json" in members:
        try:
            fields = json.loads(_text(tar, members["json"], place))
        except json.JSONDecodeError as error:
            raise SourceError(f"{place}.json is no JSON ({error}); write the tar anew") from None
        value = (
            next((fields[name] for name in ("label", "class") if name in fields), None)
            if isinstance(fields, dict)
            else None
        )
    else:
        return None
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SourceError(f"{place}: a label must be a number, an id or a name, got {value!r}")
    return str(value).strip()


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, place: str) -> str:
    file = tar.extractfile(member)
    assert file is not None  # only links and folders give None, and those were refused
    try:
        return file.read().decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{place}: {member.name} is not UTF-8 text ({error}); write the tar anew") from None
