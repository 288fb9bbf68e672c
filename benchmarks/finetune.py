"""finetune: cached latents and embeddings against decoding and encoding at every step; two workers against one."""

import argparse
import io
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.photographs import jpegs
from benchmarks.stable_diffusion import PIXELS, WORDS, build_unet, write_model
from vlcp_dist.data import shards
from vlcp_dist.models.tiny_sd import MAX_TOKENS
from vlcp_dist.pipeline import stages
from vlcp_dist.schema import Config
from vlcp_dist.stages import finetune, index
from vlcp_dist.stages.base import Run, make_run

Row = dict[str, Any]
LIMIT = 1e-4  # by which the losses of two workers may differ from those of one


@dataclass(frozen=True)
class Size:
    """What is measured: images, the batch, how much of it goes through ours at once, steps, the baseline's loaders."""

    side: int
    images: int
    batch: int
    micro_batch: int
    steps: int
    loaders: int

    @property
    def authors_micro_batch(self) -> int:
        """Their scripts put 32 images through at once and add up four of them."""
        return min(32, self.batch)


def measure(device: str = "cpu", size: str = "real") -> list[Row]:
    return [*throughput(device, size), *workers(device, size)]


def throughput(device: str = "cpu", size: str = "real") -> list[Row]:
    """Samples per second and peak memory of optimizer steps: ours, and the authors' recipe, same U-Net and batch."""
    what = _what(device, size)
    with tempfile.TemporaryDirectory() as place:
        _prepare(Path(place), what, size)
        ours, baseline, alike = (_in_a_process(way, place, device, size) for way in ("ours", "authors", "alike"))
    flops = _flops_per_sample(size)
    at_best = machine.matmul_flops_per_second(device, torch.bfloat16 if device == "cuda" else torch.float32)
    ceiling = at_best / flops
    common = {"batch": what.batch, "side": what.side, "steps": what.steps, "flops_per_sample": flops}
    return [
        {
            "name": "finetune.throughput", "ours": ours["rate"], "baseline": baseline["rate"], "ceiling": ceiling,
            "ratio": ours["rate"] / baseline["rate"], "unit": "samples/s", **common,
            "note": f"batch {what.batch}, {what.micro_batch} at once; the authors' scripts: "
            f"{what.authors_micro_batch} at once, {what.loaders} loaders",
        },
        {
            "name": "finetune.micro_batch", "ours": ours["rate"], "baseline": alike["rate"], "ceiling": ceiling,
            "ratio": ours["rate"] / alike["rate"], "unit": "samples/s", **common,
            "note": f"the same, the authors' recipe with {what.micro_batch} at once too",
        },
        {
            "name": "finetune.utilisation", "ours": 100 * ours["rate"] / ceiling,
            "baseline": 100 * baseline["rate"] / ceiling, "ceiling": 100.0,
            "ratio": ours["rate"] / baseline["rate"], "unit": "%", **common,
            "note": f"{flops / 1e9:.3g} GFLOP a sample, over {at_best / 1e12:.3g} TFLOP/s of matrix products",
        },
        {
            "name": "finetune.memory", "ours": ours["peak_gib"], "baseline": baseline["peak_gib"],
            "ratio": baseline["peak_gib"] / ours["peak_gib"], "unit": "GiB", **common,
            "note": "peak, of the GPU" if device == "cuda" else "peak, resident",
        },
    ]  # fmt: skip


def workers(device: str = "cpu", size: str = "real") -> list[Row]:
    """The largest difference between the losses of two workers (ZeRO-1) and of one, at the same global batch."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        return []
    what = _what(device, size)
    with tempfile.TemporaryDirectory() as place:
        _prepare(Path(place), what, size)
        one = _in_a_process("losses", place, device, size)["losses"]
        began = time.perf_counter()
        two = _in_two_processes(place, device, size)["losses"]
        seconds = time.perf_counter() - began
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    return [
        {
            "name": "finetune.workers", "ours": apart, "baseline": LIMIT, "ratio": LIMIT / max(apart, 1e-12),
            "unit": "loss", "steps": len(one), "note": f"two workers against one, {len(one)} steps, {seconds:.0f} s",
        }
    ]  # fmt: skip


def _what(device: str, size: str) -> Size:
    cores, side = os.cpu_count() or 1, PIXELS[size]
    if device == "cuda":
        return Size(side, images=1024, batch=128, micro_batch=16, steps=8, loaders=min(16, cores))
    if size == "tiny":
        return Size(side, images=256, batch=128, micro_batch=128, steps=8, loaders=max(1, cores - 1))
    return Size(side, images=4, batch=2, micro_batch=1, steps=2, loaders=max(1, cores - 1))


def _prepare(folder: Path, what: Size, size: str) -> None:
    """Images, a model with random weights, and what the stages before fine-tuning leave, with random latents."""
    files = jpegs(min(what.images, 64), 500, 375)
    for split, count in (("train", what.images), ("val", 1)):
        (folder / "images" / split / "photographs").mkdir(parents=True)
        for i in range(count):
            (folder / "images" / split / "photographs" / f"{i:05d}.jpg").write_bytes(files[i % len(files)])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), 70)) for _ in range(what.images)]
    write_model(folder / "model", size)
    run = _run(folder, what)
    (unit,), worker = index.units(run), index.Worker(run)
    run.folders["index"].commit(unit, worker.process(unit, worker.read(unit)), seconds=0.0)
    shape = (4, what.side // 8, what.side // 8)
    for shard in run.index.shards:
        rows = run.index.shard(shard)
        described = [(row.key, {"txt": text.encode()}) for row, text in zip(rows, texts, strict=False)]
        latents = [(row.key, {"npy": shards.to_npy(rng.normal(size=shape).astype(np.float16))}) for row in rows]
        for stage, samples in (("caption", described), ("encode", latents)):
            path = run.folders[stage].path / f"{shard}.tar"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(shards.pack(samples))


def _flops_per_sample(size: str) -> float:
    """Of forward and backward pass, nothing twice: matrix products and convolutions, as PyTorch counts them."""
    unet = build_unet(size, "meta", torch.float32)
    with torch.device("meta"):
        latent, time_step = torch.randn(1, 4, *(unet.config.sample_size,) * 2), torch.zeros(1, dtype=torch.long)
        text = torch.randn(1, MAX_TOKENS, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter:
        unet(latent, time_step, text).sample.sum().backward()
    return float(counter.get_total_flops())


def _run(folder: Path, what: Size, **changes: Any) -> Run:
    cfg = Config.model_validate(
        {
            "root": str(folder / "run"),
            "data": {
                "source": "imagefolder",
                "path": str(folder / "images"),
                "validation": 0.0,
                "shard_size": max(1, what.images // 4),
            },
            "diffusion": {"model": str(folder / "model")},
            "encode": {"image_size": what.side},
            "engine": {"kind": "serial"},
            "finetune": {
                "epochs": 1000,
                "batch_size": what.batch,
                "micro_batch_size": what.micro_batch,
                "gradient_checkpointing": False,
                "strategy": "ddp",
                "trackers": [],
                **changes,
            },
        }
    )
    return make_run(cfg, stages(cfg))


def _steps(run: Run, scratch: Path) -> Iterator[float]:
    """The stage's own loop without its log: losses of optimizer steps."""
    trainer = finetune.make_trainer(run, scratch)
    inputs = finetune.make_inputs(run, trainer)
    with finetune.read_ahead(run, inputs, trainer) as ahead:
        for batch, latents, text in ahead:
            yield trainer.step(latents, text, batch)


def _authors(folder: Path, what: Size, micro_batch: int, device: str) -> Iterator[float]:
    """The recipe of the authors' script: the loader decodes, the VAE and the text encoder run at every step.

    Their settings: gradient checkpointing, AdamW and EMA as diffusers' example has them, 16-bit autocast on a GPU.
    """
    import accelerate
    import diffusers
    from diffusers.training_utils import EMAModel

    weights = torch.bfloat16 if device == "cuda" else torch.float32
    accelerator = accelerate.Accelerator(
        mixed_precision="bf16" if device == "cuda" else "no",
        cpu=device == "cpu",
        gradient_accumulation_steps=what.batch // micro_batch,
    )
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    vae, text_encoder, unet = pipe.vae.to(device, weights), pipe.text_encoder.to(device, weights), pipe.unet
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    unet.enable_gradient_checkpointing()
    unet.train().to(device)
    ema = EMAModel(unet.parameters(), decay=0.9999)
    ema.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    run = _run(folder, what)
    described = run.descriptions(run.index.shards)
    paths = sorted((folder / "images" / "train").rglob("*.jpg"))
    ids = pipe.tokenizer(
        list(described.values()), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    loader = torch.utils.data.DataLoader(
        _Images(paths, ids, what.side), batch_size=micro_batch, shuffle=True, drop_last=True,
        num_workers=what.loaders, persistent_workers=True, pin_memory=device == "cuda",
    )  # fmt: skip
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    while True:
        for pixels, tokens in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(pixels.to(weights)).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
                noisy = schedule.add_noise(latents, noise, timesteps)
                condition = text_encoder(tokens, return_dict=False)[0]
                predicted = unet(noisy, timesteps, condition, return_dict=False)[0]
                loss = torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
                yield loss.item()


class _Images(torch.utils.data.Dataset):
    """Decoded, resized (bilinear, the shorter side), cropped in the centre, flipped by chance, in [-1, 1]."""

    def __init__(self, paths: list[Path], ids: torch.Tensor, side: int):
        self._paths, self._ids, self._side = paths, ids, side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(io.BytesIO(self._paths[i].read_bytes())).convert("RGB")
        scale, side = self._side / min(image.size), self._side
        width, height = (max(side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1)
        pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
        return pixels.float() / 127.5 - 1, self._ids[i % len(self._ids)]


def _timed(losses: Iterator[float], what: Size, device: str) -> Row:
    """Samples per second after two steps of warming up; every step ends with its loss on the CPU."""
    for _ in range(2):
        next(losses)
    machine.wait(device)
    began = time.perf_counter()
    for _ in range(what.steps):
        next(losses)
    machine.wait(device)
    rate = what.steps * what.batch / (time.perf_counter() - began)
    peak = (
        torch.cuda.max_memory_allocated() / 2**30
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    return {"rate": rate, "peak_gib": peak}


def _command(way: str, place: str, device: str, size: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.finetune", way, place, device, size]


def _in_a_process(way: str, place: str, device: str, size: str) -> Row:
    """A process of its own each, so that peaks of memory do not mix."""
    result = subprocess.run(_command(way, place, device, size), check=True, stdout=subprocess.PIPE, text=True)
    measured: Row = json.loads(result.stdout.splitlines()[-1])
    return measured


def _in_two_processes(place: str, device: str, size: str) -> Row:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            _command("losses", place, device, size),
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a worker failed; its error is above")
    measured: Row = json.loads(outputs[0].splitlines()[-1])
    return measured


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("ours", "authors", "alike", "losses"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("device")
    parser.add_argument("size")
    arguments = parser.parse_args()
    what = _what(arguments.device, arguments.size)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.way in ("authors", "alike"):
            micro_batch = what.authors_micro_batch if arguments.way == "authors" else what.micro_batch
            row = _timed(_authors(arguments.folder, what, micro_batch, arguments.device), what, arguments.device)
        elif arguments.way == "ours":
            row = _timed(_steps(_run(arguments.folder, what), Path(scratch)), what, arguments.device)
        else:
            two = os.environ.get("WORLD_SIZE") == "2"
            run = _run(arguments.folder, what, workers=2 if two else 1, strategy="deepspeed" if two else "ddp")
            losses = _steps(run, Path(scratch))
            row = {"losses": [next(losses) for _ in range(50)]}
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    _main()
