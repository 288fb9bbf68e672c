"""What lies where in an uncompressed tar, from its headers; a tar that is cut short or unsafe is an error."""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

from vlcp_dist.data.classes import SourceError
from vlcp_dist.data.ranges import Range, open_hops
from vlcp_dist.data.samples import IMAGE_EXTENSIONS, extension_of
from vlcp_dist.data.storage import Location

_BLOCK = tarfile.BLOCKSIZE
_END_MARK = bytes(_BLOCK)
# Records that change where a file's bytes lie or what it is called.
_MATTERS = re.compile(rb" (path|linkpath|size|hdrcharset|GNU\.sparse)")


class Member(NamedTuple):
    """A file in a tar: its bytes are `size` from `offset` of the file that holds the tar."""

    name: str
    offset: int
    size: int


class TarSample(NamedTuple):
    """An image in a tar: `key` up to the first dot of its name, the label as text, its place in bytes."""

    key: str
    label: str
    offset: int
    size: int


def tar_range(ref: str) -> Range:
    """The place that `tar_ref` wrote down."""
    path, offset, size = ref.rsplit(":", 2)
    return Range(path, int(offset), int(size))


def tar_ref(path: str, offset: int, size: int) -> str:
    return f"{path}:{offset}:{size}"


def size_of(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def members(file: BinaryIO, place: object, start: int, end: int) -> Iterator[Member]:
    """The visible files of the tar that lies between two offsets of a file, which may itself be a tar.

    Folders, hidden files and names without a dot are passed over. `place` names the tar in errors.
    Raises `SourceError` for what is no tar, a tar that ends before its end mark (with the last whole member), and
    members that are no plain files or point outside.
    """
    position, count, last = start, 0, "none"
    while True:
        file.seek(position)
        header = file.read(_BLOCK) if position + _BLOCK <= end else b""
        if header == _END_MARK:
            return
        found = _plain(file, header, position) or (_special(file, position) if header else None)
        if found is None and not count:
            raise SourceError(f"{place}: not an uncompressed tar file; unpack or fetch it again")
        if found is None or found[0].size < 0 or found[0].offset + found[0].size > end:
            raise SourceError(
                f"{place}: cut short or damaged after {count} whole members (the last is {last}); "
                f"write or fetch this tar again"
            )
        member, kind = found
        count, last = count + 1, member.name
        if member.name.startswith("/") or (".." in member.name and ".." in member.name.split("/")):
            raise SourceError(f"{place}: member {member.name} points outside the tar; write it with relative names")
        position = member.offset + (member.size + _BLOCK - 1) // _BLOCK * _BLOCK
        if kind == "folder":
            continue
        if kind != "file":
            raise SourceError(f"{place}: member {member.name} is a link, a device or sparse; store it as a plain file")
        name = member.name.rpartition("/")[2]
        if "." in name and not name.startswith("."):
            yield member


def tar_samples(path: Location) -> Iterator[TarSample]:
    """The labelled images of an uncompressed tar, in its order. Members of a sample must be neighbours.

    A label is the text of a `.cls` member, else "label", else "class", in a `.json` member. Members without
    image or label (licences, captions), hidden files and names without a dot are passed over.
    Raises `SourceError` for a tar that `members` refuses, and for samples without an image, with two images, or
    without a label.
    """
    with open_hops(path) as file:
        listed = members(file, path, 0, size_of(file))
        for key, group in groupby(((*_split_name(member.name), member) for member in listed), key=lambda part: part[0]):
            parts: dict[str, Member] = {}
            for _, extension, member in group:
                if extension in parts:
                    raise SourceError(f"{path}: two members {member.name}; keys must be unique, rename one")
                parts[extension] = member
            images = [parts[name] for name in parts if extension_of(f".{name}") in IMAGE_EXTENSIONS]
            label = _label(file, parts, f"{path}: {key}")
            if not images and label is None:
                continue
            if len(images) != 1:
                raise SourceError(f"{path}: sample {key} has {len(images)} images, not one; write the tar anew")
            if label is None:
                raise SourceError(
                    f"{path}: sample {key} has no label: put a {key}.cls, or a {key}.json with a label, "
                    f"right beside its image"
                )
            yield TarSample(key, label, images[0].offset, images[0].size)


def _plain(file: BinaryIO, header: bytes, position: int) -> tuple[Member, str] | None:
    """The member of the commonest kinds of header, plain files with short names, ten times as fast as `tarfile`
    (ImageNet has 1.3 million); None for all others and for damaged ones."""
    if header[156:157] == tarfile.XHDTYPE:  # records beside the header: most often finer times, as Python writes them
        records = _fields(header)
        if records is None or records[1] > _BLOCK:
            return None
        if _MATTERS.search(file.read(_BLOCK)):
            return None
        position += 2 * _BLOCK
        header = file.read(_BLOCK)
    fields = _fields(header)
    if fields is None or header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return None
    if header[345] or fields[0].endswith("/"):  # the rest of a long name, or a folder as old tars write it
        return None
    return Member(fields[0], position + _BLOCK, fields[1]), "file"


def _fields(header: bytes) -> tuple[str, int] | None:
    """Name and size in a header; None if its numbers are not octal or do not add up."""
    if len(header) < _BLOCK:
        return None
    try:
        size, stated = int(header[124:135], 8), int(header[148:156].strip(b"\0 "), 8)
    except ValueError:
        return None
    # The sum of all bytes, the checksum's own counted as spaces. Adler-32's lower half is such a sum in C.
    total = stated - 8 * ord(" ") + sum(header[148:156])
    if zlib.adler32(header) & 0xFFFF != (1 + total) % 65521:
        return None
    return header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), size


def _special(file: BinaryIO, position: int) -> tuple[Member, str] | None:
    """The member at a header as `tarfile` reads it (long names, folders, links, sparse files); None if damaged."""
    file.seek(position)
    try:
        info = tarfile.TarFile(fileobj=file).next()
    except (tarfile.TarError, ValueError):
        return None
    if info is None:
        return None
    kind = "folder" if info.isdir() else "file" if info.isreg() and not info.issparse() else "other"
    return Member(info.name, info.offset_data, info.size if info.isreg() else 0), kind


def _split_name(name: str) -> tuple[str, str]:
    """Key (with its folder) and extension, parted at the first dot of the file's own name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(file: BinaryIO, parts: dict[str, Member], place: str) -> str | None:
    if "cls" in parts:
        value: object = _text(file, parts["cls"], place).strip()
    elif "json" in parts:
        try:
            fields = json.loads(_text(file, parts["json"], place))
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


def _text(file: BinaryIO, member: Member, place: str) -> str:
    file.seek(member.offset)
    try:
        return file.read(member.size).decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{place}: {member.name} is not UTF-8 text ({error}); write the tar anew") from None
