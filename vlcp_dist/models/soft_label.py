"""The soft-label protocol: a teacher labels every augmented batch, and a net of a standard architecture follows it.

The protocol of ImageNet-1K and CIFAR (RDED, Sun et al. 2024; docs/method.md, 8). It differs from RDED's script in one
thing: there each step also runs the student on the mixed batch a second time for a figure on the screen, which
updates the running statistics of its batch norm twice.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vlcp_dist.models import standard
from vlcp_dist.models.training import (
    Loss,
    Recipe,
    Result,
    Training,
    check_set,
    correctly_classified,
    place,
    predict,
    seeds,
)
from vlcp_dist.ops.augment import (
    center_crop,
    crop_and_flip,
    cutmix,
    draw_crops,
    normalize,
    resize_and_crop,
    shuffle_patches,
)

EPOCHS = 300
LOOK_EVERY = 10  # epochs, in the last fifth of the training


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a training beside data, teacher and seed. None stands for the published value.

    `factor` is that of the shuffled patches and of the smallest crop, 1/factor of the area; 1 shuffles nothing.
    """

    net: str = "resnet18"
    image_size: int = 224
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    temperature: float = 20.0
    factor: int | None = None
    flip: float = 0.5
    dtype: str = "float32"
    name: str = "soft-label"


@dataclass(frozen=True)
class TeacherRecipe:
    """How a teacher is trained on the real images: SGD with Nesterov momentum 0.9, cosine to 0, crop and flip."""

    net: str
    image_size: int
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    flip: float = 0.5
    crop_scale: tuple[float, float] = (0.25, 1.0)
    dtype: str = "float32"


def published_batch(ipc: int, num_classes: int) -> int:
    """10 at IPC 1, 50 up to IPC 10, 100 above; twice that from 100 classes on; never more than the set holds."""
    batch = 10 if ipc == 1 else 50 if ipc <= 10 else 100
    return min(batch * (2 if num_classes >= 100 else 1), ipc * num_classes)


def published_lr(net: str) -> float:
    """AdamW's 1e-3; RDED's script has 2e-3 for EfficientNet-B0 and 2.5e-3 for MobileNet-V2."""
    return {"efficientnet-b0": 2e-3, "mobilenet-v2": 2.5e-3}.get(net, 1e-3)


def published_factor(image_size: int) -> int:
    """2 for ImageNet, 1 for CIFAR."""
    return 1 if image_size <= 64 else 2


def resolve(protocol: Protocol, *, num_classes: int, ipc: int) -> Protocol:
    """The protocol with the published values in place of None."""
    epochs, batch_size, factor = protocol.epochs, protocol.batch_size, protocol.factor
    lr, weight_decay = protocol.lr, protocol.weight_decay
    return replace(
        protocol,
        epochs=EPOCHS if epochs is None else epochs,
        batch_size=published_batch(ipc, num_classes) if batch_size is None else batch_size,
        lr=published_lr(protocol.net) if lr is None else lr,
        weight_decay=0.01 if weight_decay is None else weight_decay,
        factor=published_factor(protocol.image_size) if factor is None else factor,
    )


def describe(protocol: Protocol) -> dict[str, Any]:
    """A resolved protocol whole and JSON-ready: its settings, and in words what no setting changes."""
    size, factor = protocol.image_size, protocol.factor
    shuffle = f"shuffle of {factor}x{factor} patches, " if factor != 1 else ""
    return {
        **asdict(protocol),
        "norm": "batch",
        "optimizer": "AdamW, betas (0.9, 0.999), weight decay on weights of more than one dimension only",
        "schedule": f"lr (1 + cos(pi epoch / {2 * (protocol.epochs or 0)})) / 2",
        "loss": f"KL divergence (batchmean) from the teacher, both at temperature {protocol.temperature:g}",
        "train_transform": f"{shuffle}random resized crop ({1 / (factor or 1):g}, 1), flip, ImageNet statistics, "
        "CutMix of every batch with Beta(1, 1)",
        "test_transform": f"shorter side to {test_size(size)}, centre crop {size}, ImageNet statistics",
        "reported": f"top1_best is the best of the looks in curve (every {LOOK_EVERY} epochs in the last fifth, "
        "what the literature reports), top1_last the last epoch",
    }


def test_size(image_size: int) -> int:
    """The shorter side that a test image is resized to before its centre is cropped."""
    return image_size // 7 * 8


def train(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    teacher: nn.Module,
    class_ids: list[str],
    ipc: int,
    protocol: Protocol,
    seed: int,
    device: str | torch.device,
    resume: bytes | None = None,
    after_epoch: Callable[[Training], None] = lambda _: None,
) -> tuple[Result, nn.Module]:
    """Train on what `teacher` says of `images` uint8 (n, 3, h, w), following the top-1 on the test split.

    `labels` int64 (n,) are positions in `class_ids`, as are the teacher's outputs; the student never sees them, the
    batches of CutMix are drawn without them. `resume` and `after_epoch` are as in `hard_label.train`.

    Raises ValueError for data that do not fit together, FloatingPointError when the training diverges, RuntimeError
    where a batch does not fit in the memory left (batch norm forbids parts).
    """
    num_classes = len(class_ids)
    check_set(images, labels, num_classes, "training")
    check_set(test_images, test_labels, num_classes, "test")
    protocol = resolve(protocol, num_classes=num_classes, ipc=ipc)
    net_seed, draw_seed = seeds(seed)
    net = standard.build(protocol.net, class_ids=class_ids, seed=net_seed).to(device)
    recipe = make_recipe(protocol, teacher.to(device).eval().requires_grad_(False))
    decay = protocol.weight_decay
    assert decay is not None  # resolve has filled it in
    optimizer = torch.optim.AdamW(_groups(net, decay), lr=recipe.lr(0), betas=(0.9, 0.999))
    training = Training(net, optimizer, recipe, seed=draw_seed, device=device)
    if resume is not None:
        training.resume(resume)
    result = training.fit(
        place(images, device, lambda part: resize_and_crop(part, protocol.image_size)),
        labels.to(device),
        place_test(test_images, protocol.image_size, device),
        test_labels.to(device),
        num_classes=num_classes,
        after_epoch=after_epoch,
        protocol=describe(protocol),
    )
    return result, net


def make_recipe(protocol: Protocol, teacher: nn.Module) -> Recipe:
    """What the loop does at each step of a resolved protocol."""
    epochs, batch_size, lr = protocol.epochs, protocol.batch_size, protocol.lr
    temperature, factor = protocol.temperature, protocol.factor
    assert epochs is not None and batch_size is not None and lr is not None and factor is not None

    def rate(epoch: int) -> float:
        return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs / 2))

    def look(epoch: int) -> bool:
        return epoch % LOOK_EVERY == 0 and epoch - 1 > 0.8 * epochs

    def prepare(images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Loss]:
        """An augmented and mixed batch, and the divergence from what the teacher says of it."""
        pixels = _augment(images, factor, (1 / factor, 1.0), protocol.flip, generator)
        mixed, _ = cutmix(pixels, labels, probability=1.0, generator=generator)
        targets = F.softmax(predict(teacher, mixed, protocol.dtype) / temperature, dim=1)

        def loss(logits: Tensor, part: slice) -> Tensor:
            return F.kl_div(F.log_softmax(logits / temperature, dim=1), targets[part], reduction="batchmean")

        return mixed, loss

    return Recipe(epochs, batch_size, rate, look, prepare, protocol.dtype)


def train_teacher(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    class_ids: list[str],
    recipe: TeacherRecipe,
    seed: int,
    device: str | torch.device,
    resume: bytes | None = None,
    after_epoch: Callable[[Training], None] = lambda _: None,
) -> tuple[Result, nn.Module]:
    """A net trained on the labels of real images, to label with. Arguments and errors as for `train`."""
    num_classes = len(class_ids)
    check_set(images, labels, num_classes, "training")
    check_set(test_images, test_labels, num_classes, "test")

    def prepare(images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Loss]:
        pixels = _augment(images, 1, recipe.crop_scale, recipe.flip, generator)
        return pixels, lambda logits, part: F.cross_entropy(logits, labels[part])

    def rate(epoch: int) -> float:
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))

    net_seed, draw_seed = seeds(seed)
    net = standard.build(recipe.net, class_ids=class_ids, seed=net_seed).to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = Recipe(recipe.epochs, recipe.batch_size, rate, lambda epoch: epoch % LOOK_EVERY == 0, prepare, recipe.dtype)
    training = Training(net, optimizer, steps, seed=draw_seed, device=device)
    if resume is not None:
        training.resume(resume)
    result = training.fit(
        place(images, device, lambda part: resize_and_crop(part, recipe.image_size)),
        labels.to(device),
        place_test(test_images, recipe.image_size, device),
        test_labels.to(device),
        num_classes=num_classes,
        after_epoch=after_epoch,
        protocol={"name": "teacher", **asdict(recipe), "optimizer": "SGD, Nesterov momentum 0.9, cosine to 0"},
    )
    return result, net.eval()


def accuracy(net: nn.Module, images: Tensor, labels: Tensor, *, image_size: int, device: str | torch.device) -> float:
    """Percent of `images` uint8 (n, 3, h, w) whose largest logit is at their label, under the test transform."""
    placed = place_test(images, image_size, device)
    return 100 * correctly_classified(net.to(device), placed, labels.to(device)).double().mean().item()


def place_test(images: Tensor, image_size: int, device: str | torch.device) -> Tensor:
    """Test images on the device: shorter side to `test_size`, then the centre of `image_size`."""
    return place(images, device, lambda part: center_crop(resize_and_crop(part, test_size(image_size)), image_size))


def _augment(images: Tensor, factor: int, scale: tuple[float, float], flip: float, generator: Generator) -> Tensor:
    """Shuffled patches, random resized crop, flip and normalisation of uint8 (b, 3, h, w), drawn for every image."""
    count, _, height, width = images.shape
    if factor > 1:
        images = shuffle_patches(images, factor, generator=generator)
    crops = draw_crops(count, height, width, scale=scale, generator=generator).to(images.device)
    flips = (torch.rand(count, generator=generator) < flip).to(images.device)
    return normalize(crop_and_flip(images.float().div_(255), crops, flips))


def _groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms are not decayed."""
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
