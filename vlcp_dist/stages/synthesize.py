"""synthesize: an image from every pair of prototypes (Eq. 6), in an ImageFolder tree for each strategy and IPC."""

import io
import json
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from vlcp_dist.config import content
from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.models.diffusion import image_seed, load_pipeline, synthesize
from vlcp_dist.ops.text import PromptStrategy, prompt_for
from vlcp_dist.stages.base import Run, Stage, check_diffusion, device, dtype


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
                        size=len(group) * ipc,
                        payload={"strategy": strategy, "ipc": ipc, "classes": group},
                    )
                )
    return result


def image_path(strategy: str, ipc: int, class_id: str, cluster: int) -> str:
    return f"{strategy}/ipc={ipc}/{class_id}/{cluster:04d}.png"


@dataclass(frozen=True)
class Prototype:
    """One image to make: `latent` is fp32 (c, h, w), `text_class` the class whose text prototype is used."""

    class_id: str
    cluster: int
    latent: torch.Tensor
    prompt: str
    text_class: str
    description_key: str | None


class Worker:
    def __init__(self, run: Run):
        self._run = run
        self._sentence_writer = resolve_name(run.cfg.synthesize.sentence_writer)
        self._pipe = load_pipeline(
            run.diffusion_model,
            unet=str(storage.local(run.folders["finetune"].path / "unet")),
            revision=run.cfg.diffusion.revision,
            device=device(),
            dtype=getattr(torch, dtype(run.cfg.diffusion.dtype)),
            scheduler=run.cfg.synthesize.scheduler,
        )

    def read(self, unit: Unit) -> list[Prototype]:
        strategy, ipc = unit.payload["strategy"], unit.payload["ipc"]
        return [
            prototype for class_id in unit.payload["classes"] for prototype in self._prototypes(strategy, ipc, class_id)
        ]

    def process(self, unit: Unit, prototypes: list[Prototype]) -> Outcome:
        """`<strategy>/ipc=<ipc>/<class>/<cluster>.png` and, in each class folder, `metadata.jsonl`."""
        cfg = self._run.cfg.synthesize
        strategy, ipc = unit.payload["strategy"], unit.payload["ipc"]
        seeds = [image_seed(self._run.cfg.seed, p.class_id, p.cluster, 0) for p in prototypes]
        images = synthesize(
            self._pipe,
            torch.stack([p.latent for p in prototypes]),
            [p.prompt for p in prototypes],
            seeds=seeds,
            negative_prompt=cfg.negative_prompt,
            strength=cfg.strength,
            guidance_scale=cfg.guidance_scale,
            num_inference_steps=cfg.num_inference_steps,
            batch_size=cfg.batch_size,
        )
        files: dict[str, Any] = {}
        metadata: dict[str, list[str]] = {class_id: [] for class_id in unit.payload["classes"]}
        for prototype, seed, image in zip(prototypes, seeds, images, strict=True):
            path = image_path(strategy, ipc, prototype.class_id, prototype.cluster)
            files[path] = _png(image, cfg.image_size)
            metadata[prototype.class_id].append(self._describe(prototype, strategy, seed))
        for class_id, lines in metadata.items():
            files[f"{strategy}/ipc={ipc}/{class_id}/metadata.jsonl"] = ("\n".join(lines) + "\n").encode()
        return Outcome(files, n_in=len(prototypes))

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
                prompt_for(
                    cast(PromptStrategy, strategy.removesuffix("-shuffled")),
                    class_name=table["class_name"],
                    description=cluster["description"],
                    keywords=[word for word, _ in cluster["keywords"]],
                    sentence_writer=self._sentence_writer,
                ),
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

    def _describe(self, prototype: Prototype, strategy: str, seed: int) -> str:
        cfg = self._run.cfg.synthesize
        facts = {
            "file_name": f"{prototype.cluster:04d}.png",
            "class_id": prototype.class_id,
            "class_name": self._run.index.names[prototype.class_id],
            "cluster": prototype.cluster,
            "strategy": strategy,
            "prompt": prototype.prompt,
            "negative_prompt": cfg.negative_prompt,
            "text_class": prototype.text_class,
            "description_key": prototype.description_key,
            "seed": seed,
            "scheduler": cfg.scheduler,
            "strength": cfg.strength,
            "guidance_scale": cfg.guidance_scale,
            "num_inference_steps": cfg.num_inference_steps,
        }
        return json.dumps(facts, ensure_ascii=False)


def _png(pixels: np.ndarray, size: int) -> bytes:
    image = Image.fromarray(pixels)
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


STAGE = Stage(
    "synthesize",
    upstream=("pretrain", "prototypes", "finetune"),
    content=lambda cfg: [content(cfg.synthesize), content(cfg.diffusion)],
    units=units,
    worker=Worker,
    check=check_diffusion,
)
