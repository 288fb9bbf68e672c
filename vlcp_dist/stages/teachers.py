"""teachers: what labels images, trained on the real ones where no checkpoint is given."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vlcp_dist.config import content
from vlcp_dist.data import storage
from vlcp_dist.data.index import Index
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.errors import InputError
from vlcp_dist.models import soft_label, standard
from vlcp_dist.models.soft_label import TeacherRecipe
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import Run, Stage, device
from vlcp_dist.stages.checkpoints import Checkpoints
from vlcp_dist.stages.image_sets import real_images, split_images

TRAINED = "trained"  # stands for the identity of a teacher of this run, which its folder's name fixes


def units(run: Run) -> list[Unit]:
    cfg = run.cfg.evaluate
    sizes, labelling = run.index.split_sizes, run.cfg.synthesize.soft_labels
    nets = dict.fromkeys([*(cfg.nets if cfg.protocol == "soft" else []), *([labelling] if labelling else [])])
    return [
        Unit(net, size=sizes["train"], payload={"net": net, "test_images": sizes[cfg.split]})
        for net in nets
        if net not in cfg.teacher.checkpoints
    ]


class Worker:
    def __init__(self, run: Run):
        self._run = run

    def read(self, unit: Unit) -> None:
        """Its images may be gigabytes: they are held once, not also for the unit to come."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """`<net>/` in transformers' layout, outputs named by class id, and `<net>/training.json`: recipe, accuracies.

        Raises:
            Stopped: it was asked to stop; a checkpoint holds everything up to this epoch.
        """
        run, cfg, net = self._run, self._run.cfg.evaluate, unit.payload["net"]
        images, labels, failed = real_images(run, list(run.index.split("train")), cfg.image_size)
        test_images, test_labels, failed_tests = split_images(run, soft_label.test_size(cfg.image_size))
        checkpoints = Checkpoints(run.folders["teachers"], unit, every=cfg.checkpoint_every)
        result, model = soft_label.train_teacher(
            images,
            labels,
            test_images,
            test_labels,
            class_ids=list(run.index.labels),
            recipe=TeacherRecipe(
                net=net,
                image_size=cfg.image_size,
                epochs=cfg.teacher.epochs,
                batch_size=cfg.teacher.batch_size,
                lr=cfg.teacher.lr,
                weight_decay=cfg.teacher.weight_decay,
                flip=cfg.flip,
                crop_scale=(cfg.teacher.crop_scale, 1.0),
                dtype=cfg.dtype,
            ),
            seed=run.cfg.seed,
            device=device(),
            resume=checkpoints.load(),
            after_epoch=checkpoints,
        )
        record = {name: value for name, value in vars(result).items() if name != "seconds"}
        files: dict[str, bytes | Path] = {f"{net}/{name}": data for name, data in standard.files(model.cpu()).items()}
        files[f"{net}/training.json"] = (json.dumps(record, indent=1) + "\n").encode()
        failed += failed_tests
        n_in = len(images) + len(failed)
        return Outcome(files, n_in, failed, {"seconds": result.seconds}, obsolete=[checkpoints.name])


def load(run: Run, net: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The teacher of a net and what a record says of it.

    Raises:
        InputError: its classes, or their order, are not the data's.
    """
    given = run.cfg.evaluate.teacher.checkpoints.get(net)  # type: ignore[call-overload]
    place = storage.locate(given) if given else run.folders["teachers"].path / net
    folder = storage.local(place)
    check_classes(standard.class_ids(folder), list(run.index.labels), str(place))
    model = standard.load(folder)
    facts = {
        "architecture": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "from": "checkpoint" if given else "trained on the training images of this run",
        "digest": _digest(str(folder)),
    }
    return model, facts


def identity(cfg: Config, net: str) -> str:
    """What names a net's teacher in the name of a unit: a digest of the checkpoint's bytes, or `TRAINED`.

    Raises:
        InputError: there is no such checkpoint.
    """
    given = cfg.evaluate.teacher.checkpoints.get(net)  # type: ignore[call-overload]
    return _digest(given) if given else TRAINED


def check(cfg: Config, index: Index) -> None:
    """Refuse, before anything is spent, a checkpoint that is not there or whose classes are not the data's.

    Raises:
        InputError: it names both sides and the way out.
    """
    for net, given in cfg.evaluate.teacher.checkpoints.items():
        try:
            class_ids = standard.class_ids(storage.local(storage.locate(given)))
        except FileNotFoundError as error:
            raise InputError(f"evaluate.teacher.checkpoints.{net}: {error}") from error
        check_classes(class_ids, list(index.labels), given)


def check_classes(teacher: list[str], data: list[str], place: str) -> None:
    """Refuse a teacher whose outputs are not the classes of the data in the order of their ids.

    Raises:
        InputError: it names both sides and the way out.
    """
    way_out = "give one trained on these classes, its id2label naming them by id in sorted order, or none to train one"
    if len(teacher) != len(data):
        raise InputError(
            f"the teacher {place} knows {len(teacher)} classes ({_some(teacher)}), the data have {len(data)} "
            f"({_some(data)}); {way_out}"
        )
    if set(teacher) != set(data):
        raise InputError(
            f"the teacher {place} knows {_some(sorted(set(teacher) - set(data)))}, which the data lack, and not "
            f"{_some(sorted(set(data) - set(teacher)))}, which they have; {way_out}"
        )
    for position, (of_teacher, of_data) in enumerate(zip(teacher, data, strict=True)):
        if of_teacher != of_data:
            raise InputError(
                f"the teacher {place} has its classes in another order than the data: output {position} is "
                f"{of_teacher}, class {position} of the data {of_data}; {way_out}"
            )


@cache
def _digest(folder: str) -> str:
    """Eight hex digits of a checkpoint's bytes."""
    place = storage.locate(folder)
    try:
        found = [storage.sha256(place / name) for name in (standard.CONFIG, standard.WEIGHTS)]
    except FileNotFoundError as error:
        raise InputError(f"the teacher {folder} is no checkpoint in transformers' layout: {error}") from error
    return hashlib.sha256("".join(found).encode()).hexdigest()[:8]


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _content(cfg: Config) -> object:
    evaluate = cfg.evaluate
    return [content(evaluate.teacher), evaluate.image_size, evaluate.flip, evaluate.dtype, evaluate.split]


STAGE = Stage("teachers", upstream=("index",), content=_content, units=units, worker=Worker, reads_images=True)
