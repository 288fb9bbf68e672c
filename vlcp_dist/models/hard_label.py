"""The hard-label protocol: train a net from scratch on a small labelled set, and read its top-1 on a test split.

The protocol of the ImageNet subsets (IDC, Kim et al. 2022; Minimax, Gu et al. 2024; docs/method.md, 8): SGD with two
drops of the step, augmentation and CutMix on every batch, no teacher. The sets are small enough to lie on the device
whole, so there is no loader.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vlcp_dist.models import classifiers
from vlcp_dist.models.training import Loss, Recipe, Result, Training, check_set, correctly_classified, place, seeds
from vlcp_dist.ops.augment import augment, cutmix, resize_and_crop


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a training beside the data and the seed. None stands for the published value.

    `epochs` follows the IPC, `batch_size`, `lr` and `weight_decay` the number of classes, `cutmix_probability` the
    image size (see `resolve`). `width` is the net's own (`classifiers.build`). `evaluations` is about how often, at
    even distances, the test split is looked at: the best look is what the literature reports. `dtype` "bfloat16" is
    autocast.
    """

    net: str = "resnetap10"
    image_size: int = 256
    width: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    cutmix_probability: float | None = None
    flip: float = 0.5
    crop_scale: tuple[float, float] = (0.5, 1.0)
    color_jitter: float = 0.4
    lighting: float = 0.1
    evaluations: int = 100
    dtype: str = "float32"
    name: str = "hard-label"


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
    """The protocol with the published values in place of None.

    Above 100 classes batches and steps are larger; CutMix is for every batch, for every other one of CIFAR (32 px).
    """
    many = num_classes > 100
    epochs, batch_size, cut = protocol.epochs, protocol.batch_size, protocol.cutmix_probability
    lr, weight_decay = protocol.lr, protocol.weight_decay
    return replace(
        protocol,
        epochs=published_epochs(ipc, num_classes) if epochs is None else epochs,
        batch_size=(128 if many else 64) if batch_size is None else batch_size,
        lr=(0.1 if many else 0.01) if lr is None else lr,
        weight_decay=(1e-4 if many else 5e-4) if weight_decay is None else weight_decay,
        cutmix_probability=(0.5 if protocol.image_size <= 32 else 1.0) if cut is None else cut,
    )


def describe(protocol: Protocol) -> dict[str, Any]:
    """A resolved protocol whole and JSON-ready: its settings, and in words what no setting changes."""
    size, (first, second) = protocol.image_size, _drops(protocol)
    return {
        **asdict(protocol),
        "norm": "instance",
        "optimizer": "SGD",
        "schedule": f"lr x 0.2 after epoch {first} and again after epoch {second}",
        "loss": "cross-entropy with both labels of a CutMix, by their share of the pixels",
        "train_transform": f"shorter side to {size}, centre crop, random resized crop, flip, colour jitter, "
        "PCA lighting, ImageNet statistics, CutMix",
        "test_transform": f"shorter side to {size}, centre crop {size}, ImageNet statistics",
        "reported": "top1_best is the best of the looks in curve (what the literature reports), "
        "top1_last the last epoch",
    }


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
    micro_batch_size: int | None = None,
    resume: bytes | None = None,
    after_epoch: Callable[[Training], None] = lambda _: None,
) -> tuple[Result, nn.Module]:
    """Train on `images` uint8 (n, 3, h, w) with `labels` int64 (n,), following the top-1 on the test split.

    Images of another size than the protocol's are resized and centre-cropped. `ipc` only chooses the published
    epochs. `after_epoch` sees the training after each epoch but the last, and `resume` is a `Training.state` that it
    took. The same arguments and number of threads give the same result, `seconds` aside, resumed or not; in parts of
    `micro_batch_size` the sums differ in the last digits.

    Raises ValueError for data that do not fit together, FloatingPointError when the training diverges.
    """
    check_set(images, labels, num_classes, "training")
    check_set(test_images, test_labels, num_classes, "test")
    protocol = resolve(protocol, num_classes=num_classes, ipc=ipc)
    net_seed, draw_seed = seeds(seed)
    net = classifiers.build(
        protocol.net,
        num_classes=num_classes,
        image_size=protocol.image_size,
        width=protocol.width,
        seed=net_seed,
    ).to(device)
    recipe = make_recipe(protocol)
    decay = protocol.weight_decay
    assert decay is not None  # resolve has filled it in
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr(0), momentum=protocol.momentum, weight_decay=decay)
    training = Training(net, optimizer, recipe, seed=draw_seed, device=device, micro_batch_size=micro_batch_size)
    if resume is not None:
        training.resume(resume)
    result = training.fit(
        place(images, device, lambda part: resize_and_crop(part, protocol.image_size)),
        labels.to(device),
        place(test_images, device, lambda part: resize_and_crop(part, protocol.image_size)),
        test_labels.to(device),
        num_classes=num_classes,
        after_epoch=after_epoch,
        protocol=describe(protocol),
    )
    return result, net


def make_recipe(protocol: Protocol) -> Recipe:
    """What the loop does at each step of a resolved protocol."""
    epochs, batch_size, lr = protocol.epochs, protocol.batch_size, protocol.lr
    probability = protocol.cutmix_probability
    assert epochs is not None and batch_size is not None and lr is not None and probability is not None
    interval = max(epochs // protocol.evaluations, 1)
    drops = _drops(protocol)

    def rate(epoch: int) -> float:
        result = lr
        for drop in drops:
            result *= 0.2 if epoch >= drop else 1.0
        return result

    def prepare(images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Loss]:
        """An augmented batch, and the cross-entropy against both labels of its CutMix by their share of pixels."""
        pixels = augment(
            images,
            crop_scale=protocol.crop_scale,
            flip=protocol.flip,
            color_jitter=protocol.color_jitter,
            lighting=protocol.lighting,
            generator=generator,
        )
        mixed, (kept, pasted, share) = cutmix(pixels, labels, probability=probability, generator=generator)

        def loss(logits: Tensor, part: slice) -> Tensor:
            own, other = F.cross_entropy(logits, kept[part]), F.cross_entropy(logits, pasted[part])
            return share * own + (1 - share) * other

        return mixed, loss

    return Recipe(epochs, batch_size, rate, lambda epoch: epoch % interval == 0, prepare, protocol.dtype)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor, *, image_size: int, device: str | torch.device) -> float:
    """Percent of `images` uint8 (n, 3, h, w) whose largest logit is at their label, under the test transform."""
    placed = place(images, device, lambda part: resize_and_crop(part, image_size))
    return 100 * correctly_classified(net.to(device), placed, labels.to(device)).double().mean().item()


def _drops(protocol: Protocol) -> tuple[int, int]:
    epochs = protocol.epochs
    assert epochs is not None
    return 2 * epochs // 3, 5 * epochs // 6
