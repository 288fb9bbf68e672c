"""soft_labels: what a teacher says of every distilled image, to be published with the images."""

import json

import torch
from safetensors.torch import save

from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.models import soft_label
from vlcp_dist.models.training import predict
from vlcp_dist.ops.augment import normalize
from vlcp_dist.schema import Config
from vlcp_dist.stages import teachers
from vlcp_dist.stages.base import Run, Stage, device
from vlcp_dist.stages.image_sets import distilled_images, split_images

LABELLED_AT_ONCE = 64  # images


def units(run: Run) -> list[Unit]:
    """A set of images each, named by its teacher too: the labels of another are added beside them."""
    net = run.cfg.synthesize.soft_labels
    assert net is not None
    name = f"{net}-{teachers.identity(run.cfg, net)}"
    per_prototype = len(run.index.class_sizes) * run.cfg.synthesize.images_per_prototype
    return [
        Unit(f"{strategy}/ipc={ipc}/{name}", ipc * per_prototype, {"strategy": strategy, "ipc": ipc, "name": name})
        for strategy in run.cfg.synthesize.strategies
        for ipc in run.cfg.ipc
    ]


class Worker:
    """Holds the teacher and knows its accuracy on the real test images."""

    def __init__(self, run: Run):
        self._run = run
        net, size = run.cfg.synthesize.soft_labels, run.cfg.evaluate.image_size
        assert net is not None
        test_images, test_labels, self._failed = split_images(run, soft_label.test_size(size))
        self._teacher, facts = teachers.load(run, net)
        top1 = soft_label.accuracy(self._teacher, test_images, test_labels, image_size=size, device=device())
        self._facts = {"net": net, **facts, "top1": top1, "split": run.cfg.evaluate.split}

    def read(self, unit: Unit) -> None:
        """Its images may be gigabytes: they are held once, not also for the unit to come."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """`<strategy>/ipc=<ipc>/soft_labels/<net>-<teacher>.safetensors` and `.json`.

        A float16 tensor of logits (images, classes) for every class id, a row for each line of that class's
        `metadata.jsonl`. The `.json` tells of the teacher, the order of its outputs and how images were prepared.
        """
        cfg, index = self._run.cfg, self._run.index
        images, labels = distilled_images(self._run, unit.payload["strategy"], unit.payload["ipc"])
        pixels = soft_label.place_test(images, cfg.evaluate.image_size, device())
        parts = (normalize(part.to(device()).float() / 255) for part in pixels.split(LABELLED_AT_ONCE))
        logits = torch.cat([predict(self._teacher, part, cfg.evaluate.dtype) for part in parts]).half().cpu()
        if not logits.isfinite().all():
            raise ValueError(f"logits of the teacher {self._facts['digest']} do not fit in float16: they exceed 65,504")
        facts = {
            "teacher": self._facts,
            "classes": list(index.labels),
            "image_size": cfg.evaluate.image_size,
            "transform": f"shorter side to {soft_label.test_size(cfg.evaluate.image_size)}, centre crop, "
            "ImageNet statistics",
            "rows": "of a class, in the order of train/<class>/metadata.jsonl",
            "temperature": cfg.evaluate.temperature,
            "images": unit.size,
            "made_from": self._run.folders["synthesize"].path.name,
        }
        stem = f"{unit.payload['strategy']}/ipc={unit.payload['ipc']}/soft_labels/{unit.payload['name']}"
        of_class = {class_id: logits[labels == label] for class_id, label in index.labels.items()}
        files = {
            f"{stem}.safetensors": save(of_class),
            f"{stem}.json": (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode(),
        }
        return Outcome(files, n_in=unit.size + len(self._failed), failed=list(self._failed))


def _content(cfg: Config) -> object:
    evaluate = cfg.evaluate
    return [cfg.synthesize.soft_labels, evaluate.image_size, evaluate.split, evaluate.dtype, evaluate.temperature]


STAGE = Stage(
    "soft_labels",
    upstream=("index", "synthesize", "teachers"),
    content=_content,
    units=units,
    worker=Worker,
    reads_images=True,
)
