"""evaluate: the hard-label protocol with its sets on the device, against the public scripts' loaders of PNG files."""

import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import seconds, wait
from vlcp_dist.models import classifiers, hard_label
from vlcp_dist.models.hard_label import Protocol
from vlcp_dist.models.training import correctly_classified
from vlcp_dist.ops.augment import GREY, IMAGENET_MEAN, IMAGENET_STD, PCA_VALUES, PCA_VECTORS, cutmix

Row = dict[str, Any]
CLASSES, IPC, EPOCHS, LOOKS = 10, 10, 2000, 100  # the protocol's at IPC 10: every 20 epochs the test split is looked at
LOADER_WORKERS = 2
WARM_UP = 3  # epochs


class Work(NamedTuple):
    net: str
    width: int | None
    image_size: int
    epochs: int  # that are measured
    looked_at: int  # test images of a look that is measured
    test_images: int  # and of the split: ImageWoof's, CIFAR-10's


WORK = {"real": Work("resnetap10", None, 224, 30, 640, 3929), "tiny": Work("convnet3", 8, 32, 60, 2560, 10_000)}


def measure(device: str = "cpu", size: str = "real") -> list[Row]:
    """Images per second of epochs, and seconds of a whole training with its looks at the test split, projected.

    By the median epoch, and by test images per second. Ours run as the pool runs them, one training to a core where
    there is no GPU; theirs is one training with its loader's processes, which keep several cores at work. The ceiling
    is ours with the nets alone, on batches that are ready.
    """
    work = WORK[size]
    torch.set_num_threads(1)  # as in the stage; a second training runs on the next core
    protocol = hard_label.resolve(
        Protocol(
            net=work.net, width=work.width, image_size=work.image_size, epochs=work.epochs + WARM_UP + 1, evaluations=1
        ),
        num_classes=CLASSES,
        ipc=IPC,
    )
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    images, test = _pictures(len(labels), work.image_size), _pictures(work.looked_at, work.image_size)
    with tempfile.TemporaryDirectory() as folder:
        theirs = statistics.median(_from_files(_write(images, Path(folder)), labels, protocol, device)[WARM_UP:])
    with tempfile.TemporaryDirectory() as folder:
        their_look = _look_at_files(_write(test, Path(folder)), protocol, device) / len(test)
    at_once = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, context, initializer=_meet, initargs=(context.Barrier(at_once),)) as pool:
        measured = [pool.submit(_on_the_device, size, protocol, device) for _ in range(at_once)]
        ours, our_look, alone = (
            statistics.mean(values) / at_once for values in zip(*(m.result() for m in measured), strict=True)
        )

    def whole(epoch: float, look: float) -> float:
        return EPOCHS * epoch + LOOKS * work.test_images * look

    what = f"{work.net}, {len(images)} images of {work.image_size} px, batch {protocol.batch_size}, {at_once} at once"
    return [
        {
            "name": "evaluate.epoch",
            "ours": len(images) / ours,
            "baseline": len(images) / theirs,
            "ceiling": len(images) / alone,
            "ratio": theirs / ours,
            "unit": "images/s",
            "note": f"{what}; an epoch in {1000 * ours:.1f} ms against {1000 * theirs:.1f}, tests left out",
        },
        {
            "name": "evaluate.training",
            "ours": whole(ours, our_look),
            "baseline": whole(theirs, their_look),
            "ceiling": whole(alone, our_look),
            "ratio": whole(theirs, their_look) / whole(ours, our_look),
            "unit": "s",
            "note": f"{what}; {EPOCHS} epochs and {LOOKS} looks at {work.test_images} test images, projected",
        },
    ]


_start: Barrier


def _meet(barrier: Barrier) -> None:
    global _start  # noqa: PLW0603 - barriers reach processes only as they start
    _start = barrier


def _on_the_device(size: str, protocol: Protocol, device: str) -> tuple[float, float, float]:
    """Seconds of an epoch as the evaluate stage runs it, of a test image, and of the net's steps of an epoch alone."""
    torch.set_num_threads(1)
    images, test = (_pictures(count, protocol.image_size) for count in (CLASSES * IPC, WORK[size].looked_at))
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    ends = []

    def note(_: object) -> None:
        wait(device)
        ends.append(time.perf_counter())
        if len(ends) == WARM_UP:
            _start.wait(timeout=600)

    hard_label.train(
        images, labels, images[:1], labels[:1],
        num_classes=CLASSES, ipc=IPC, protocol=protocol, seed=0, device=device, after_epoch=note,
    )  # fmt: skip
    net, _ = _net(protocol, device)
    placed, truth = test.to(device), torch.zeros(len(test), dtype=torch.int64, device=device)
    look = seconds(lambda: correctly_classified(net, placed, truth), device)
    epoch = statistics.median(np.diff(ends[WARM_UP:]))
    return epoch, look / len(test), _net_alone(protocol, device)


def _from_files(paths: list[Path], labels: Tensor, protocol: Protocol, device: str) -> list[float]:
    """Seconds of each epoch as the public scripts run them: images are opened and transformed one by one."""
    torch.backends.cudnn.benchmark = True  # as the scripts set it
    net, optimizer = _net(protocol, device)
    epochs = WARM_UP + protocol.epochs
    order = [batch for _ in range(epochs) for batch in torch.randperm(len(paths)).split(protocol.batch_size)]
    loader = DataLoader(
        Files(paths, labels.tolist(), protocol),
        batch_sampler=[batch.tolist() for batch in order],  # of all epochs: no pause between two, as in the scripts
        num_workers=LOADER_WORKERS,
        pin_memory=device == "cuda",
    )
    generator = torch.Generator().manual_seed(0)
    ends = [time.perf_counter()]
    for number, batch in enumerate(loader, 1):
        pixels, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        mixed, mix = cutmix(pixels, targets, probability=protocol.cutmix_probability, generator=generator)
        _step(net, optimizer, mixed, mix)
        if number % (len(order) // epochs) == 0:
            wait(device)
            ends.append(time.perf_counter())
    return np.diff(ends).tolist()


def _look_at_files(paths: list[Path], protocol: Protocol, device: str) -> float:
    """Seconds of a look at test images, as the public scripts have it; the loader's processes are there already."""
    net, _ = _net(protocol, device)
    loader = DataLoader(
        Files(paths, [0] * len(paths), protocol, augmented=False),
        batch_size=protocol.batch_size,
        num_workers=LOADER_WORKERS,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )

    @torch.no_grad()
    def look() -> int:
        net.eval()
        return sum(int((net(pixels.to(device)).argmax(1) == labels.to(device)).sum()) for pixels, labels in loader)

    look()
    began = time.perf_counter()
    look()
    return time.perf_counter() - began


class Files(Dataset):
    """PNG files under the protocol's transforms: Pillow opens an image at a time, all else is done on its tensor."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], protocol: Protocol, *, augmented: bool = True):
        self._paths, self._labels, self._protocol, self._augmented = paths, labels, protocol, augmented
        self._grey = torch.tensor(GREY).view(3, 1, 1)
        self._mean, self._std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        self._lights = torch.tensor(PCA_VECTORS) * torch.tensor(PCA_VALUES)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        protocol = self._protocol
        with Image.open(self._paths[index]) as file:
            image = _square(file.convert("RGB"), protocol.image_size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        if self._augmented:
            pixels = self._augment(pixels, protocol)
        return (pixels - self._mean) / self._std, self._labels[index]

    def _augment(self, pixels: Tensor, protocol: Protocol) -> Tensor:
        pixels = _resized_crop(pixels, protocol.crop_scale)
        if random.random() < protocol.flip:
            pixels = pixels.flip(-1)
        blends = [self._brightness, self._contrast, self._saturation]
        random.shuffle(blends)
        for blend in blends:
            pixels = blend(pixels, random.uniform(1 - protocol.color_jitter, 1 + protocol.color_jitter))
        return pixels + (self._lights @ (protocol.lighting * torch.randn(3))).view(3, 1, 1)

    def _brightness(self, pixels: Tensor, factor: float) -> Tensor:
        return pixels * factor

    def _contrast(self, pixels: Tensor, factor: float) -> Tensor:
        return pixels * factor + (pixels * self._grey).sum(0).mean() * (1 - factor)

    def _saturation(self, pixels: Tensor, factor: float) -> Tensor:
        return pixels * factor + (pixels * self._grey).sum(0, keepdim=True) * (1 - factor)


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _resized_crop(pixels: Tensor, scale: tuple[float, float]) -> Tensor:
    size = pixels.shape[-1]
    for _ in range(10):
        area = size * size * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if width <= size and height <= size:
            left, top = random.randint(0, size - width), random.randint(0, size - height)
            part = pixels[None, :, top : top + height, left : left + width]
            return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
    return pixels


def _net_alone(protocol: Protocol, device: str) -> float:
    """Seconds of the net's steps of an epoch on batches that are ready."""
    net, optimizer = _net(protocol, device)
    assert protocol.batch_size
    labels = torch.arange(CLASSES * IPC, device=device) % CLASSES
    pixels = torch.randn(len(labels), 3, protocol.image_size, protocol.image_size, device=device)

    def epoch() -> None:
        for batch in torch.arange(len(labels)).split(protocol.batch_size):
            part = slice(int(batch[0]), int(batch[-1]) + 1)
            _step(net, optimizer, pixels[part], (labels[part], labels[part], 0.7))

    return seconds(epoch, device)


def _net(protocol: Protocol, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = classifiers.build(
        protocol.net, num_classes=CLASSES, image_size=protocol.image_size, width=protocol.width, seed=0
    ).to(device)
    settings = {"lr": protocol.lr, "momentum": protocol.momentum, "weight_decay": protocol.weight_decay}
    return net.train(), torch.optim.SGD(net.parameters(), **settings)


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, mix: tuple[Tensor, Tensor, float]) -> None:
    logits, (kept, pasted, share) = net(pixels), mix
    loss = share * F.cross_entropy(logits, kept) + (1 - share) * F.cross_entropy(logits, pasted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _pictures(count: int, size: int) -> Tensor:
    """Random shapes and a little noise: PNG files of the size that photographs have, not of noise alone."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, max(size // 8, 2), max(size // 8, 2), generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic") * 255
    return (smooth + 4 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def _write(images: Tensor, folder: Path) -> list[Path]:
    paths = [folder / f"{number:04d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return paths
