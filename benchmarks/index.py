"""index.files: listing, splitting and writing down a training set of ImageNet's size, against a plain listing of it."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def measure(files: int = 1_281_167, classes: int = 1000) -> list[dict[str, Any]]:
    """Seconds and peak memory (MiB) of ours and of the plain way, each in a fresh process, on a tree of empty files."""
    with tempfile.TemporaryDirectory() as folder:
        _make_tree(Path(folder) / "images", files, classes)
        ours, baseline = (_in_a_process(way, Path(folder)) for way in ("ours", "baseline"))
    return [
        {
            "name": "index.files",
            "files": files,
            "ours": ours["seconds"],
            "baseline": baseline["seconds"],
            "ratio": round(baseline["seconds"] / ours["seconds"], 2),
            "unit": "s",
            "peak_mib": ours["peak_mib"],
            "baseline_peak_mib": baseline["peak_mib"],
            "note": f"{files} files, {ours['peak_mib']} MiB; against listing them alone, without splits and shards, "
            f"{baseline['peak_mib']} MiB",
        }
    ]


def ours(folder: Path) -> None:
    """The index stage as a run does it: listing, safe and unique keys, splits, shards, written and verified."""
    from vlcp_dist.schema import Config
    from vlcp_dist.stages import index
    from vlcp_dist.stages.base import make_run

    images = folder / "images"
    names = {path.name: f"class {path.name}" for path in images.iterdir()}
    data = {"source": "imagefolder", "path": str(images), "class_names": names, "test": 0.04, "validation": 0.01}
    config = Config.model_validate({"root": str(folder / "run"), "data": data, "diffusion": {"model": "none"}})
    run = make_run(config, [index.STAGE])
    worker, (unit,) = index.Worker(run), index.units(run)
    run.folders["index"].commit(unit, worker.process(unit, worker.read(unit)), seconds=0.0)


def baseline(folder: Path) -> None:
    """What loaders of image folders do: walk every class folder, keep (path, label) of the images; then one table."""
    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    images = folder / "images"
    classes = sorted(entry.name for entry in os.scandir(images) if entry.is_dir())
    samples = []
    for label, name in enumerate(classes):
        for root, _, names in sorted(os.walk(images / name, followlinks=True)):
            for file in sorted(names):
                if file.lower().endswith(extensions):
                    samples.append((os.path.join(root, file), label))  # noqa: PTH118 - as they do it
    paths, labels = zip(*samples, strict=True)
    pq.write_table(pa.table({"path": paths, "label": labels}), folder / "plain.parquet")


def _make_tree(root: Path, files: int, classes: int) -> None:
    for i in range(classes):
        name = f"n{i:08d}"
        (root / name).mkdir(parents=True)
        for j in range(files // classes + (i < files % classes)):
            os.close(os.open(root / name / f"{name}_{j * 7919 % 65536}.JPEG", os.O_CREAT | os.O_WRONLY))


def _in_a_process(way: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.index", way, str(folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("ours", "baseline"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    {"ours": ours, "baseline": baseline}[arguments.way](arguments.folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"seconds": round(seconds, 2), "peak_mib": round(peak)}) + "\n")


if __name__ == "__main__":
    _main()
