"""The standard nets of the soft-label protocol, from transformers, made here without the hub.

They are torchvision's nets to the last parameter (RDED trains torchvision's). The numbers of parameters are the same in
both libraries; what differs is set here: in the configuration (MobileNet-V2 without TensorFlow's padding,
dropout 0.2, eps 1e-5; EfficientNet-B0 at width and depth 1, symmetric padding, eps 1e-5), where it has no key in
`from_config` (batch-norm momentum of MobileNet-V2, the stem's padding and the dropped branches of EfficientNet, the
stem of the CIFAR variant), and the first weights (transformers starts EfficientNet's batch norms near 0).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("resnet18", "resnet18-cifar", "resnet50", "efficientnet-b0", "mobilenet-v2")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def build(name: str, *, class_ids: Sequence[str], seed: int) -> nn.Module:
    """A freshly initialised net on the CPU: normalised images (b, 3, s, s) -> an output with `logits` (b, classes).

    `class_ids` are the ids (wnids) of the classes in the order of the labels; they become `id2label`. The weights
    start as torchvision's do and depend on the arguments alone; the global RNG is left as it was.

    Raises ValueError for a name not in `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"unknown net {name!r}: the standard nets are {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = from_config(_config(name, class_ids))
        _initialise(model)
    return model


def from_config(config: Any) -> Any:
    """The net of a transformers configuration, with what `_config` asks for beyond transformers' own keys."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_config(config)
    if getattr(config, "stem", None) == "3x3":
        stem = model.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(3, config.embedding_size, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()
    if getattr(config, "layout", None) == "torchvision":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        if config.model_type == "efficientnet":
            model.efficientnet.embeddings.padding = nn.ZeroPad2d(1)
            model.efficientnet.pooler = nn.AdaptiveAvgPool2d(1)
            for block in model.efficientnet.encoder.blocks:
                block.projection.dropout = DropBranch(block.projection.dropout.p)
    return model


class DropBranch(nn.Module):
    """Stochastic depth: in training, the residual branch of whole images is dropped (Huang et al. 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.p
        return x * kept / (1 - self.p)


def files(model: Any) -> dict[str, bytes]:
    """The net as a checkpoint in transformers' layout: file name -> content."""
    from safetensors.torch import save

    model.config.architectures = [type(model).__name__]
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    return {CONFIG: model.config.to_json_string().encode(), WEIGHTS: save(weights, {"format": "pt"})}


def load(folder: Path) -> Any:
    """The net of a checkpoint in transformers' layout, on the CPU and in evaluation mode.

    Raises FileNotFoundError without `config.json` or `model.safetensors`, ValueError where the weights are not the
    configuration's.
    """
    from safetensors.torch import load_file

    model = from_config(_read_config(folder))
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: save the net with save_pretrained (safetensors)")
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights are not those of its {CONFIG}: {error}") from error
    return model.eval()


def class_ids(folder: Path) -> list[str]:
    """What a checkpoint calls its outputs (`id2label`), in their order.

    Raises as `load`.
    """
    labels: Mapping[int, str] = _read_config(folder).id2label
    return [labels[i] for i in sorted(labels)]


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: a teacher is a folder that save_pretrained wrote")
    return AutoConfig.from_pretrained(folder)


def _config(name: str, class_ids: Sequence[str]) -> Any:
    from transformers import EfficientNetConfig, MobileNetV2Config, ResNetConfig

    labels: dict[str, Any] = {
        "id2label": dict(enumerate(class_ids)),
        "label2id": {class_id: label for label, class_id in enumerate(class_ids)},
        "layout": "torchvision",
    }
    if name == "resnet50":
        return ResNetConfig(layer_type="bottleneck", depths=[3, 4, 6, 3], **labels)
    if name.startswith("resnet18"):
        widths = [64, 128, 256, 512]
        if name == "resnet18-cifar":
            labels["stem"] = "3x3"
        return ResNetConfig(layer_type="basic", hidden_sizes=widths, depths=[2, 2, 2, 2], **labels)
    if name == "mobilenet-v2":
        return MobileNetV2Config(tf_padding=False, classifier_dropout_prob=0.2, layer_norm_eps=1e-5, **labels)
    return EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        dropout_rate=0.2,
        batch_norm_eps=1e-5,
        batch_norm_momentum=0.1,
        depthwise_padding=list(range(16)),
        **labels,
    )


def _initialise(model: Any) -> None:
    """As torchvision: He-normal (fan-out) convolutions, batch norm at the identity, and each family's own head."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if model.config.model_type == "resnet":
                module.reset_parameters()
                continue
            nn.init.zeros_(module.bias)
            if model.config.model_type == "efficientnet":
                bound = 1 / math.sqrt(module.out_features)
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.normal_(module.weight, 0.0, 0.01)
