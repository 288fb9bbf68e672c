"""Whether a model's weights are there and whole: file headers and sizes are read, nothing is loaded."""

import json
from pathlib import Path
from typing import Any

# What is loaded of a Stable Diffusion in diffusers layout; its safety checker is not.
PARTS_WITH_WEIGHTS = ("unet", "vae", "text_encoder")


def inspect(folder: Path) -> int:
    """Bytes of the weights in the folder of a model, of transformers or of diffusers (parts in sub-folders).

    Raises:
        ValueError: a file is missing, cut short or not in safetensors; the message names it.
    """
    if not (folder / "model_index.json").exists():
        return _network(folder)
    index = _json(folder / "model_index.json")
    if missing := [part for part in PARTS_WITH_WEIGHTS if part not in index]:
        raise ValueError(f"{folder}/model_index.json has no {', '.join(missing)}; a Stable Diffusion is needed")
    return sum(_network(folder / part) for part in PARTS_WITH_WEIGHTS)


def fetched(model: str, revision: str | None) -> Path | None:
    """The local folder of a model: itself, or the snapshot of a hub id that was downloaded before; None if neither."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def reachable(model: str, revision: str | None) -> str:
    """Why a hub id could not be downloaded from here; empty if it could."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model, revision=revision, timeout=10)
    except Exception as error:  # of the network, of the hub, of the id: each has its kinds
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _network(folder: Path) -> int:
    _json(folder / "config.json")
    parts = [path for path in folder.glob("*.safetensors.index.json") if path.name.count(".") == 3]
    names = sorted({name for path in parts for name in _json(path)["weight_map"].values()})
    files = [folder / name for name in names] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors; other formats can run code when loaded and are refused")
    for file in files:
        _check_header(file)
    return sum(file.stat().st_size for file in files)


def _check_header(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; fetch it again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or damaged ({error}); fetch it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; fetch the model again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch the model again") from error
    return content
