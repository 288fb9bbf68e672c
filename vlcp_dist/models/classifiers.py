"""The nets that the hard-label protocol trains from scratch (IDC, Kim et al. 2022; Minimax, Gu et al. 2024).

Instance norm is GroupNorm with one channel per group. Convolutions of ResNets start He-normal (fan-out), those
of ConvNets from PyTorch's default, as in the protocol's public nets: instance norm hides the scale of a weight
from the output, but not from SGD, whose effective step depends on it.
"""

import torch
from torch import Tensor, nn

NAMES = ("convnet3", "convnet4", "convnet5", "convnet6", "resnetap10", "resnet18")


def build(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    width: int | None = None,
    norm: str = "instance",
    seed: int,
) -> nn.Module:
    """A freshly initialised classifier on the CPU: normalised images (b, 3, s, s) -> logits (b, num_classes).

    s is `image_size`. `width` is the number of channels of every ConvNet layer (default 128) or of a ResNet's first
    stage (default 64); `norm` is "instance" or "batch". The weights depend on the arguments alone, and the global
    RNG is left as it was.

    Raises ValueError for a name not in `NAMES`, an unknown norm, or an image too small for the net.
    """
    if name not in NAMES:
        raise ValueError(f"unknown net {name!r}: known are {', '.join(NAMES)} (the depth is part of the name)")
    if norm not in ("instance", "batch"):
        raise ValueError(f"unknown norm {norm!r}: known are instance, batch")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA's generators as well
        if name.startswith("convnet"):
            depth = int(name.removeprefix("convnet"))
            return _convnet(depth, 128 if width is None else width, norm, num_classes, image_size)
        return _resnet(name, 64 if width is None else width, norm, num_classes, image_size)


def _norm(channels: int, norm: str) -> nn.Module:
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.BatchNorm2d(channels)


def _convnet(depth: int, width: int, norm: str, num_classes: int, image_size: int) -> nn.Module:
    side = image_size // 2**depth
    if side == 0:
        raise ValueError(f"convnet{depth} halves its input {depth} times: {image_size} px is too small")
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Conv2d(width if i else 3, width, 3, padding=1),
            _norm(width, norm),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, num_classes))


def _resnet(name: str, width: int, norm: str, num_classes: int, image_size: int) -> nn.Module:
    blocks, pooled = ((1, 1, 1, 1), True) if name == "resnetap10" else ((2, 2, 2, 2), False)
    layers = _stem(pooled, width, norm, image_size)
    channels = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            stride = 2 if stage and not i else 1
            layers.append(BasicBlock(channels, width * 2**stage, stride, norm, pooled))
            channels = width * 2**stage
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _stem(pooled: bool, width: int, norm: str, image_size: int) -> list[nn.Module]:
    """Full downsampling (4x) above 128 px, 2x for 65 to 128 px, none up to 64 px."""
    if image_size > 128:
        conv = nn.Conv2d(3, width, 7, stride=1 if pooled else 2, padding=3, bias=False)
    else:
        conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers = [conv, _norm(width, norm), nn.ReLU(inplace=True)]
    if image_size > 64:
        layers.append(nn.AvgPool2d(4 if image_size > 128 else 2) if pooled else nn.MaxPool2d(3, 2, padding=1))
    return layers


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. ResNetAP's (`pooled`) step 1 and then average-pool by the stride."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: str, pooled: bool) -> None:
        super().__init__()
        step = 1 if pooled else stride
        pool = [nn.AvgPool2d(stride)] if pooled and stride > 1 else []
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=step, padding=1, bias=False),
            _norm(channels, norm),
            nn.ReLU(inplace=True),
            *pool,
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels, norm),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride=step, bias=False)
            self.shortcut = nn.Sequential(conv, *pool, _norm(channels, norm))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))
