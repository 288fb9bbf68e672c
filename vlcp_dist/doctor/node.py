"""What `vlcp doctor` does on a node: it looks, measures and tries. Everything returned is plain data."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from vlcp_dist.data import cache, storage
from vlcp_dist.data.storage import Location
from vlcp_dist.engine.nodes import seen
from vlcp_dist.models import weights

# Results depend on these, or nodes exchange their objects.
PACKAGES = (
    "ray", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "scikit-learn",
    "pillow", "pyarrow", "webdataset", "fsspec", "s3fs", "gcsfs", "faiss-cpu", "faiss-gpu", "cuml-cu13",
)  # fmt: skip
PROBE_BYTES = 16 * 2**20
REDUCE_SECONDS = 60  # for all processes of an all-reduce to meet


def facts() -> dict[str, Any]:
    """What this node is and has. Memory in bytes; GPUs as the driver counts them, whatever this process may use."""
    import torch

    memory = _memory()
    gpus, driver, why_none = _gpus()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "driver": driver,
        "gpus": gpus,
        "no_gpus_because": why_none,
        "cpus": os.cpu_count(),
        "memory": memory["MemTotal"],
        "memory_available": memory["MemAvailable"],
        "cache": str(cache.folder()),
    }


def clock() -> float:
    return time.time()


def disk() -> dict[str, float]:
    """Free bytes of the cache on this node's own disk, and bytes per second written to it and read from it."""
    folder = cache.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
        path = Path(scratch) / "probe"
        written = _timed_write(path)
        read = _timed_read(path)
    return {"free": shutil.disk_usage(folder).free, "write": written, "read": read}


def write_probe(folder: Location, name: str) -> float:
    """Leave a file there for the other nodes; bytes per second, being read back and compared included.

    Raises:
        OSError: it cannot be written.
    """
    return _timed_write(folder / name)


def read_probe(folder: Location, name: str) -> tuple[list[str], float]:
    """The names of the probes that are seen from here, and bytes per second of reading one that another node wrote.

    Raises:
        OSError: it cannot be read, or holds something else.
    """
    return (sorted(storage.listing(folder)), _timed_read(folder / name)) if seen(folder / name) else ([], 0.0)


def clear_probes(folder: Location) -> None:
    """Remove what `write_probe` left, where this node sees it."""
    for name in storage.listing(folder):
        storage.remove(folder / name)
    if isinstance(folder, Path) and folder.is_dir():
        folder.rmdir()


def missing(places: dict[str, Location]) -> list[str]:
    """The places that are not there, by the names they are given."""
    return [name for name, place in places.items() if not seen(place)]


def model(name: str, revision: str | None, parts: tuple[str, ...], default: str, files: tuple[str, ...]) -> str:
    """What there is of a model, in words; the arguments are those of `find_weights`.

    Raises:
        ValueError: it is not here, or not whole; the message says what to do.
    """
    try:
        found = weights.find_weights(name, revision, parts=parts, default=default, files=files)
    except FileNotFoundError as error:
        raise ValueError(str(error).replace("\n", " ")) from None  # a line of its own in the list
    numbers = sum(weights.count_parameters(path) for path in found)
    return f"{numbers / 1e6:,.1f} million parameters, whole, in {found[0].parents[1 if parts[0] else 0]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def all_reduce(rank: int, world: int, address: str, backend: str) -> dict[str, Any]:
    """Sum 4 MiB over one process per node, as fine-tuning does over all its processes at every step.

    Raises:
        RuntimeError: the processes do not reach each other, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda" if backend == "nccl" else "cpu")
    name = torch.cuda.get_device_name() if backend == "nccl" else "cpu"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=REDUCE_SECONDS),
    )
    try:
        values = torch.full((2**20,), rank + 1.0, device=device)
        dist.all_reduce(values)  # the first one also sets the connections up
        began = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])
        seconds = time.perf_counter() - began
    finally:
        dist.destroy_process_group()
    if total != world * world * (world + 1) / 2:
        raise RuntimeError(f"the sum over {world} processes came out as {total}; check {name} and its interconnect")
    return {"device": name, "seconds": seconds}


def _gpus() -> tuple[list[dict[str, Any]], str | None, str]:
    """GPUs (name, memory in bytes), the driver's version, and why there are none, from `nvidia-smi`."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,memory.used,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError:
        return [], None, "nvidia-smi is not installed"
    except subprocess.CalledProcessError as error:
        return [], None, (error.stdout + error.stderr).strip()
    except subprocess.TimeoutExpired:
        return [], None, "nvidia-smi does not answer: restart the node"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line]
    gpus = [{"name": row[0], "memory": int(row[1]) * 2**20, "memory_used": int(row[2]) * 2**20} for row in rows]
    return gpus, rows[0][3] if rows else None, "" if rows else "nvidia-smi lists none"


def _memory() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return {line[0].removesuffix(":"): int(line[1]) * 1024 for line in lines}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _content(name: str) -> bytes:
    """Bytes that no file system can compress, the same on every node for the same name."""
    return hashlib.shake_128(name.encode()).digest(PROBE_BYTES)


def _timed_write(path: Location) -> float:
    content = _content(path.name)
    began = time.perf_counter()
    storage.write(path, content)
    return PROBE_BYTES / (time.perf_counter() - began)


def _timed_read(path: Location) -> float:
    began = time.perf_counter()
    (content,) = storage.fetch([path])
    seconds = time.perf_counter() - began
    if content != _content(path.name):
        raise OSError(f"{path}: {len(content)} bytes that are not those written; this storage cannot be relied on")
    return PROBE_BYTES / seconds
