"""evaluate and baselines: train classifiers on distilled or on chosen real images, test them on real ones."""

import hashlib
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

from vlcp_dist.config import REAL_METHODS, Config, content
from vlcp_dist.data import storage
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.models import classifiers
from vlcp_dist.models.hard_label import Protocol, accuracy, published_epochs, train
from vlcp_dist.ops.selection import herding, k_center_greedy, random_subset
from vlcp_dist.stages.base import Run, Stage, class_shards, device
from vlcp_dist.stages.synthesize import image_path

READ_AT_ONCE = 256  # images
FULL = 0  # the IPC that stands for all the real training images


def distilled_units(run: Run) -> list[Unit]:
    return [
        unit
        for method in run.cfg.synthesize.strategies
        for ipc in run.cfg.ipc
        for unit in _trainings(run, method, ipc, images=ipc * len(run.index.class_sizes))
    ]


def baseline_units(run: Run) -> list[Unit]:
    everything = run.index.split_sizes["train"]
    return [
        unit
        for method in run.cfg.evaluate.baselines
        for ipc in ([FULL] if method == "full" else run.cfg.ipc)
        for unit in _trainings(
            run, method, ipc, images=everything if method == "full" else ipc * len(run.index.class_sizes)
        )
    ]


def _trainings(run: Run, method: str, ipc: int, images: int) -> list[Unit]:
    cfg = run.cfg.evaluate
    epochs = _epochs(run, ipc)
    return [
        Unit(
            _name(method, ipc, net, epochs, seed),
            size=images,
            payload={"method": method, "ipc": ipc, "net": net, "epochs": epochs, "seed": seed},
        )
        for net in cfg.nets
        for seed in cfg.seeds
    ]


def _epochs(run: Run, ipc: int) -> int:
    epochs = run.cfg.evaluate.epochs
    if isinstance(epochs, dict):
        return epochs[ipc]
    if epochs is not None:
        return epochs
    largest = max(run.index.class_sizes.values())
    return published_epochs(largest if ipc == FULL else ipc, len(run.index.classes))


def _name(method: str, ipc: int, net: str, epochs: int, seed: int) -> str:
    return f"{method}/{'full' if ipc == FULL else f'ipc={ipc}'}/{net}/epochs={epochs}/seed={seed}"


class Worker:
    """Holds the real test images, trains one net per unit."""

    def __init__(self, run: Run):
        self._run = run
        self._kept: tuple[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        cfg = run.cfg.evaluate
        rows = list(run.index.split(cfg.split))
        if not rows:
            raise ValueError(f"the {cfg.split} split holds no image; see data.validation and data.test")
        self._test, self._test_labels, self._failed = self._load(rows)

    def read(self, unit: Unit) -> None:
        """Its images may be gigabytes: they are held once, not also for the unit to come."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """`<method>/ipc=<ipc>/<net>/epochs=<epochs>/seed=<seed>.json`: protocol, best and last top-1, curve.

        The net trained on all real images is kept beside its record: it says how many distilled ones it recognises.
        """
        method, ipc, net, epochs, seed = (unit.payload[k] for k in ("method", "ipc", "net", "epochs", "seed"))
        if method in REAL_METHODS:
            images, labels, failed = self._load(self._choose(method, ipc, seed))
        else:
            images, labels, failed = *self._distilled(method, ipc), []
        classes = self._run.index.classes
        result, trained = train(
            images,
            labels,
            self._test,
            self._test_labels,
            num_classes=len(classes),
            ipc=ipc or len(images) // len(classes),
            protocol=self._protocol(net, epochs),
            seed=seed,
            device=device(),
        )
        record = {
            "method": method,
            "ipc": "full" if ipc == FULL else ipc,
            "net": net,
            "seed": seed,
            "split": self._run.cfg.evaluate.split,
            "classes": [info.id for info in classes],
            "test_images": len(self._test),
            **asdict(result),
        }
        seconds = record.pop("seconds")
        files: dict[str, bytes | Path] = {}
        if method == "full":
            files[f"{unit.name}.safetensors"] = save(trained.cpu().state_dict())
        elif method not in REAL_METHODS and "full" in self._run.cfg.evaluate.baselines:
            record["recognised"] = accuracy(
                self._trained_on_all(net, seed),
                images,
                labels,
                image_size=self._run.cfg.evaluate.image_size,
                device=device(),
            )
        files[f"{unit.name}.json"] = (json.dumps(record, indent=1) + "\n").encode()
        failed += self._failed
        return Outcome(files, len(images) + len(failed), failed, {"seconds": seconds})

    def _trained_on_all(self, net: str, seed: int) -> torch.nn.Module:
        cfg = self._run.cfg.evaluate
        model = classifiers.build(
            net, num_classes=len(self._run.index.classes), image_size=cfg.image_size, width=cfg.width, seed=seed
        )
        name = _name("full", FULL, net, _epochs(self._run, FULL), seed)
        weights = self._run.folders["baselines"].path / f"{name}.safetensors"
        model.load_state_dict(load(weights.read_bytes()))
        return model

    def _protocol(self, net: str, epochs: int) -> Protocol:
        cfg = self._run.cfg.evaluate
        return Protocol(
            net=net,
            image_size=cfg.image_size,
            width=cfg.width,
            epochs=epochs,
            batch_size=cfg.batch_size,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            cutmix_probability=cfg.cutmix_probability,
            flip=cfg.flip,
            crop_scale=(cfg.crop_scale, 1.0),
            color_jitter=cfg.color_jitter,
            lighting=cfg.lighting,
            evaluations=cfg.evaluations,
        )

    def _distilled(self, method: str, ipc: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distilled images uint8 (n, 3, size, size) and their labels; kept, as nets and seeds share them."""
        if self._kept and self._kept[0] == (method, ipc):
            return self._kept[1]
        self._kept = None
        folder, size = self._run.folders["synthesize"].path, self._run.cfg.synthesize.image_size
        repeats = range(self._run.cfg.synthesize.images_per_prototype)
        names = [(class_id, c, r) for class_id in self._run.index.class_sizes for c in range(ipc) for r in repeats]
        pixels = _room_for(len(names), size)
        for start in range(0, len(names), READ_AT_ONCE):
            part = names[start : start + READ_AT_ONCE]
            encoded = storage.fetch([folder / image_path(method, ipc, *name) for name in part])
            for i, data in enumerate(encoded, start):
                pixels[i] = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
        labels = torch.tensor([self._run.index.labels[class_id] for class_id, *_ in names])
        self._kept = (method, ipc), (torch.from_numpy(pixels), labels)
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

    def _load(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, list[Failure]]:
        """Real images uint8 (n, 3, size, size), their labels, and the images that could not be read."""
        size = self._run.cfg.evaluate.image_size
        pixels = _room_for(len(rows), size)
        labels: list[int] = []
        failed: list[Failure] = []
        for start in range(0, len(rows), READ_AT_ONCE):
            good, arrays, bad = self._run.arrays(
                self._run.read(rows[start : start + READ_AT_ONCE]), size, crop="center"
            )
            failed += bad
            for row, array in zip(good, arrays, strict=True):
                pixels[len(labels)] = array
                labels.append(self._run.index.labels[row.class_id])
        return torch.from_numpy(pixels[: len(labels)]), torch.tensor(labels), failed


def _room_for(images: int, size: int) -> np.ndarray:
    """An array for so many images of `size` px.

    Raises:
        ValueError: this machine has no memory for it.
    """
    needed, present = images * 3 * size * size, _available_memory()
    if needed > 0.8 * present:
        raise ValueError(
            f"{images} images of {size} px take {needed / 2**30:.1f} GiB of memory, "
            f"{present / 2**30:.1f} GiB are available; use a smaller evaluate.image_size, fewer workers, "
            f"or leave `full` out of evaluate.baselines"
        )
    return np.empty((images, 3, size, size), np.uint8)


def _available_memory() -> int:
    """Bytes that can be had without swapping, page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _work(unit: Unit) -> float:
    return float(unit.size * unit.payload["epochs"])


def _evaluate_content(cfg: Config) -> object:
    """`recognised` in the records depends on whether there is a net trained on all images, and for how long."""
    epochs = cfg.evaluate.epochs
    full = "full" in cfg.evaluate.baselines
    return [content(cfg.evaluate), full, (epochs[FULL] if isinstance(epochs, dict) else epochs) if full else None]


BASELINES = Stage(
    "baselines",
    upstream=("index", "encode"),
    content=lambda cfg: content(cfg.evaluate),
    units=baseline_units,
    worker=Worker,
    work=_work,
    reads_images=True,
)
EVALUATE = Stage(
    "evaluate",
    upstream=("index", "synthesize", "baselines"),
    content=_evaluate_content,
    units=distilled_units,
    worker=Worker,
    work=_work,
    reads_images=True,
)
