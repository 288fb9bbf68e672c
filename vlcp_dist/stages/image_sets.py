"""Labelled images in memory, as classifiers are trained and tested on them: real ones, and distilled ones."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlcp_dist.data import storage
from vlcp_dist.data.index import Index, Row
from vlcp_dist.data.manifest import Failure
from vlcp_dist.errors import InputError
from vlcp_dist.stages.base import Run
from vlcp_dist.stages.synthesize import image_path

READ_AT_ONCE = 256  # images


def real_images(run: Run, rows: Sequence[Row], size: int) -> tuple[torch.Tensor, torch.Tensor, list[Failure]]:
    """Real images uint8 (n, 3, size, size), centre-cropped, their labels, and those that could not be read.

    A label is the position of the class in the order of the ids (wnids).

    Raises:
        ValueError: this machine has no memory for them.
    """
    pixels = _room_for(len(rows), size)
    labels: list[int] = []
    failed: list[Failure] = []
    for start in range(0, len(rows), READ_AT_ONCE):
        good, arrays, bad = run.arrays(run.read(rows[start : start + READ_AT_ONCE]), size, crop="center")
        failed += bad
        for row, array in zip(good, arrays, strict=True):
            pixels[len(labels)] = array
            labels.append(run.index.labels[row.class_id])
    return torch.from_numpy(pixels[: len(labels)]), torch.tensor(labels), failed


def split_images(run: Run, size: int) -> tuple[torch.Tensor, torch.Tensor, list[Failure]]:
    """The real images of `evaluate.split`; see `real_images`.

    Raises:
        ValueError: there are none.
    """
    split = run.cfg.evaluate.split
    rows = list(run.index.split(split))
    if not rows:
        raise ValueError(f"the {split} split holds no image; see data.validation and data.test")
    return real_images(run, rows, size)


def distilled_images(run: Run, method: str, ipc: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distilled images uint8 (n, 3, size, size) in the size that they are stored at, and their labels.

    Raises:
        InputError: this IPC is not synthesised yet.
        ValueError: this machine has no memory for them.
    """
    folder, size = run.folders["synthesize"].path, run.cfg.synthesize.image_size
    repeats = range(run.cfg.synthesize.images_per_prototype)
    names = [(class_id, c, r) for class_id in run.index.class_sizes for c in range(ipc) for r in repeats]
    pixels = _room_for(len(names), size)
    for start in range(0, len(names), READ_AT_ONCE):
        part = names[start : start + READ_AT_ONCE]
        try:
            encoded = storage.fetch([folder / image_path(method, ipc, *name) for name in part])
        except FileNotFoundError as error:
            raise InputError(_not_synthesised(run, method, ipc, str(error))) from error
        for i, data in enumerate(encoded, start):
            pixels[i] = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    return torch.from_numpy(pixels), torch.tensor([run.index.labels[class_id] for class_id, *_ in names])


def check_split(split: str, index: Index) -> None:
    """Refuse, before anything is spent, a split to test on whose classes are not those that are trained on.

    Raises:
        InputError: it names the classes of either side that the other lacks, and the way out.
    """
    trained, tested = index.classes_of("train"), index.classes_of(split)
    if tested and trained != tested:
        raise InputError(
            f"the {split} split has {len(tested)} classes and the training images {len(trained)}: "
            f"{_some(tested - trained)} only in the {split} split, {_some(trained - tested)} only among the training "
            f"images; select the common ones with data.classes, or raise the share that is held out"
        )


def _not_synthesised(run: Run, method: str, ipc: int, missing: str) -> str:
    folder = run.folders["synthesize"].path
    parts = [name.split("/") for name in storage.listing(folder) if name.endswith(".png")]
    there = {int(part[1].removeprefix("ipc=")) for part in parts if part[0] == method}
    return (
        f"{method} at IPC {ipc} is not synthesised: {missing} is not there, and {folder} holds of {method} "
        f"IPC {', '.join(map(str, sorted(there))) or 'none'}; run without --only, or with an ipc=[...] that is there"
    )


def _some(ids: set[str]) -> str:
    shown = ", ".join(sorted(ids)[:8])
    return f"{len(ids)} ({shown}{', ...' if len(ids) > 8 else ''})" if ids else "none"


def _room_for(images: int, size: int) -> np.ndarray:
    """An array for so many images of `size` px."""
    needed, present = images * 3 * size * size, _available_memory()
    if needed > 0.8 * present:
        raise ValueError(
            f"{images} images of {size} px take {needed / 2**30:.1f} GiB of memory, "
            f"{present / 2**30:.1f} GiB are available; use a smaller evaluate.image_size or fewer workers, leave "
            f"`full` out of evaluate.baselines, or give a trained teacher with evaluate.teacher.checkpoints"
        )
    return np.empty((images, 3, size, size), np.uint8)


def _available_memory() -> int:
    """Bytes that can be had without swapping, page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
