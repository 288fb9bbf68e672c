"""pack: the latents of each class in one memory-mappable file, so that a class is one sequential read."""

from vlcp_dist.data import packs
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.stages.base import Run, Stage, class_shards


def units(run: Run) -> list[Unit]:
    return [Unit(class_id, size=size) for class_id, size in run.index.class_sizes.items() if size]


class Worker:
    def __init__(self, run: Run):
        self._run = run

    def read(self, unit: Unit) -> tuple[list[Row], dict[str, str]]:
        """The rows of the class, and of those whose encoding failed the reason, by key."""
        rows = self._run.index.of_class(unit.name)
        encoded = self._run.folders["encode"]
        reasons: dict[str, str] = {}
        for name in class_shards(rows):
            marker = encoded.marker(name)
            if marker is None:
                raise FileNotFoundError(f"{encoded.path / name}.tar is not whole: run the encode stage again")
            reasons |= {failure["key"]: failure["reason"] for failure in marker["failed"]}
        return rows, reasons

    def process(self, unit: Unit, data: tuple[list[Row], dict[str, str]]) -> Outcome:
        """`classes/<class>.npy`, fp16 (n, c, h, w), bit for bit what the shards hold, and a `.json` with its keys.

        Raises:
            ValueError: not one image of the class has a latent.
            ShardError: the shards do not hold what their markers say.
        """
        rows, reasons = data
        keys = [row.key for row in rows if row.key not in reasons]
        if not keys:
            raise ValueError(
                f"class {unit.name}: none of its {len(rows)} images has a latent (the first: {reasons[rows[0].key]}); "
                f"mend the images or leave the class out of data.classes"
            )
        folder = self._run.folders["encode"].path
        files = packs.build(unit.name, keys, [folder / f"{name}.tar" for name in class_shards(rows)])
        failed = [Failure(row.key, reasons[row.key], row.ref) for row in rows if row.key in reasons]
        return Outcome(files, unit.size, failed)


STAGE = Stage("pack", upstream=("index", "encode"), content=lambda cfg: None, units=units, worker=Worker, gpu=False)
