"""index: lists the samples, splits them and cuts the shards. Pixels are not read."""

import math

from vlcp_dist.config import content
from vlcp_dist.data import storage
from vlcp_dist.data.index import Index, assign, files
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.errors import InputError
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import Run, Stage


def units(run: Run) -> list[Unit]:
    return [Unit("index", size=0)]  # how many samples there are is what it finds out


class Worker:
    def __init__(self, run: Run):
        self._run = run

    def read(self, unit: Unit) -> None:
        """There is nothing to fetch ahead: listing the source is the work."""

    def process(self, unit: Unit, data: None) -> Outcome:
        """The three files of an index (see `data.index.files`)."""
        cfg, source, folder = self._run.cfg.data, self._run.source, self._run.folders["index"]
        table = assign(
            source.samples(lambda done, total: folder.heartbeat("scan", done, total)),
            validation=cfg.validation,
            test=cfg.test,
            shard_size=cfg.shard_size,
            limit_per_class=cfg.limit_per_class,
            seed=self._run.cfg.seed,
        )
        return Outcome(files(table, source.classes(), shard_size=cfg.shard_size), n_in=len(table))


def check_sizes(cfg: Config, index: Index) -> None:
    """Refuse, before anything is spent, a class that cannot give the prototypes asked for.

    Raises:
        InputError: a class with too few training images; the message names the class, the count and the way out.
    """
    largest = max(cfg.ipc)
    for info in index.classes:
        n = index.class_sizes[info.id]
        kept = n - math.ceil(cfg.prototypes.contamination * (n - 1))  # what the percentile leaves of distinct scores
        if n < 2 and cfg.prototypes.contamination > 0:
            raise InputError(
                f"class {info.id} ({info.name}) has {n} training image(s): outlier removal needs at least 2; "
                f"add images, leave the class out of data.classes, or set prototypes.contamination=0"
            )
        if kept < largest:
            raise InputError(
                f"class {info.id} ({info.name}) has {n} training images, {kept} after outlier removal, "
                f"fewer than ipc {largest}; ask for a smaller ipc or leave the class out of data.classes"
            )


def _content(cfg: Config) -> object:
    """Of a listing file its bytes, not its place: an uploaded copy of it lies elsewhere every time."""
    data = content(cfg.data)
    if data and isinstance(cfg.data.class_names, str):
        listing = storage.locate(cfg.data.class_names)
        data["class_names"] = storage.sha256(listing) if listing.exists() else None
    return data


STAGE = Stage("index", upstream=(), content=_content, units=units, worker=Worker, gpu=False, version=2)
