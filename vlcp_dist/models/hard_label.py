"""The hard-label protocol: train a net from scratch on a small labelled set, and read its top-1 on a test split.

The protocol of the ImageNet subsets (IDC, Kim et al. 2022; Minimax, Gu et al. 2024): SGD with two drops of the
step, augmentation and CutMix on every batch, no teacher. The sets are small enough to lie on the device whole, so
there is no loader.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vlcp_dist.models import classifiers
from vlcp_dist.ops.augment import augment, cutmix, normalize, resize_and_crop

EVALUATION_BATCH = 256
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a training beside the data and the seed. None stands for the published value.

    `epochs` follows the IPC, and `batch_size`, `lr` and `weight_decay` the number of classes (see `resolve`).
    `width` is the net's own (`classifiers.build`). `evaluations` is about how often, at even distances, the test
    split is looked at: the best look is what the literature reports. `dtype` "bfloat16" is autocast.
    """

    net: str = "resnetap10"
    image_size: int = 256
    width: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    cutmix_probability: float = 1.0
    flip: float = 0.5
    crop_scale: tuple[float, float] = (0.5, 1.0)
    color_jitter: float = 0.4
    lighting: float = 0.1
    evaluations: int = 100
    dtype: str = "float32"
    name: str = "hard-label"


@dataclass(frozen=True)
class Result:
    """Accuracies are in percent of the test split; `curve` holds {epoch, loss, top1} of each evaluation.

    Epochs count from 1, and `best_epoch` is the first that reached `top1_best`. The curve's loss is the mean over
    the epoch's mixed batches. `per_class` is after the last epoch, None for a class that the test split lacks.
    `protocol` is what was run, the published values filled in; `seconds` are of wall time.
    """

    top1_best: float
    top1_last: float
    best_epoch: int
    epochs: int
    curve: list[dict[str, float]]
    per_class: list[float | None]
    train_images: int
    seconds: float
    protocol: Protocol


def published_epochs(ipc: int, num_classes: int) -> int:
    """The published number of epochs: fewer with more images; for 100 classes two thirds, in whole hundreds.

    Raises ValueError for an IPC below 1: for the full data it is the size of a class.
    """
    if ipc < 1:
        raise ValueError(f"no published epochs for IPC {ipc}: give the number of images of a class, or the epochs")
    table = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((epochs for largest, epochs in table if ipc <= largest), 300)
    return epochs * 2 // 3 // 100 * 100 if num_classes == 100 else epochs


def resolve(protocol: Protocol, *, num_classes: int, ipc: int) -> Protocol:
    """The protocol with the published values in place of None: above 100 classes larger batches and steps."""
    many = num_classes > 100
    epochs, batch_size = protocol.epochs, protocol.batch_size
    lr, weight_decay = protocol.lr, protocol.weight_decay
    return replace(
        protocol,
        epochs=published_epochs(ipc, num_classes) if epochs is None else epochs,
        batch_size=(128 if many else 64) if batch_size is None else batch_size,
        lr=(0.1 if many else 0.01) if lr is None else lr,
        weight_decay=(1e-4 if many else 5e-4) if weight_decay is None else weight_decay,
    )


def train(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    ipc: int,
    protocol: Protocol,
    seed: int,
    device: str | torch.device,
) -> tuple[Result, nn.Module]:
    """Train on `images` uint8 (n, 3, h, w) with `labels` int64 (n,), following the top-1 on the test split.

    Images of another size than the protocol's are resized and centre-cropped. `ipc` only chooses the published
    epochs. The same arguments and number of
    threads give the same result, `seconds` aside.

    Raises ValueError for data that do not fit together, FloatingPointError when the training diverges.
    """
    _check(images, labels, num_classes, "training")
    _check(test_images, test_labels, num_classes, "test")
    protocol = resolve(protocol, num_classes=num_classes, ipc=ipc)
    if protocol.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {protocol.dtype!r}: known are {', '.join(DTYPES)}")
    started = time.perf_counter()
    images, test_images = (_place(x, protocol.image_size, device) for x in (images, test_images))
    labels, test_labels = labels.to(device), test_labels.to(device)
    net_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    net = classifiers.build(
        protocol.net,
        num_classes=num_classes,
        image_size=protocol.image_size,
        width=protocol.width,
        seed=net_seed,
    ).to(device)
    generator = Generator().manual_seed(draw_seed)

    assert protocol.epochs is not None  # resolve has filled it in
    interval = max(protocol.epochs // protocol.evaluations, 1)
    curve: list[dict[str, float]] = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for epoch, mean_loss in enumerate(_epochs(net, images, labels, protocol, generator), start=1):
            if epoch % interval and epoch != protocol.epochs:
                continue
            loss = mean_loss.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at epoch {epoch}: lower lr (now {protocol.lr})")
            correct = _correct(net, test_images, test_labels, protocol.dtype)
            top1 = 100 * correct.double().mean().item()
            curve.append({"epoch": epoch, "loss": loss, "top1": top1})

    best = max(curve, key=lambda point: point["top1"])
    result = Result(
        top1_best=best["top1"],
        top1_last=curve[-1]["top1"],
        best_epoch=int(best["epoch"]),
        epochs=protocol.epochs,
        curve=curve,
        per_class=_per_class(correct, test_labels, num_classes),
        train_images=len(images),
        seconds=time.perf_counter() - started,
        protocol=protocol,
    )
    return result, net


def accuracy(net: nn.Module, images: Tensor, labels: Tensor, *, image_size: int, device: str | torch.device) -> float:
    """Percent of `images` uint8 (n, 3, h, w) whose largest logit is at their label, under the test transform."""
    correct = _correct(net.to(device), _place(images, image_size, device), labels.to(device), "float32")
    return 100 * correct.double().mean().item()


def _epochs(
    net: nn.Module, images: Tensor, labels: Tensor, protocol: Protocol, generator: Generator
) -> Iterator[Tensor]:
    """Train `net` in place and yield each epoch's mean loss, left on the device."""
    epochs, batch_size, lr, decay = protocol.epochs, protocol.batch_size, protocol.lr, protocol.weight_decay
    assert epochs is not None and batch_size is not None and lr is not None and decay is not None
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=protocol.momentum, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * epochs // 3, 5 * epochs // 6], gamma=0.2)
    for _ in range(epochs):
        net.train()
        total = torch.zeros((), device=images.device)
        for batch in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
            loss = _loss(net, images[batch], labels[batch], protocol, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        schedule.step()
        yield total / len(images)


def _loss(net: nn.Module, images: Tensor, labels: Tensor, protocol: Protocol, generator: Generator) -> Tensor:
    """Cross-entropy of an augmented batch against both labels of its CutMix, in the proportion of their pixels."""
    pixels = augment(
        images,
        crop_scale=protocol.crop_scale,
        flip=protocol.flip,
        color_jitter=protocol.color_jitter,
        lighting=protocol.lighting,
        generator=generator,
    )
    mixed, (kept, pasted, share) = cutmix(pixels, labels, probability=protocol.cutmix_probability, generator=generator)
    logits = _logits(net, mixed, protocol.dtype)
    return share * F.cross_entropy(logits, kept) + (1 - share) * F.cross_entropy(logits, pasted)


def _logits(net: nn.Module, pixels: Tensor, dtype: str) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return net(pixels).float()


@torch.inference_mode()
def _correct(net: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """Whether the largest logit is the label's: bool (n,)."""
    net.eval()
    parts = images.split(EVALUATION_BATCH)
    predicted = [_logits(net, normalize(part.float() / 255), dtype).argmax(1) for part in parts]
    return torch.cat(predicted) == labels


def _per_class(correct: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    count = torch.bincount(labels, minlength=num_classes).tolist()
    right = torch.bincount(labels[correct], minlength=num_classes).tolist()
    return [100 * r / n if n else None for r, n in zip(right, count, strict=True)]


def _place(images: Tensor, size: int, device: str | torch.device) -> Tensor:
    """The set on the device at the protocol's size, resized a part at a time."""
    return torch.cat([resize_and_crop(part.to(device), size) for part in images.split(EVALUATION_BATCH)])


def _check(images: Tensor, labels: Tensor, num_classes: int, what: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"the {what} images must be uint8 of shape (n, 3, h, w) with n > 0, "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"the {what} labels must be int64 of shape ({len(images)},), one for each image, "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"the {what} labels run from {labels.min()} to {labels.max()}: "
            f"{num_classes} classes need 0 to {num_classes - 1}"
        )
