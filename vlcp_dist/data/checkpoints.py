"""Checkpoints of a training: several files and, written last, the metadata that alone makes them count."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlcp_dist.data import storage
from vlcp_dist.data.storage import Location
from vlcp_dist.errors import InputError

_FILE = re.compile(r"checkpoint-(\d+)\.(.+)")


def save(folder: Location, step: int, files: Mapping[str, Path], facts: Mapping[str, Any], *, keep: int) -> None:
    """Write `checkpoint-<step>.<name>` for every local file, then `checkpoint-<step>.json`; `keep` the newest.

    Raises:
        OSError: as `storage.write`; this checkpoint does not count then, and the ones before it stay.
    """
    written = {}
    for name, file in files.items():
        target = f"{_stem(step)}.{name}"
        written[target] = {"bytes": file.stat().st_size, "sha256": storage.write(folder / target, file)}
    metadata = {"step": step, **facts, "files": written}
    storage.write(folder / f"{_stem(step)}.json", (json.dumps(metadata, indent=1) + "\n").encode())
    found = names(folder)
    kept = sorted(_whole(found))[-keep:]
    for name in found:  # also what was cut short on its way
        if _parse(name)[0] not in kept:
            storage.remove(folder / name)


def newest(folder: Location) -> dict[str, Any] | None:
    """The metadata of the last checkpoint that counts: `step`, what `save` was told, and `files`.

    Raises:
        InputError: a file of it is missing or has another size.
    """
    sizes = storage.listing(folder)
    steps = _whole(names(folder, sizes))
    if not steps:
        return None
    path = folder / f"{_stem(max(steps))}.json"
    metadata: dict[str, Any] = json.loads(path.read_bytes())
    for name, facts in metadata["files"].items():
        if sizes.get(name) != facts["bytes"]:
            raise InputError(
                f"{folder / name} has {sizes.get(name, 'no')} bytes, its checkpoint says {facts['bytes']}; "
                f"delete {path} to go on from the checkpoint before it"
            )
    return metadata


def names(folder: Location, listed: Iterable[str] | None = None) -> list[str]:
    """The files of all checkpoints, metadata first: deleted in this order, none counts that is not whole."""
    listed = storage.listing(folder) if listed is None else listed
    return sorted(filter(_FILE.fullmatch, listed), key=lambda name: (_parse(name)[1] != "json", name))


def _stem(step: int) -> str:
    return f"checkpoint-{step:08d}"


def _whole(found: Iterable[str]) -> list[int]:
    return [step for step, kind in map(_parse, found) if kind == "json"]


def _parse(name: str) -> tuple[int, str]:
    match = _FILE.fullmatch(name)
    assert match
    return int(match[1]), match[2]
