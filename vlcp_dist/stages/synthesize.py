"""synthesize: an image from every pair of prototypes (Eq. 6), in an ImageFolder tree for each strategy and IPC."""

import io
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load

from vlcp_dist.config import content
from vlcp_dist.data import shards, storage
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.errors import InputError
from vlcp_dist.models.diffusion import image_seed
from vlcp_dist.models.synthesis import Synthesizer, load_pipeline
from vlcp_dist.models.weights import find_weights
from vlcp_dist.models.writer import SentenceWriter
from vlcp_dist.ops.text import PromptStrategy, prompt_for
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import Run, Stage, check_diffusion, device, dtype
from vlcp_dist.stages.dataset_card import dataset_card

PNG_THREADS = 4  # they encode one batch while the next is being denoised


def units(run: Run) -> list[Unit]:
    """Classes are grouped so that a unit holds about `prototypes_per_unit` images, whatever the IPC."""
    class_ids = list(run.index.class_sizes)
    result = []
    for strategy in run.cfg.synthesize.strategies:
        for ipc in run.cfg.ipc:
            per_unit = max(1, run.cfg.synthesize.prototypes_per_unit // ipc)
            for start in range(0, len(class_ids), per_unit):
                group = class_ids[start : start + per_unit]
                result.append(
                    Unit(
                        f"{strategy}/ipc={ipc}/{start // per_unit:04d}",
                        size=len(group) * ipc * run.cfg.synthesize.images_per_prototype,
                        payload={"strategy": strategy, "ipc": ipc, "classes": group, "number": start // per_unit},
                    )
                )
    return result


def image_path(strategy: str, ipc: int, class_id: str, cluster: int, repeat: int = 0) -> str:
    return f"{strategy}/ipc={ipc}/train/{class_id}/{cluster:04d}-{repeat}.png"


@dataclass(frozen=True)
class Prototype:
    """A pair of prototypes: `latent` is fp32 (c, h, w), `text` what prompts are made of, taken from `text_class`."""

    class_id: str
    cluster: int
    latent: torch.Tensor
    text: dict[str, Any]
    text_class: str
    description_key: str | None


@dataclass(frozen=True)
class Image:
    """One image to make."""

    prototype: Prototype
    prompt: str
    repeat: int
    seed: int


class Worker:
    def __init__(self, run: Run):
        self._run = run
        cfg, precision = run.cfg.synthesize, getattr(torch, dtype(run.cfg.diffusion.dtype))
        pipe = load_pipeline(
            run.diffusion_model,
            unet=str(storage.local(run.folders["finetune"].path / "unet")),
            revision=run.cfg.diffusion.revision,
            device=device(),
            dtype=precision,
            scheduler=cfg.scheduler,
        )
        if cfg.compile:
            pipe.unet.compile()
        self._synthesizer = Synthesizer(
            pipe,
            negative_prompt=cfg.negative_prompt,
            strength=cfg.strength,
            guidance_scale=cfg.guidance_scale,
            num_inference_steps=cfg.num_inference_steps,
            batch_size=cfg.batch_size,
        )
        self._writer = None
        if cfg.sentence_model and "GGS" in cfg.strategies:
            self._writer = SentenceWriter(
                cfg.sentence_model, revision=cfg.sentence_model_revision, device=device(), dtype=precision
            )

    def read(self, unit: Unit) -> list[Prototype]:
        return [
            prototype
            for class_id in unit.payload["classes"]
            for prototype in self._prototypes(unit.payload["strategy"], unit.payload["ipc"], class_id)
        ]

    def process(self, unit: Unit, prototypes: list[Prototype]) -> Outcome:
        """The unit's part of the folder `<strategy>/ipc=<ipc>/`.

        `train/<class>/<cluster>-<repeat>.png` with `metadata.jsonl` in each class folder, `webdataset/train-<unit>.tar`
        with the same images, and in the first unit `README.md`, the card of the data set.
        """
        cfg = self._run.cfg.synthesize
        strategy, ipc = unit.payload["strategy"], unit.payload["ipc"]
        images = [
            Image(
                prototype, prompt, repeat, image_seed(self._run.cfg.seed, prototype.class_id, prototype.cluster, repeat)
            )
            for prototype, prompt in zip(prototypes, self._prompts(strategy, prototypes), strict=True)
            for repeat in range(cfg.images_per_prototype)
        ]
        drawn = self._synthesizer.draw(
            torch.stack([image.prototype.latent for image in images]),
            [image.prompt for image in images],
            [image.seed for image in images],
        )
        encoded: dict[int, Future[bytes]] = {}
        with ThreadPoolExecutor(PNG_THREADS) as threads:
            for positions, batch in drawn:
                for position, pixels in zip(positions, batch, strict=True):
                    encoded[position] = threads.submit(_png, pixels, cfg.image_size)
        pngs = [encoded[i].result() for i in range(len(images))]
        root = f"{strategy}/ipc={ipc}"
        files: dict[str, bytes] = {}
        facts = [self._facts(image, strategy) for image in images]
        for image, png in zip(images, pngs, strict=True):
            files[image_path(strategy, ipc, image.prototype.class_id, image.prototype.cluster, image.repeat)] = png
        for class_id in unit.payload["classes"]:
            lines = [json.dumps(fact, ensure_ascii=False) for fact in facts if fact["class_id"] == class_id]
            files[f"{root}/train/{class_id}/metadata.jsonl"] = ("\n".join(lines) + "\n").encode()
        number = unit.payload["number"]
        files[f"{root}/webdataset/train-{number:04d}.tar"] = shards.pack(
            (
                f"{fact['label']:06d}-{fact['cluster']:04d}-{fact['repeat']}",
                {"cls": str(fact["label"]).encode(), "json": json.dumps(fact, ensure_ascii=False).encode(), "png": png},
            )
            for fact, png in zip(facts, pngs, strict=True)
        )
        if number == 0:
            files[f"{root}/README.md"] = dataset_card(self._run, strategy, ipc).encode()
        return Outcome(files, n_in=len(images))

    def _prompts(self, strategy: str, prototypes: list[Prototype]) -> list[str]:
        """What each prototype is drawn under, by a strategy of Table 5."""
        if strategy == "GGS" and self._writer:
            return self._writer.write([(p.text["class_name"], p.text["keywords"]) for p in prototypes])
        kind = cast(PromptStrategy, strategy.removesuffix("-shuffled"))
        return [prompt_for(kind, **p.text) for p in prototypes]

    def _prototypes(self, strategy: str, ipc: int, class_id: str) -> list[Prototype]:
        folder = self._run.folders["prototypes"].path / f"ipc={ipc}"
        centers = load((folder / f"{class_id}.safetensors").read_bytes())["centers"]
        text_class = self._other_class(class_id) if strategy == "DCS-shuffled" else class_id
        table = json.loads((folder / f"{text_class}.json").read_text())
        return [
            Prototype(
                class_id,
                c,
                centers[c],
                {
                    "class_name": table["class_name"],
                    "description": cluster["description"],
                    "keywords": [word for word, _ in cluster["keywords"]],
                },
                text_class,
                cluster["key"],
            )
            for c, cluster in enumerate(table["clusters"])
        ]

    def _other_class(self, class_id: str) -> str:
        """Another class, by a shift that the seed chooses: each class gives its texts to exactly one other."""
        class_ids = list(self._run.index.class_sizes)
        if len(class_ids) < 2:
            raise ValueError("DCS-shuffled needs at least two classes; leave it out of synthesize.strategies")
        shift = int(np.random.default_rng(self._run.cfg.seed).integers(1, len(class_ids)))
        return class_ids[(class_ids.index(class_id) + shift) % len(class_ids)]

    def _facts(self, image: Image, strategy: str) -> dict[str, Any]:
        """A line of `metadata.jsonl`: everything that an image is made of."""
        cfg, prototype = self._run.cfg.synthesize, image.prototype
        return {
            "file_name": f"{prototype.cluster:04d}-{image.repeat}.png",
            "class_id": prototype.class_id,
            "class_name": self._run.index.names[prototype.class_id],
            "label": self._run.index.labels[prototype.class_id],
            "cluster": prototype.cluster,
            "repeat": image.repeat,
            "strategy": strategy,
            "prompt": image.prompt,
            "negative_prompt": cfg.negative_prompt,
            "text_class": prototype.text_class,
            "description_key": prototype.description_key,
            "seed": image.seed,
            "scheduler": cfg.scheduler,
            "strength": cfg.strength,
            "guidance_scale": cfg.guidance_scale,
            "num_inference_steps": cfg.num_inference_steps,
            "made_by": self._run.folders["synthesize"].path.name,
        }


def _png(pixels: np.ndarray, size: int) -> bytes:
    image = PIL.Image.fromarray(pixels)
    if image.width != size:
        image = image.resize((size, size), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def check(cfg: Config) -> None:
    """Raises InputError, with the command that downloads it, where a model is missing."""
    check_diffusion(cfg)
    model = cfg.synthesize.sentence_model
    if model and "GGS" in cfg.synthesize.strategies:
        try:
            find_weights(model, cfg.synthesize.sentence_model_revision, default="OWNER/MODEL")
        except FileNotFoundError as error:
            raise InputError(f"synthesize.sentence_model: {error}") from None


STAGE = Stage(
    "synthesize",
    upstream=("pretrain", "prototypes", "finetune"),
    content=lambda cfg: [content(cfg.synthesize), content(cfg.diffusion)],
    units=units,
    worker=Worker,
    check=check,
    version=2,
)
