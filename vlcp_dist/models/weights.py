"""Where a model's files are, a folder or the cache of the Hugging Face hub; nothing heavy is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

TENSORS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def is_folder(model: str | Path) -> bool:
    """A hub id is owner/name and names nothing on this disk."""
    return isinstance(model, Path) or Path(model).exists() or model.count("/") != 1


def find_weights(
    model: str | Path, revision: str | None, *, parts: Sequence[str] = ("",), default: str, files: Sequence[str] = ()
) -> list[Path]:
    """The safetensors files of each part (a subfolder, "" is the top), on this machine.

    Args:
        model: folder or hub id.
        default: the hub id that fills a folder that is not there.
        files: what to download of the repository; all of it when not given.

    Raises:
        FileNotFoundError: a configuration or weights are missing; the message ends with the command that fetches them.
    """
    found: list[Path] = []
    for part in parts:
        prefix = f"{part}/" if part else ""
        if _locate(model, revision, f"{prefix}config.json") is None:
            raise _missing(model, revision, f"{prefix}config.json", default, files)
        tensors = _tensors(model, revision, prefix)
        if not tensors:
            raise _missing(model, revision, f"{prefix}*.safetensors", default, files)
        for name in tensors:
            path = _locate(model, revision, name)
            if path is None:
                raise _missing(model, revision, name, default, files)
            found.append(path)
    return found


def download_command(model: str | Path, revision: str | None, default: str, files: Sequence[str] = ()) -> str:
    folder = is_folder(model)
    command = ["hf", "download", default if folder else str(model), *files]
    if revision:
        command += ["--revision", revision]
    if folder:
        command += ["--local-dir", str(model)]
    return " ".join(command)


def count_parameters(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header alone.

    Raises:
        ValueError: it is no safetensors file, or not a whole one.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is no safetensors file ({size} bytes); delete it and download it again")
        header = json.loads(file.read(length))
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    if 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0) != size:
        raise ValueError(f"{path} is cut short or damaged ({size} bytes); delete it and download it again")
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def _tensors(model: str | Path, revision: str | None, prefix: str) -> list[str]:
    """The names of a part's safetensors files: one, or those that its index names."""
    for name in TENSORS:
        if _locate(model, revision, prefix + name) is not None:
            return [prefix + name]
        index = _locate(model, revision, f"{prefix}{name}.index.json")
        if index is not None:
            return sorted({prefix + shard for shard in json.loads(index.read_text())["weight_map"].values()})
    return []


def _locate(model: str | Path, revision: str | None, name: str) -> Path | None:
    if is_folder(model):
        path = Path(model, name)
        return path if path.is_file() else None
    cached = huggingface_hub.try_to_load_from_cache(str(model), name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _missing(
    model: str | Path, revision: str | None, name: str, default: str, files: Sequence[str]
) -> FileNotFoundError:
    where = f"no {name} in {model}"
    if not is_folder(model):
        where = f"no {name} of it in the hub's cache, {huggingface_hub.constants.HF_HUB_CACHE} on this machine"
    return FileNotFoundError(
        f"cannot load {model}: {where}\nFetch its weights, to storage that every node sees, with:\n"
        f"    {download_command(model, revision, default, files)}"
    )
