"""What every stage is made of: its description, and a run's view of the files that earlier stages left."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from vlcp_dist.config import fingerprint
from vlcp_dist.data import packs, shards, storage
from vlcp_dist.data.images import BadImage, decode, decode_pixels, to_square
from vlcp_dist.data.index import Index, Row
from vlcp_dist.data.manifest import Failure, StageFolder, Unit
from vlcp_dist.data.sources import Source, SourceError, open_source
from vlcp_dist.engine.executor import Job, Resources, Worker
from vlcp_dist.errors import InputError
from vlcp_dist.models.weights import find_weights
from vlcp_dist.schema import Config

Encoded = bytes | BadImage


class Run:
    """A configuration and the folders of its stages. Small: it is sent to every worker."""

    def __init__(self, cfg: Config, folders: dict[str, StageFolder]):
        self.cfg = cfg
        self.folders = folders

    @cached_property
    def index(self) -> Index:
        return Index.load(self.folders["index"].path)

    @cached_property
    def source(self) -> Source:
        data = self.cfg.data
        return open_source(
            data.source,
            path=data.path,
            image_size=data.image_size,
            classes=data.classes,
            class_names=data.class_names,
        )

    @property
    def diffusion_model(self) -> str:
        """The model of this run: the user's, or the folder that the pretrain stage made."""
        return self.cfg.diffusion.model or str(storage.local(self.folders["pretrain"].path / "model"))

    def latents(self, shard_names: Iterable[str], *, flipped: bool = False) -> shards.Arrays:
        """Latents by sample key, fp16 (4, h, w), memory-mapped: those of the images, or of the mirrored images.

        Raises:
            ValueError: the mirrored images have not been encoded.
        """
        if flipped and not self.cfg.encode.horizontal_flip:
            raise ValueError("there are latents of mirrored images only with encode.horizontal_flip=true")
        folder = self.folders["encode"].path
        return shards.Arrays((folder / f"{name}.tar" for name in shard_names), "flip.npy" if flipped else "npy")

    def pack(self, class_id: str) -> packs.ClassPack:
        """All latents of a class, fp16 (n, 4, h, w), memory-mapped, and their keys in the index's order."""
        return packs.load(self.folders["pack"].path, class_id)

    def descriptions(self, shard_names: Iterable[str]) -> dict[str, str]:
        """Descriptions by sample key."""
        folder = self.folders["caption"].path
        return {
            key: parts["txt"].decode() for name in shard_names for key, parts in shards.read(folder / f"{name}.tar")
        }

    def read(self, rows: Iterable[Row]) -> list[tuple[Row, Encoded]]:
        """The encoded image of every row, or why it cannot be had.

        Raises:
            OSError: the storage failed in a way that is worth another attempt.
        """
        rows = list(rows)
        result: list[tuple[Row, Encoded]] = []
        for row, data in zip(rows, self.source.read([row.ref for row in rows]), strict=True):
            if isinstance(data, FileNotFoundError):
                result.append((row, BadImage(f"is gone: {data}")))
            elif isinstance(data, SourceError):
                result.append((row, BadImage(str(data))))
            elif isinstance(data, OSError):
                raise data
            else:
                result.append((row, data))
        return result

    def decode(self, encoded: Iterable[tuple[Row, Encoded]]) -> tuple[list[Row], list[Any], list[Failure]]:
        """RGB images, the rows they belong to, and those that cannot be decoded, with a reason."""
        good, images, failed = [], [], []
        for row, data in encoded:
            try:
                if isinstance(data, BadImage):
                    raise data
                images.append(decode(data, max_pixels=self.cfg.data.max_pixels))
                good.append(row)
            except BadImage as error:
                failed.append(Failure(row.key, str(error), row.ref))
        return good, images, failed

    def arrays(
        self, encoded: Iterable[tuple[Row, Encoded]], size: int, *, crop: Literal["squash", "center"]
    ) -> tuple[list[Row], list[Any], list[Failure]]:
        """As `decode`, but uint8 arrays (3, size, size)."""
        good, arrays, failed = [], [], []
        for row, data in encoded:
            square = self.square(row, data, size, crop=crop)
            if isinstance(square, Failure):
                failed.append(square)
            else:
                good.append(row)
                arrays.append(square)
        return good, arrays, failed

    def square(self, row: Row, data: Encoded, size: int, *, crop: Literal["squash", "center"]) -> np.ndarray | Failure:
        """An image as a uint8 array (3, size, size), or why it cannot be decoded."""
        try:
            if isinstance(data, BadImage):
                raise data
            return to_square(decode_pixels(data, max_pixels=self.cfg.data.max_pixels), size, crop=crop)
        except BadImage as error:
            return Failure(row.key, str(error), row.ref)

    def __getstate__(self) -> dict[str, Any]:
        return {"cfg": self.cfg, "folders": self.folders}


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline. `content` is the part of the configuration that its results depend on.

    Raise `version` when the code comes to give other results for the same configuration. `check` is called on the
    driver before anything is started, and raises `InputError` where the stage cannot run. `notices` says in words what
    of its markers' `info` a user should hear of. A stage without `gpu` leaves the GPUs alone.
    """

    name: str
    upstream: tuple[str, ...]
    content: Callable[[Config], Any]
    units: Callable[[Run], list[Unit]]
    worker: Callable[[Run], Worker]
    threads: Callable[[Config], int] = lambda _: 1
    launch: Callable[..., None] | None = None  # runs (run, job, unit, on_event) on Ray instead of the pool
    check: Callable[[Config], None] | None = None
    notices: Mapping[str, str] = field(default_factory=dict)
    gpu: bool = True
    reads_images: bool = False  # then a unit with failed samples is worth another attempt once they are mended
    version: int = 1

    def job(self, run: Run) -> Job:
        placed, threads = run.cfg.engine.placement(self.name), self.threads(run.cfg)
        resources = Resources(
            workers=placed.workers,
            cpus=max(placed.cpus_per_worker, threads),
            gpus=placed.gpus_per_worker if self.gpu else 0,
            memory=int((placed.memory_per_worker or 0) * 2**30),
            custom=placed.resources,
            labels=placed.node_labels,
        )
        return Job(self.name, run.folders[self.name], self.worker, run, threads, resources, placed.unit_timeout)


def make_run(cfg: Config, stages: list[Stage]) -> Run:
    """Name every stage's folder by what its results depend on: its own configuration and all that is upstream."""
    root = storage.locate(cfg.root)
    names: dict[str, str] = {}
    plans = {}
    for stage in stages:
        plans[stage.name] = {
            "stage": stage.name,
            "version": stage.version,
            "config": stage.content(cfg),
            "seed": cfg.seed,
            "upstream": [names[name] for name in stage.upstream if name in names],
        }
        names[stage.name] = f"{stage.name}-{fingerprint(plans[stage.name])}"
    return Run(cfg, {name: StageFolder(root / folder, plans[name]) for name, folder in names.items()})


def device() -> str:
    """cuda where this process sees a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The GPU's name, or cpu: what a measured rate was measured on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def dtype(name: str) -> str:
    """`auto` is bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU."""
    import torch

    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def check_diffusion(cfg: Config) -> None:
    """Raises InputError, with the command that downloads it, where this machine does not see the diffusion model."""
    from vlcp_dist.models.diffusion import SD15, SD15_FILES, SD15_PARTS

    if cfg.diffusion.model is None:
        return  # the pretrain stage makes it
    try:
        find_weights(
            cfg.diffusion.model,
            cfg.diffusion.revision,
            parts=SD15_PARTS,
            default=SD15,
            files=SD15_FILES,
        )
    except FileNotFoundError as error:
        raise InputError(f"diffusion: {error}") from None


def class_shards(rows: list[Row]) -> list[str]:
    return sorted({row.shard for row in rows})
