"""pretrain: a small Stable Diffusion made from the training images, where no pretrained weights are given."""

import tempfile
from pathlib import Path

import numpy as np

from vlcp_dist.config import content
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.models.tiny_sd import build_tiny_sd
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import Run, Stage


def units(run: Run) -> list[Unit]:
    return [Unit("model", size=run.index.split_sizes["train"])]


class Worker:
    def __init__(self, run: Run):
        self._run = run
        self._scratch = tempfile.TemporaryDirectory(prefix="vlcp-pretrain-")

    def read(self, unit: Unit) -> None:
        """It holds all images at once, and there is one unit only."""

    def process(self, unit: Unit, _: None) -> Outcome:
        """`model/`: a diffusers folder with a trained VAE and text encoder and an untrained U-Net."""
        run = self._run
        assert run.cfg.pretrain is not None
        texts = run.descriptions(run.index.shards)
        described = [row for row in run.index.split("train") if row.key in texts]
        rows, images, failed = run.arrays(run.read(described), run.cfg.encode.image_size, crop=run.cfg.encode.resize)
        folder, beat = Path(self._scratch.name) / "model", run.folders["pretrain"].heartbeat
        metrics = build_tiny_sd(
            folder,
            np.stack(images),
            [texts[row.key] for row in rows],
            vae_steps=run.cfg.pretrain.vae_steps,
            vae_channels=run.cfg.pretrain.vae_channels,
            contrastive_steps=run.cfg.pretrain.contrastive_steps,
            unet_channels=run.cfg.pretrain.unet_channels,
            num_threads=run.cfg.pretrain.num_threads,
            seed=run.cfg.seed,
            progress=lambda phase, step, steps, loss: beat(phase, step, steps, loss=loss),
        )
        files: dict[str, bytes | Path] = {
            str(path.relative_to(folder.parent)): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        return Outcome(files, len(rows) + len(failed), failed, metrics)


def _threads(cfg: Config) -> int:
    return cfg.pretrain.num_threads if cfg.pretrain else 1


STAGE = Stage(
    "pretrain",
    upstream=("index", "caption"),
    content=lambda cfg: [content(cfg.pretrain), cfg.encode.image_size, cfg.encode.resize],
    units=units,
    worker=Worker,
    threads=_threads,
    version=2,
)
