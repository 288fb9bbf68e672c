"""evaluate and baselines: train classifiers on distilled or on chosen real images, test them on real ones."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from vlcp_dist.config import content
from vlcp_dist.data.index import Index, Row
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.models import classifiers, hard_label, soft_label, standard
from vlcp_dist.models.training import Result
from vlcp_dist.ops.selection import herding, k_center_greedy, random_subset
from vlcp_dist.schema import ONLY_HARD, ONLY_SOFT, REAL_METHODS, Config, Evaluate
from vlcp_dist.stages import teachers
from vlcp_dist.stages.base import Run, Stage, class_shards, device
from vlcp_dist.stages.checkpoints import Checkpoints
from vlcp_dist.stages.image_sets import check_split, distilled_images, real_images, split_images

FULL = 0  # the IPC that stands for all the real training images


def check(cfg: Config, index: Index) -> None:
    """Refuse, before anything is spent, what no classifier could be trained or tested on.

    Raises:
        InputError: the classes of the test split or of a teacher are not those of the training images.
    """
    check_split(cfg.evaluate.split, index)
    teachers.check(cfg, index)


def distilled_units(run: Run) -> list[Unit]:
    return [
        unit
        for method in run.cfg.synthesize.strategies
        for ipc in run.cfg.ipc
        for unit in _trainings(run, method, ipc, ipc * run.cfg.synthesize.images_per_prototype)
    ]


def baseline_units(run: Run) -> list[Unit]:
    largest = max(run.index.class_sizes.values())
    return [
        unit
        for method in run.cfg.evaluate.baselines
        for ipc in ([FULL] if method == "full" else run.cfg.ipc)
        for unit in _trainings(run, method, ipc, largest if method == "full" else ipc)
    ]


def _trainings(run: Run, method: str, ipc: int, per_class: int) -> list[Unit]:
    """`per_class` images of each class, of the largest one where they differ."""
    cfg = run.cfg.evaluate
    epochs = _epochs(run, ipc, per_class)
    images = run.index.split_sizes["train"] if ipc == FULL else per_class * len(run.index.class_sizes)
    return [
        Unit(
            _name(run.cfg, method, ipc, net, epochs=epochs, seed=seed),
            size=images,
            payload={
                "method": method,
                "ipc": ipc,
                "per_class": per_class,
                "net": net,
                "epochs": epochs,
                "seed": seed,
                "test_images": run.index.split_sizes[cfg.split],
            },
        )
        for net in cfg.nets
        for seed in cfg.seeds
    ]


def _epochs(run: Run, ipc: int, per_class: int) -> int:
    cfg = run.cfg.evaluate
    if isinstance(cfg.epochs, dict):
        return cfg.epochs[ipc]
    if cfg.epochs is not None:
        return cfg.epochs
    if cfg.protocol == "soft":
        return soft_label.EPOCHS
    return hard_label.published_epochs(per_class, len(run.index.classes))


def _name(cfg: Config, method: str, ipc: int, net: str, *, epochs: int, seed: int) -> str:
    taught = f"{net}/teacher={teachers.identity(cfg, net)}" if cfg.evaluate.protocol == "soft" else net
    return f"{method}/{'full' if ipc == FULL else f'ipc={ipc}'}/{taught}/epochs={epochs}/seed={seed}"


class Worker:
    """Holds the real test images, trains one net per unit."""

    def __init__(self, run: Run):
        self._run = run
        self._kept: tuple[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._teacher: tuple[str, tuple[torch.nn.Module, dict[str, Any]]] | None = None
        cfg = run.cfg.evaluate
        size = soft_label.test_size(cfg.image_size) if cfg.protocol == "soft" else cfg.image_size
        self._test, self._test_labels, self._failed = split_images(run, size)

    def read(self, unit: Unit) -> None:
        """Its images may be gigabytes: they are held once, not also for the unit to come."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """`<method>/ipc=<ipc>/<net>/epochs=<epochs>/seed=<seed>.json`: whole protocol, best and last top-1, curve.

        The net trained on all real images is kept beside its record: it says how many distilled ones it recognises.

        Raises:
            Stopped: it was asked to stop; a checkpoint holds everything up to this epoch.
        """
        run, cfg = self._run, self._run.cfg.evaluate
        method, ipc, net, seed = (unit.payload[k] for k in ("method", "ipc", "net", "seed"))
        if method in REAL_METHODS:
            images, labels, failed = real_images(run, self._choose(method, ipc, seed), cfg.image_size)
        else:
            images, labels, failed = *self._distilled(method, ipc), []
        stage = "baselines" if method in REAL_METHODS else "evaluate"
        checkpoints = Checkpoints(run.folders[stage], unit, every=cfg.checkpoint_every)
        result, trained = self._train(unit, images, labels, checkpoints)
        record = {
            "method": method,
            "ipc": "full" if ipc == FULL else ipc,
            "net": net,
            "seed": seed,
            "split": cfg.split,
            "classes": list(run.index.labels),
            "image_size": images.shape[-1],
            "test_images": len(self._test),
            **asdict(result),
        }
        if cfg.protocol == "soft":
            record["teacher"] = self._taught(net)[1]
        seconds = record.pop("seconds")
        files: dict[str, bytes | Path] = {}
        if method == "full":
            files[f"{unit.name}.safetensors"] = save(trained.cpu().state_dict())
        elif method not in REAL_METHODS and "full" in cfg.baselines:
            accuracy = soft_label.accuracy if cfg.protocol == "soft" else hard_label.accuracy
            all_knowing = self._trained_on_all(net, seed)
            record["recognised"] = accuracy(all_knowing, images, labels, image_size=cfg.image_size, device=device())
        files[f"{unit.name}.json"] = (json.dumps(record, indent=1) + "\n").encode()
        failed += self._failed
        return Outcome(files, len(images) + len(failed), failed, {"seconds": seconds}, obsolete=[checkpoints.name])

    def _train(
        self, unit: Unit, images: torch.Tensor, labels: torch.Tensor, checkpoints: Checkpoints
    ) -> tuple[Result, torch.nn.Module]:
        cfg, class_ids = self._run.cfg.evaluate, list(self._run.index.labels)
        common: dict[str, Any] = {
            "ipc": len(images) // len(class_ids) if unit.payload["ipc"] == FULL else unit.payload["per_class"],
            "seed": unit.payload["seed"],
            "device": device(),
            "resume": checkpoints.load(),
            "after_epoch": checkpoints,
        }
        data = images, labels, self._test, self._test_labels
        if cfg.protocol == "soft":
            teacher, _ = self._taught(unit.payload["net"])
            protocol = _soft(cfg, unit.payload)
            return soft_label.train(*data, teacher=teacher, class_ids=class_ids, protocol=protocol, **common)
        return hard_label.train(
            *data,
            num_classes=len(class_ids),
            protocol=_hard(cfg, unit.payload),
            micro_batch_size=cfg.micro_batch_size,
            **common,
        )

    def _taught(self, net: str) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The net's teacher, and what a record says of it, its own accuracy included; kept, as methods share it."""
        if self._teacher is None or self._teacher[0] != net:
            self._teacher = None
            teacher, facts = teachers.load(self._run, net)
            size = self._run.cfg.evaluate.image_size
            facts["top1"] = soft_label.accuracy(
                teacher, self._test, self._test_labels, image_size=size, device=device()
            )
            self._teacher = net, (teacher, facts)
        return self._teacher[1]

    def _trained_on_all(self, net: str, seed: int) -> torch.nn.Module:
        cfg, class_ids = self._run.cfg.evaluate, list(self._run.index.labels)
        model = (
            standard.build(net, class_ids=class_ids, seed=seed)
            if cfg.protocol == "soft"
            else classifiers.build(
                net, num_classes=len(class_ids), image_size=cfg.image_size, width=cfg.width, seed=seed
            )
        )
        name = _name(
            self._run.cfg,
            "full",
            FULL,
            net,
            epochs=_epochs(self._run, FULL, max(self._run.index.class_sizes.values())),
            seed=seed,
        )
        weights = self._run.folders["baselines"].path / f"{name}.safetensors"
        model.load_state_dict(load(weights.read_bytes()))
        return model

    def _distilled(self, method: str, ipc: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept, as nets and seeds share them."""
        if self._kept is None or self._kept[0] != (method, ipc):
            self._kept = None
            self._kept = (method, ipc), distilled_images(self._run, method, ipc)
        return self._kept[1]

    def _choose(self, method: str, ipc: int, seed: int) -> list[Row]:
        """The baseline's real images: from every class those that the rule picks by their latents."""
        if method == "full":
            return list(self._run.index.split("train"))
        chosen = []
        for class_id in self._run.index.class_sizes:
            rows = self._run.index.of_class(class_id)
            latents = self._run.latents(class_shards(rows))
            usable = [row for row in rows if row.key in latents]
            if method == "random":
                digest = hashlib.sha256(f"{seed}/{class_id}".encode()).digest()
                picks = random_subset(len(usable), ipc, seed=int.from_bytes(digest[:7], "big"))
            else:
                x = torch.from_numpy(np.stack([latents[row.key] for row in usable])).float().flatten(1)
                picks = (k_center_greedy if method == "k-center" else herding)(x.to(device()), ipc)
            chosen += [usable[i] for i in picks.tolist()]
        return chosen


def _hard(cfg: Evaluate, training: dict[str, Any]) -> hard_label.Protocol:
    return hard_label.Protocol(
        net=training["net"],
        image_size=cfg.image_size,
        width=cfg.width,
        epochs=training["epochs"],
        batch_size=cfg.batch_size,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        cutmix_probability=cfg.cutmix_probability,
        flip=cfg.flip,
        crop_scale=(cfg.crop_scale, 1.0),
        color_jitter=cfg.color_jitter,
        lighting=cfg.lighting,
        evaluations=cfg.evaluations,
        dtype=cfg.dtype,
    )


def _soft(cfg: Evaluate, training: dict[str, Any]) -> soft_label.Protocol:
    return soft_label.Protocol(
        net=training["net"],
        image_size=cfg.image_size,
        epochs=training["epochs"],
        batch_size=cfg.batch_size,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        temperature=cfg.temperature,
        factor=cfg.factor,
        flip=cfg.flip,
        dtype=cfg.dtype,
    )


def _settings(cfg: Config) -> object:
    """The settings of the protocol that is used. Those of its teachers are their stage's, which is upstream."""
    others = {*ONLY_HARD, "teacher"} if cfg.evaluate.protocol == "soft" else {*ONLY_SOFT}
    return {name: value for name, value in (content(cfg.evaluate) or {}).items() if name not in others}


def _evaluate_content(cfg: Config) -> object:
    """`recognised` in the records depends on whether there is a net trained on all images, and for how long."""
    epochs = cfg.evaluate.epochs
    full = "full" in cfg.evaluate.baselines
    return [_settings(cfg), full, (epochs[FULL] if isinstance(epochs, dict) else epochs) if full else None]


BASELINES = Stage(
    "baselines",
    upstream=("index", "encode", "teachers"),
    content=_settings,
    units=baseline_units,
    worker=Worker,
    reads_images=True,
)
EVALUATE = Stage(
    "evaluate",
    upstream=("index", "synthesize", "teachers", "baselines"),
    content=_evaluate_content,
    units=distilled_units,
    worker=Worker,
    reads_images=True,
)
