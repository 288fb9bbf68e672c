"""index: lists the samples, splits them and cuts the shards. Pixels are not read."""

import math

from vlcp_dist.config import Config, content
from vlcp_dist.data.index import Index, assign
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.errors import InputError
from vlcp_dist.stages.base import Run, Stage


def units(run: Run) -> list[Unit]:
    return [Unit("index", size=0)]  # how many samples there are is what it finds out


class Worker:
    def __init__(self, run: Run):
        self._run = run

    def process(self, unit: Unit) -> Outcome:
        data = self._run.cfg.data
        source = self._run.source
        rows = assign(
            source.samples(),
            validation=data.validation,
            test=data.test,
            shard_size=data.shard_size,
            limit_per_class=data.limit_per_class,
            seed=self._run.cfg.seed,
        )
        return Outcome(Index(rows, source.classes()).files(), n_in=len(rows))


def check_sizes(cfg: Config, index: Index) -> None:
    """Refuse, before anything is spent, a class that cannot give the prototypes asked for.

    Raises:
        InputError: a class with too few training images; the message names the class, the count and the way out.
    """
    largest = max(cfg.ipc)
    for info in index.classes:
        n = len(index.by_class.get(info.id, []))
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


STAGE = Stage("index", upstream=(), content=lambda cfg: content(cfg.data), units=units, worker=Worker)
