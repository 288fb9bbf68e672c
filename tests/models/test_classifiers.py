import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlcp_dist.models import classifiers


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def linear(net: nn.Module) -> nn.Linear:
    return next(m for m in net.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(("size", "inputs"), [(224, 1152), (256, 2048)])
def test_convnet6_is_the_published_one(size, inputs):
    net = classifiers.build("convnet6", num_classes=10, image_size=size, seed=0)
    assert linear(net).in_features == inputs
    first, later, norms = 3 * 9 * 128 + 128, 5 * (128 * 9 * 128 + 128), 6 * 2 * 128
    assert count(net) == first + later + norms + inputs * 10 + 10


@pytest.mark.parametrize("depth", [3, 4, 5, 6])
def test_convnet_depth_and_width(depth):
    net = classifiers.build(f"convnet{depth}", num_classes=7, image_size=64, width=16, seed=0)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convs] == [(3, 16)] + [(16, 16)] * (depth - 1)
    assert linear(net).in_features == 16 * (64 // 2**depth) ** 2
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_resnetap10_parameters_by_hand():
    net = classifiers.build("resnetap10", num_classes=10, image_size=224, seed=0)
    stem = 3 * 49 * 64 + 2 * 64
    first = 2 * 64 * 9 * 64 + 2 * 2 * 64
    later = sum(c // 2 * 9 * c + c * 9 * c + c // 2 * c + 3 * 2 * c for c in (128, 256, 512))
    assert count(net) == stem + first + later + 512 * 10 + 10 == 4_910_922


def test_resnet18_with_batch_norm_is_the_standard_one():
    net = classifiers.build("resnet18", num_classes=1000, image_size=224, norm="batch", seed=0)
    assert count(net) == 11_689_512
    assert count(classifiers.build("resnet18", num_classes=1000, image_size=224, seed=0)) == 11_689_512


@pytest.mark.parametrize("name", ["resnetap10", "resnet18"])
@pytest.mark.parametrize(("size", "after_stem"), [(32, 32), (64, 64), (96, 48), (128, 64), (224, 56)])
def test_resnet_stem_follows_the_image_size(name, size, after_stem):
    net = classifiers.build(name, num_classes=3, image_size=size, width=4, seed=0)
    sides: list[int] = []
    for module in net:
        if isinstance(module, classifiers.BasicBlock):
            module.register_forward_hook(lambda m, x, y: sides.extend([x[0].shape[-1], y.shape[-1]]))
    assert net(torch.randn(1, 3, size, size)).shape == (1, 3)
    assert sides[0] == after_stem
    assert sides[-1] == after_stem // 8


def test_resnetap_steps_by_average_pooling_only():
    net = classifiers.build("resnetap10", num_classes=3, image_size=224, seed=0)
    assert {m.stride for m in net.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    assert {type(m) for m in net.modules() if "Pool" in type(m).__name__} == {
        nn.AvgPool2d,
        nn.AdaptiveAvgPool2d,
    }


def test_pooled_block_follows_its_definition():
    torch.manual_seed(0)
    block = classifiers.BasicBlock(4, 8, 2, "instance", True)
    conv1, conv2 = (m.weight for m in block.residual if isinstance(m, nn.Conv2d))
    x = torch.randn(2, 4, 12, 12)
    hidden = F.avg_pool2d(F.relu(F.instance_norm(F.conv2d(x, conv1, padding=1))), 2)
    residual = F.instance_norm(F.conv2d(hidden, conv2, padding=1))
    shortcut = F.instance_norm(F.avg_pool2d(F.conv2d(x, block.shortcut[0].weight), 2))
    torch.testing.assert_close(block(x), F.relu(residual + shortcut), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", classifiers.NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    net = classifiers.build(name, num_classes=5, image_size=64, width=8, seed=0)
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(net(images)[2:3], net(images[2:3]), atol=1e-5, rtol=1e-4)


def test_resnet_starts_he_normal_and_convnet_from_the_default():
    resnet = classifiers.build("resnet18", num_classes=5, image_size=224, seed=0)
    for conv in (m for m in resnet.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    convnet = classifiers.build("convnet4", num_classes=5, image_size=32, seed=0)
    for conv in (m for m in convnet.modules() if isinstance(m, nn.Conv2d)):
        bound = 1 / math.sqrt(conv.in_channels * 9)
        assert bound * 0.99 < conv.weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["convnet3", "resnetap10"])
def test_weights_depend_on_the_seed_alone_and_the_global_rng_is_untouched(name):
    def weights(seed: int) -> torch.Tensor:
        net = classifiers.build(name, num_classes=5, image_size=32, width=8, seed=seed)
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


@pytest.mark.parametrize("name", ["resnet", "convnet", "convnet7", "resnet10"])
def test_unknown_names_are_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"convnet6, resnetap10, resnet18 \(the depth"):
        classifiers.build(name, num_classes=5, image_size=64, seed=0)


def test_bad_norm_and_too_small_image():
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        classifiers.build("convnet3", num_classes=5, image_size=64, norm="layer", seed=0)
    with pytest.raises(ValueError, match="32 px is too small"):
        classifiers.build("convnet6", num_classes=5, image_size=32, seed=0)
