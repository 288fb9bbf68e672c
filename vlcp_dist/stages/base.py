"""What every stage is made of: its description, and a run's view of the files that earlier stages left."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vlcp_dist.config import Config, fingerprint
from vlcp_dist.data import shards
from vlcp_dist.data.images import BadImage, decode, to_array
from vlcp_dist.data.index import Index, Row
from vlcp_dist.data.manifest import Failure, StageFolder, Unit
from vlcp_dist.data.sources import Source, open_source
from vlcp_dist.engine.executor import Job, Worker


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
        return self.cfg.diffusion.model or str(self.folders["pretrain"].path / "model")

    def latents(self, shard_names: Iterable[str]) -> shards.Arrays:
        """Latents by sample key, fp16 (4, h, w), memory-mapped."""
        return shards.Arrays(self.folders["encode"].path / f"{name}.tar" for name in shard_names)

    def descriptions(self, shard_names: Iterable[str]) -> dict[str, str]:
        """Descriptions by sample key."""
        folder = self.folders["caption"].path
        return {
            key: parts["txt"].decode() for name in shard_names for key, parts in shards.read(folder / f"{name}.tar")
        }

    def images(
        self, rows: Iterable[Row], size: int, *, crop: Literal["squash", "center"]
    ) -> tuple[list[Row], list[Any], list[Failure]]:
        """Real images as uint8 arrays (3, size, size), those rows that could be read, and the others with a reason."""
        good, arrays, failed = [], [], []
        for row in rows:
            try:
                arrays.append(to_array(self.decode(row), size, crop=crop))
                good.append(row)
            except BadImage as error:
                failed.append(Failure(row.key, str(error), row.ref))
        return good, arrays, failed

    def decode(self, row: Row) -> Any:
        """The image of a row, RGB.

        Raises:
            BadImage: it cannot be read as an image.
        """
        try:
            data = self.source.read(row.ref)
        except FileNotFoundError as error:  # other errors of the storage are worth another attempt
            raise BadImage(f"is gone: {error}") from error
        return decode(data, max_pixels=self.cfg.data.max_pixels)

    def __getstate__(self) -> dict[str, Any]:
        return {"cfg": self.cfg, "folders": self.folders}


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline. `content` is the part of the configuration that its results depend on.

    Raise `version` when the code comes to give other results for the same configuration.
    """

    name: str
    upstream: tuple[str, ...]
    content: Callable[[Config], Any]
    units: Callable[[Run], list[Unit]]
    worker: Callable[[Run], Worker]
    threads: Callable[[Config], int] = lambda _: 1
    launch: Callable[..., None] | None = None  # runs (run, job, unit, on_event) on Ray instead of the pool
    version: int = 1

    def job(self, run: Run) -> Job:
        return Job(self.name, run.folders[self.name], self.worker, run, self.threads(run.cfg))


def make_run(cfg: Config, stages: list[Stage]) -> Run:
    """Name every stage's folder by what its results depend on: its own configuration and all that is upstream."""
    root = Path(os.path.abspath(cfg.root))  # noqa: PTH100 - workers have another working directory
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


def dtype(name: str) -> str:
    """`auto` is bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU."""
    import torch

    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def class_shards(rows: list[Row]) -> list[str]:
    return sorted({row.shard for row in rows})
