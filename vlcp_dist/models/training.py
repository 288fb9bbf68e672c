"""The loop of both protocols: epochs over a set that lies on the device, looks at the test split, checkpoints."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Generator, Tensor, nn

from vlcp_dist.ops.augment import normalize

PLACED_AT_ONCE = 256  # images
LOOKED_AT_ONCE = {"cuda": 256, "cpu": 64}  # images; what a CPU works on should stay in its caches
DEVICE_SHARE = 0.25  # of the device's free memory that a set of images may take; a larger set stays with the host
DTYPES = ("float32", "bfloat16")

Loss = Callable[[Tensor, slice], Tensor]  # (logits of some rows of a batch, which rows) -> mean loss over them


@dataclass(frozen=True)
class Recipe:
    """What a protocol makes of its settings.

    `lr` gives the learning rate of an epoch counted from 0, `look` whether the test split is looked at after an epoch
    counted from 1 (after the last it always is). `prepare` makes of uint8 images (b, 3, s, s) and labels (b,) on the
    device the net's input and the loss of its output; all that is random in it comes from the generator, on the CPU.
    """

    epochs: int
    batch_size: int
    lr: Callable[[int], float]
    look: Callable[[int], bool]
    prepare: Callable[[Tensor, Tensor, Generator], tuple[Tensor, Loss]]
    dtype: str = "float32"


@dataclass(frozen=True)
class Result:
    """Accuracies are in percent of the test split; `curve` holds {epoch, loss, top1} of each look.

    Epochs count from 1, and `best_epoch` is the first that reached `top1_best`. The curve's loss is the mean over
    the epoch's mixed batches. `per_class` is after the last epoch, None for a class that the test split lacks.
    `protocol` is the whole protocol as it was run, JSON-ready; `seconds` are of wall time, those before a resumption
    included.
    """

    top1_best: float
    top1_last: float
    best_epoch: int
    epochs: int
    curve: list[dict[str, float]]
    per_class: list[float | None]
    train_images: int
    seconds: float
    protocol: dict[str, Any]


class Training:
    """A net on its way through a recipe. What the next epoch depends on can be saved (`state`) and taken up again.

    `micro_batch_size` images go through the net at once, all of a batch when None; the gradients of the parts are
    summed. Where memory runs out it is halved. Batch norm takes its statistics over what goes through at once, so
    batches of nets with it are never split.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        *,
        seed: int,
        device: str | torch.device,
        micro_batch_size: int | None = None,
    ):
        if recipe.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {recipe.dtype!r}: known are {', '.join(DTYPES)}")
        self.net = net
        self.epoch = 0
        self.epochs = recipe.epochs
        self.curve: list[dict[str, float]] = []
        self.micro_batch_size = micro_batch_size or recipe.batch_size
        self._optimizer = optimizer
        self._recipe = recipe
        self._seed = seed
        self._device = torch.device(device)
        self._generator = Generator().manual_seed(seed)
        self._loss = torch.zeros(())
        self._seconds = 0.0
        self._began = time.perf_counter()
        self._indivisible = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
        if self._indivisible and self.micro_batch_size < recipe.batch_size:
            raise ValueError(
                f"{self.micro_batch_size} images at once of a batch of {recipe.batch_size}: this net has batch norm, "
                f"whose statistics are those of the whole batch; leave the micro-batch size out"
            )

    def fit(
        self,
        images: Tensor,
        labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
        *,
        num_classes: int,
        after_epoch: Callable[["Training"], None],
        protocol: dict[str, Any],
    ) -> Result:
        """Train to the end on sets from `place`, calling `after_epoch` after each epoch but the last; it may raise.

        Raises:
            FloatingPointError: the training diverges.
            RuntimeError: the net does not fit in the memory left.
        """
        correct = None
        with _reproducible(self._device):
            while self.epoch < self.epochs:
                self._run_epoch(images, labels)
                correct = None
                if self._recipe.look(self.epoch) or self.epoch == self.epochs:
                    correct = correctly_classified(self.net, test_images, test_labels, self._recipe.dtype)
                    top1 = 100 * correct.double().mean().item()
                    self.curve.append({"epoch": self.epoch, "loss": self._finite_loss(), "top1": top1})
                if self.epoch < self.epochs:
                    after_epoch(self)
        assert correct is not None
        best = max(self.curve, key=lambda point: point["top1"])
        return Result(
            top1_best=best["top1"],
            top1_last=self.curve[-1]["top1"],
            best_epoch=int(best["epoch"]),
            epochs=self.epochs,
            curve=self.curve,
            per_class=_per_class(correct, test_labels, num_classes),
            train_images=len(images),
            seconds=self._elapsed(),
            protocol=protocol,
        )

    def state(self) -> bytes:
        """Everything that the next epoch depends on, as safetensors.

        Raises:
            FloatingPointError: the training has diverged.
        """
        self._finite_loss()
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for number, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
        tensors["generator"] = self._generator.get_state()
        progress = {"epoch": self.epoch, "curve": self.curve, "seconds": self._elapsed()}
        tensors["progress"] = torch.frombuffer(bytearray(json.dumps(progress).encode()), dtype=torch.uint8)
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def resume(self, state: bytes) -> None:
        """Go on from a `state` of a training with the same arguments."""
        tensors = load(state)
        progress = json.loads(tensors.pop("progress").numpy().tobytes())
        self.epoch, self.curve, self._seconds = progress["epoch"], progress["curve"], progress["seconds"]
        self._generator.set_state(tensors.pop("generator"))
        self.net.load_state_dict(_below("net.", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})

    def _run_epoch(self, images: Tensor, labels: Tensor) -> None:
        seed_dropout(self._seed, self.epoch, self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.lr(self.epoch)
        self.net.train()
        total = torch.zeros((), device=self._device)
        for batch in torch.randperm(len(images), generator=self._generator).split(self._recipe.batch_size):
            chosen = images[batch.to(images.device)].to(self._device)
            pixels, loss_of = self._recipe.prepare(chosen, labels[batch.to(self._device)], self._generator)
            total += self._backward(pixels, loss_of) * len(batch)
            self._optimizer.step()
        self._loss = total / len(images)
        self.epoch += 1

    def _backward(self, pixels: Tensor, loss_of: Loss) -> Tensor:
        """Gradients of a batch's mean loss, in as few parts as fit. Returns the loss, on the device."""
        while True:
            try:
                return self._gradients(pixels, loss_of)
            except torch.OutOfMemoryError as error:
                self.micro_batch_size = self._smaller(min(self.micro_batch_size, len(pixels)), pixels, error)
            if self._device.type == "cuda":  # what the attempt held is free only here, outside the except clause
                torch.cuda.empty_cache()

    def _gradients(self, pixels: Tensor, loss_of: Loss) -> Tensor:
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._device)
        for start in range(0, len(pixels), self.micro_batch_size):
            part = slice(start, min(start + self.micro_batch_size, len(pixels)))
            loss = loss_of(logits(self.net, pixels[part], self._recipe.dtype), part)
            loss = loss * ((part.stop - part.start) / len(pixels))
            loss.backward()
            total += loss.detach()
        return total

    def _smaller(self, at_once: int, pixels: Tensor, error: Exception) -> int:
        """Half of what did not fit, where that changes nothing but the speed."""
        if at_once > 1 and not self._indivisible:
            return at_once // 2
        reason = "that is the least there is"
        if self._indivisible:
            reason = "batch norm takes its statistics over the whole batch, so that parts would give another result"
        raise RuntimeError(
            f"{at_once} of {len(pixels)} images of {pixels.shape[-1]} px do not fit in the memory left on "
            f"{self._device}{_memory(self._device)}, and {reason}: give each worker more of a GPU "
            f"(engine.stages.evaluate.gpus_per_worker), or set a smaller evaluate.batch_size, which is another protocol"
        ) from error

    def _finite_loss(self) -> float:
        loss = self._loss.item()
        if not math.isfinite(loss):
            lr = self._recipe.lr(self.epoch - 1)
            raise FloatingPointError(f"the loss is {loss} at epoch {self.epoch}: lower lr (now {lr:g})")
        return loss

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._began


def place(images: Tensor, device: str | torch.device, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """`transform` of uint8 images (n, 3, h, w), a part at a time on the device, and there to stay if they are few.

    A set that would take more than `DEVICE_SHARE` of the memory free on the device stays with the host.
    """
    parts, home = [], None
    for part in images.split(PLACED_AT_ONCE):
        moved = transform(part.to(device))
        if home is None:
            needed = moved[0].numel() * len(images)
            home = device if needed <= DEVICE_SHARE * _free(torch.device(device)) else "cpu"
        parts.append(moved.to(home))
    return torch.cat(parts)


def check_set(images: Tensor, labels: Tensor, num_classes: int, what: str) -> None:
    """Refuse images and labels that do not go together with a ValueError that says how they should be."""
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


def logits(net: nn.Module, pixels: Tensor, dtype: str) -> Tensor:
    """fp32 (b, classes) of our nets and of transformers'. `dtype` "bfloat16" is autocast."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        output = net(pixels)
    return (output if isinstance(output, Tensor) else output.logits).float()


@torch.no_grad()
def predict(net: nn.Module, pixels: Tensor, dtype: str) -> Tensor:
    """As `logits`, of a net in evaluation mode, without gradients and in halves where memory runs out."""
    try:
        return logits(net, pixels, dtype)
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
    if pixels.is_cuda:
        torch.cuda.empty_cache()
    return torch.cat([predict(net, half, dtype) for half in pixels.chunk(2)])


def correctly_classified(net: nn.Module, images: Tensor, labels: Tensor, dtype: str = "float32") -> Tensor:
    """Whether the largest logit is the label's: bool (n,). `images` as from `place`, `labels` on the net's device."""
    net.eval()
    parts = images.split(LOOKED_AT_ONCE[labels.device.type])
    predicted = [predict(net, normalize(part.to(labels.device).float() / 255), dtype).argmax(1) for part in parts]
    return torch.cat(predicted) == labels


def seeds(seed: int) -> tuple[int, int]:
    """A seed for the net's first weights and one for everything drawn in its training."""
    net, draws = np.random.SeedSequence(seed).generate_state(2).tolist()
    return net, draws


def seed_dropout(seed: int, epoch: int, device: torch.device) -> None:
    """Dropout knows no generator but the global one of its device: it starts each epoch from (seed, epoch)."""
    state = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    if device.type == "cuda":
        torch.cuda.manual_seed(state)
    else:
        torch.default_generator.manual_seed(state)  # torch.manual_seed would reseed CUDA's generators as well


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic convolutions; the global generators are given back as they were."""
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        yield


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _free(device: torch.device) -> float:
    """Bytes of a GPU that can be had; a CPU's sets are where they are already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"


def _per_class(correct: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    count = torch.bincount(labels, minlength=num_classes).tolist()
    right = torch.bincount(labels[correct], minlength=num_classes).tolist()
    return [100 * r / n if n else None for r, n in zip(right, count, strict=True)]
