"""encode: JPEG files to latents on disk, against one image at a time; and JPEG decoders against each other."""

import importlib.util
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.photographs import jpegs
from benchmarks.stable_diffusion import PIXELS, build_vae, write_model
from vlcp_dist.data import storage
from vlcp_dist.data.images import decode_pixels, to_square
from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.executor import Executor
from vlcp_dist.schema import Config
from vlcp_dist.stages import encode, index
from vlcp_dist.stages.base import Run, make_run

IMAGENET = 1_281_167
REPEATS = 3
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """What is measured: the side of the images, how many at once, how many in all, and CPU threads."""

    side: int
    batch_size: int
    images: int  # through ours
    singly: int  # of them, through the authors' way
    distinct: int
    decoders: int


def measure(device: str = "cpu", size: str = "real") -> Rows:
    """Images per second from JPEG files to verified latents, what part of it is waiting, and the hours of ImageNet."""
    return throughput(device, size) + decode(device, size)


def throughput(device: str = "cpu", size: str = "real") -> Rows:
    """Ours through the stage itself, and the authors' way: one image at a time, eager, in the same precision."""
    what = _what(device, size)
    with tempfile.TemporaryDirectory() as place, _threads(1) as set_threads:
        folder = Path(place)
        _write_images(folder / "images", what)
        write_model(folder / "model", size)
        run = _run(folder, what)
        ours, waiting = _ours(run, device)
        set_threads(os.cpu_count() or 1)
        paths = sorted((folder / "images" / "train").rglob("*.jpg"))[: what.singly]
        baseline = _authors(run.diffusion_model, paths, what.side, device)
        ceiling, needs = _ceiling(size, device)
        compiled = _compiled(folder, what, device, set_threads) if device == "cuda" else []
    common = {"images": what.images, "side": what.side, "batch_size": what.batch_size, "decoders": what.decoders}
    hours = [IMAGENET / rate / 3600 for rate in (ours, baseline, ceiling)]
    return [
        {
            "name": "encode.throughput", "ours": ours, "baseline": baseline, "ceiling": ceiling,
            "ratio": ours / baseline, "unit": "images/s", **common, **needs,
            "note": f"{ours / ceiling:.0%} of the ceiling, {ceiling:.0f}/s",
        },
        {
            "name": "encode.idle", "ours": waiting, "baseline": None, "ratio": None, "unit": "%", **common,
            "note": "of its time the worker waits for decoded images (a GPU may compute meanwhile)",
        },
        {
            "name": "encode.imagenet1k", "ours": hours[0], "baseline": hours[1], "ceiling": hours[2],
            "ratio": ours / baseline, "unit": "GPU h" if device == "cuda" else "h",
            "note": f"extrapolated to {IMAGENET:,} images",
        },
        *({**row, "baseline": ours, "ratio": row["ours"] / ours} for row in compiled),
    ]  # fmt: skip


def decode(device: str = "cpu", size: str = "real") -> Rows:
    """Decoding and resizing of whole JPEGs: images per second of one CPU core by each library, Pillow the baseline.

    CPU seconds are counted rather than those of the clock: other processes do not disturb them. nvImageCodec decodes
    and resizes on the GPU; it is measured by the clock, on a whole GPU. Libraries that are not installed are left out.
    """
    rows = []
    for width, height in ((500, 375), (1600, 1200)):
        files = jpegs(4 if size == "tiny" else 24, width, height)
        for side, crop in ((512, "squash"), (336, "center")):
            with _threads(1):
                rates = _core_rates(files, side, crop)
            if device == "cuda" and importlib.util.find_spec("nvidia.nvimgcodec"):
                rates["nvimgcodec, a whole GPU"] = _nvimgcodec(files, side)
            rows += [
                {
                    "name": f"encode.decode.{width}x{height}.{crop}{side}",
                    "ours": rate,
                    "baseline": rates["Pillow"],
                    "ratio": rate / rates["Pillow"],
                    "unit": "images/s/core",
                    "note": name,
                }
                for name, rate in rates.items()
            ]
    return rows


def _core_rates(files: list[bytes], side: int, crop: str) -> dict[str, float]:
    ways = {"ours (simplejpeg, torch)": _ours_alone, **_decoders()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 * REPEATS):  # by turns
        for name, way in ways.items():
            began = time.process_time()
            for data in files:
                way(data, side, crop)
            times[name].append((time.process_time() - began) / len(files))
    return {name: 1 / statistics.median(seconds) for name, seconds in times.items()}


def _what(device: str, size: str) -> Size:
    side, decoders = PIXELS[size], max(1, (os.cpu_count() or 1) - 1)
    if device == "cuda":
        return Size(side, batch_size=32, images=4096, singly=128, distinct=512, decoders=16)
    if size == "tiny":
        return Size(side, batch_size=16, images=512, singly=64, distinct=32, decoders=decoders)
    return Size(side, batch_size=2, images=4, singly=2, distinct=4, decoders=decoders)


def _write_images(folder: Path, what: Size) -> None:
    """Photographs as large as ImageNet's, lying and upright, in an image folder; the same one comes several times."""
    files = [*jpegs(what.distinct // 2, 500, 375), *jpegs(what.distinct - what.distinct // 2, 375, 500)]
    for split, count in (("train", what.images), ("val", 1)):
        (folder / split / "photographs").mkdir(parents=True)
        for i in range(count):
            (folder / split / "photographs" / f"{i:05d}.jpg").write_bytes(files[i % len(files)])


def _run(folder: Path, what: Size, *, compiled: bool = False) -> Run:
    """The index of a run on these images, made; two shards."""
    cfg = Config.model_validate(
        {
            "root": str(folder / "run"),
            "data": {
                "source": "imagefolder",
                "path": str(folder / "images"),
                "validation": 0.0,
                "shard_size": what.images // 2,
            },
            "diffusion": {"model": str(folder / "model")},
            "encode": {"image_size": what.side, "batch_size": what.batch_size, "compile": compiled},
            "engine": {"kind": "serial", "cpus_per_worker": what.decoders},
        }
    )
    run = make_run(cfg, [index.STAGE, encode.STAGE])
    (unit,), worker = index.units(run), index.Worker(run)
    run.folders["index"].commit(unit, worker.process(unit, None), seconds=0.0)
    return run


def _ours(run: Run, device: str) -> tuple[float, float]:
    """Images per second, and the share of the time, in %, in which the worker waits for images.

    By the stage's own worker in the executor of the engines: the shards next to it are read and written meanwhile.
    """
    executor, job, units, folder = Executor(), encode.STAGE.job(run), encode.units(run), run.folders["encode"]

    def once(units: Sequence[Unit]) -> tuple[float, float]:
        for unit in units:  # else the marker that is there would stand, and nothing be written
            storage.remove(folder.path / "done" / f"{unit.name}.json")
        machine.wait(device)
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            markers = list(pool.map(lambda unit: executor.process(job, unit), units))
        seconds = time.perf_counter() - began
        waited = sum(marker["wait_seconds"] for marker in markers)
        return sum(unit.size for unit in units) / seconds, 100 * waited / seconds

    once(units[:1])
    results = [once(units) for _ in range(REPEATS)]
    return statistics.median(rate for rate, _ in results), statistics.median(share for _, share in results)


def _authors(model: str, paths: list[Path], side: int, device: str) -> float:
    """One image at a time, eager, as published: Pillow, a float tensor, a sample of the posterior, kept in a list."""
    import diffusers

    dtype = torch.float16 if device == "cuda" else torch.float32
    vae: Any = diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=dtype).to(device).eval()

    def once() -> None:
        latents = []
        for path in paths:
            image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
            with torch.no_grad():
                z = vae.encode(pixels[None].to(device, dtype)).latent_dist.sample() * vae.config.scaling_factor
            latents.append(z[0].cpu())

    return len(paths) / _median(once, device)


def _median(call: Callable[[], object], device: str) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        machine.wait(device)
        began = time.perf_counter()
        call()
        machine.wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _ceiling(size: str, device: str) -> tuple[float, dict[str, float]]:
    """Images per second if the encoder multiplied, or moved what its layers read and write, as fast as the machine can.

    The slower of the two counts. Every layer reads its input and writes its output once; the arithmetic is that of
    convolutions and matrix products.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    moved = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved
        moved += inputs[0].numel() + output.numel()

    vae = build_vae(size, "meta", torch.float32)
    for layer in vae.encoder.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        vae.encode(torch.empty(1, 3, *(PIXELS[size],) * 2, device="meta"))
    operations, moved = flops.get_total_flops(), moved * dtype.itemsize
    multiplying = operations / machine.matmul_flops_per_second(device, dtype)
    moving = moved / machine.copy_bytes_per_second(device)
    needs = {"gflop_per_image": operations / 1e9, "mb_per_image": moved / 1e6}
    return 1 / max(multiplying, moving), needs | {"multiplying_ms": 1e3 * multiplying, "moving_ms": 1e3 * moving}


def _compiled(folder: Path, what: Size, device: str, set_threads: Callable[[int], None]) -> Rows:
    """The same with `encode.compile`; its first batches compile, and are not counted."""
    set_threads(1)
    rate, _ = _ours(_run(folder, what, compiled=True), device)
    return [{"name": "encode.compile", "ours": rate, "unit": "images/s", "note": "the baseline is ours without it"}]


def _decoders() -> dict[str, Callable[[bytes, int, str], object]]:
    """Decoders that are installed; `Pillow` resizes too, and for the others torch does, as for ours."""

    def pillow(data: bytes, side: int, crop: str) -> object:
        image = Image.open(io.BytesIO(data))
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        box = (left, top, left + short, top + short) if crop == "center" else None
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))

    def pillow_and_torch(data: bytes, side: int, crop: Any) -> object:
        return to_square(np.array(Image.open(io.BytesIO(data))), side, crop=crop)

    found: dict[str, Callable[[bytes, int, Any], object]] = {"Pillow": pillow, "Pillow, torch": pillow_and_torch}
    if importlib.util.find_spec("cv2"):
        import cv2

        how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        cv2.setNumThreads(1)
        found["OpenCV, torch"] = lambda data, side, crop: to_square(
            cv2.imdecode(np.frombuffer(data, np.uint8), how), side, crop=crop
        )
    if importlib.util.find_spec("turbojpeg"):
        import turbojpeg

        library = turbojpeg.TurboJPEG()
        found["PyTurboJPEG, torch"] = lambda data, side, crop: to_square(
            library.decode(data, pixel_format=turbojpeg.TJPF_RGB), side, crop=crop
        )
    return found


def _ours_alone(data: bytes, side: int, crop: Any) -> object:
    return to_square(decode_pixels(data), side, crop=crop)


def _nvimgcodec(files: list[bytes], side: int) -> float:
    """Images per second of NVIDIA's decoder, in batches, each image then squashed on the GPU."""
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder()

    def once() -> None:
        for image in decoder.decode(files):
            pixels = torch.from_dlpack(image).permute(2, 0, 1)[None].float()
            torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)

    return len(files) / _median(once, "cuda")


@contextmanager
def _threads(count: int) -> Iterator[Callable[[int], None]]:
    """Run with so many torch threads, as a worker does; yields what changes that."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)
