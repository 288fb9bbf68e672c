"""What a run costs, as arithmetic: pieces of work in each unit, times what a piece was measured to take.

A rate is never assumed. It comes from markers, and holds for other numbers of images, IPCs, steps and epochs, which the
pieces count, but only where the settings are the same that make a piece heavier or lighter in a way no count tells.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlcp_dist.data.manifest import Marker, Unit
from vlcp_dist.ops.order import steps_per_epoch
from vlcp_dist.schema import Config

FORWARD, TRAINING = 1, 3  # an image's passes through a net: in training one forward and about two backward
DECODE = 3  # what decoding a latent costs beside a pass of Stable Diffusion's U-Net, by operations
# A class's inner products take as long as a start of K-means for so many numbers of its latents, and so many clusters
# as long as one start more: a step adds up the rows of all members, however many clusters there are. Measured on a CPU
# with 500 and 1,300 images.
LATENT_NUMBERS, CLUSTERS = 700, 200


@dataclass(frozen=True)
class Work:
    """How a unit of a stage grows.

    Time grows with `pieces`, each a `piece`, bytes with `volume`: a model or a record is as large however long it
    took. A rate holds where `settings` are the same.
    """

    piece: str
    pieces: Callable[[Config, Unit], float]
    settings: tuple[str, ...] = ()
    volume: Callable[[Config, Unit], float] = lambda cfg, unit: 1.0


def _images(cfg: Config, unit: Unit) -> float:
    return float(unit.size)


def _views(cfg: Config, unit: Unit) -> float:
    return float(unit.size * (2 if cfg.encode.horizontal_flip else 1))


def _training_samples(cfg: Config, unit: Unit) -> float:
    tuning = cfg.finetune
    return float(tuning.epochs * steps_per_epoch(unit.size, tuning.batch_size) * tuning.batch_size)


def _starts(cfg: Config, unit: Unit) -> float:
    """Starts of K-means, weighted by the numbers of an n x n matrix for a class of n images."""
    classes, latent_numbers = unit.payload["classes"], 4 * (cfg.encode.image_size // 8) ** 2
    starts = sum(cfg.prototypes.n_init * (1 + ipc / CLUSTERS) for ipc in unit.payload["ipcs"])
    return float((starts + latent_numbers / LATENT_NUMBERS) * unit.size**2 / len(classes))


def _prototypes(cfg: Config, unit: Unit) -> float:
    return float(sum(unit.payload["ipcs"]) * len(unit.payload["classes"]))


def _passes(cfg: Config, unit: Unit) -> float:
    drawn = cfg.synthesize
    steps = int(drawn.strength * drawn.num_inference_steps)
    return float(unit.size * (steps * (2 if drawn.guidance_scale > 1 else 1) + DECODE))


def _pixels(cfg: Config, unit: Unit) -> float:
    return float(unit.size * cfg.synthesize.image_size**2)


def _logits(cfg: Config, unit: Unit) -> float:
    """One for every image and class."""
    classes = unit.size / (unit.payload["ipc"] * cfg.synthesize.images_per_prototype)
    return unit.size * classes


def _classifier_passes(cfg: Config, unit: Unit) -> float:
    """Of the images of a training, and of those of the test split at every look; a teacher sees every batch too."""
    training, epochs = unit.payload, unit.payload["epochs"]
    if cfg.evaluate.protocol == "soft":  # a look every ten epochs of the last fifth, and one at the teacher
        per_image, looks = TRAINING + FORWARD, epochs // 50 + 1
    else:
        per_image, looks = TRAINING, min(epochs, cfg.evaluate.evaluations)
    return float(epochs * unit.size * per_image + looks * training["test_images"] * FORWARD)


def _teacher_passes(cfg: Config, unit: Unit) -> float:
    epochs = cfg.evaluate.teacher.epochs
    return float(epochs * unit.size * TRAINING + (epochs // 10 + 1) * unit.payload["test_images"] * FORWARD)


_MODEL = (
    "diffusion.model", "diffusion.dtype", "encode.image_size", "pretrain.vae_channels", "pretrain.unet_channels",
)  # fmt: skip
_NETS = (
    "evaluate.protocol", "evaluate.nets", "evaluate.width", "evaluate.image_size", "evaluate.dtype",
    "evaluate.batch_size", "evaluate.micro_batch_size",
)  # fmt: skip
WORK = {
    "index": Work(  # how many images it will find is not known before
        "listing", lambda cfg, unit: 1.0, ("data.source", "data.path", "data.classes", "data.limit_per_class")
    ),
    "caption": Work(
        "images", _images,
        ("caption.captioner", "caption.model", "caption.max_new_tokens", "caption.dtype", "caption.batch_size",
         "caption.attention"),
        _images,
    ),
    "pretrain": Work("steps", lambda cfg, unit: float(cfg.pretrain.vae_steps if cfg.pretrain else 0),
                     ("pretrain.num_threads", "pretrain.vae_channels")),
    "encode": Work("images", _views, (*_MODEL, "encode.batch_size", "encode.compile"), _views),
    "pack": Work("latents", _views, ("encode.image_size", "pretrain.vae_channels"), _images),
    "finetune": Work(
        "samples", _training_samples,
        (*_MODEL, "finetune.micro_batch_size", "finetune.gradient_checkpointing", "finetune.lora_rank",
         "finetune.channels_last", "finetune.compile", "finetune.num_threads"),
    ),
    "prototypes": Work(
        "pairs x starts", _starts,
        ("encode.image_size", "pretrain.vae_channels", "prototypes.backend", "prototypes.algorithm",
         "prototypes.nested", "prototypes.classes_per_unit"),
        _prototypes,
    ),
    "synthesize": Work(
        "U-Net passes", _passes,
        (*_MODEL, "synthesize.scheduler", "synthesize.batch_size", "synthesize.compile", "synthesize.sentence_model"),
        _pixels,
    ),
    "teachers": Work("passes", _teacher_passes, ("evaluate.nets", "synthesize.soft_labels", "evaluate.image_size",
                     "evaluate.dtype", "evaluate.teacher.batch_size")),
    "soft_labels": Work(
        "images", _images, ("synthesize.soft_labels", "evaluate.image_size", "evaluate.dtype"), _logits
    ),
    "baselines": Work("passes", _classifier_passes, _NETS),
    "evaluate": Work("passes", _classifier_passes, _NETS),
}  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """What was measured of a stage. Seconds are of one worker; `start` is how long it took to be ready.

    `volume_bytes` are those of a volume of 1 (`Work.volume`), None where nothing has been written yet. `device` is
    `cpu` or the name of a GPU, `gpu_bytes` the most memory that was taken of it.
    """

    source: str
    device: str
    piece_seconds: float
    start: float = 0.0
    volume_bytes: float | None = None
    gpu_bytes: int | None = None


def pieces(stage: str, cfg: Config, unit: Unit) -> float:
    """The work in a unit, in pieces of its stage: it takes the longer the more there are."""
    return WORK[stage].pieces(cfg, unit)


def measure(stage: str, cfg: Config, units: Iterable[Unit], markers: Mapping[str, Marker], overlap: int) -> Rate | None:
    """The rate of the units that have markers; None if none has.

    `overlap` units are with a worker at once, each being read, computed or written (`seconds_of`).
    """
    done = [unit for unit in units if unit.name in markers]
    work = sum(pieces(stage, cfg, unit) for unit in done)
    if not work:
        return None
    spent = [seconds_of(markers[unit.name], overlap, cfg.finetune.batch_size) for unit in done]
    starts = [start for _, start in spent if start]
    volume = sum(WORK[stage].volume(cfg, unit) for unit in done)
    infos = [markers[unit.name]["info"] for unit in done]
    return Rate(
        source=f"{len(done)} unit{'s' if len(done) > 1 else ''}",
        device=next((info.get("device", "cpu") for info in infos), "cpu"),
        piece_seconds=sum(seconds for seconds, _ in spent) / work,
        start=sum(starts) / len(starts) if starts else 0.0,
        volume_bytes=sum(written(markers[unit.name]) for unit in done) / volume,
        gpu_bytes=max((info["gpu_bytes"] for info in infos if "gpu_bytes" in info), default=None),
    )


def seconds_of(marker: Marker, overlap: int, batch_size: int) -> tuple[float, float]:
    """Seconds of one worker that a unit took, and those before it could begin.

    With several units at once a worker is held up by computing, or where that is the longer by the rest. A training
    that was interrupted says itself how long all of it took; fine-tuning says its speed, which its start is no part of.
    """
    info, seconds, start = marker["info"], marker["seconds"], marker.get("start_seconds", 0.0)
    if "samples_per_second" in info:
        samples = info["steps"] * batch_size
        trained = (info["steps"] - info["resumed_at_step"]) * batch_size / info["samples_per_second"]
        return info["workers"] * samples / info["samples_per_second"], start + max(0.0, seconds - trained)
    computed = max(seconds, info.get("seconds", 0.0))
    around = marker.get("read_seconds", 0.0) + computed + marker.get("write_seconds", 0.0)
    return max(computed, around / overlap), start


def written(marker: Marker) -> int:
    """Bytes of a unit's files."""
    return sum(facts["bytes"] for facts in marker["files"].values())


def differences(stage: str, there: Config, here: Config) -> list[str]:
    """The settings, with both values, for which a rate measured with `there` says nothing of `here`."""
    found = ((name, *(_value(cfg, name) for cfg in (there, here))) for name in WORK[stage].settings)
    return [f"{name} is {theirs} there and {ours} here" for name, theirs, ours in found if theirs != ours]


def _value(cfg: Config, name: str) -> Any:
    """A setting by its dotted name, None in a section that the run does not have."""
    value: Any = cfg
    for key in name.split("."):
        value = getattr(value, key, None)
    return value


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Until the last of `workers` has finished, each taking the longest unit that is left whenever it is free."""
    free = [0.0] * workers
    for unit in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)
