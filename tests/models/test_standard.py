"""The standard nets are torchvision's: parameters, shapes, statistics and first weights, against their definitions."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlcp_dist.models import standard

WNIDS = [f"n{i:08d}" for i in range(1000)]
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet18-cifar": 11_689_512 - 64 * 3 * (7 * 7 - 3 * 3),
    "resnet50": 25_557_032,
    "efficientnet-b0": 5_288_548,
    "mobilenet-v2": 3_504_872,
}


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    """With their real sizes, without memory or arithmetic."""
    with torch.device("meta"):
        return {name: standard.from_config(standard._config(name, WNIDS)) for name in standard.NAMES}


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    """With few classes and real weights."""
    return {
        name: standard.build(name, class_ids=["b", "a", "c"], seed=0) for name in standard.NAMES if "50" not in name
    }


def sides(net: nn.Module, size: int) -> list[int]:
    """Heights of all 4-dimensional outputs of convolutions, in the order in which they run."""
    found: list[int] = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: found.append(y.shape[-1]))
        for m in net.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert net.eval()(torch.randn(1, 3, size, size, device="meta")).logits.shape == (1, 1000)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", standard.NAMES)
def test_parameters_norms_and_labels(nets, name):
    net = nets[name]
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    assert [net.config.id2label[i] for i in range(1000)] == WNIDS


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("resnet18", 112, 7), ("resnet50", 112, 7), ("efficientnet-b0", 112, 7), ("mobilenet-v2", 112, 7)],
)
def test_an_image_of_224_px_ends_as_7x7(nets, name, first, last):
    found = sides(nets[name], 224)
    assert found[0] == first and found[-1] == last


def test_the_cifar_variant_keeps_32_px_and_ends_as_4x4(nets):
    found = sides(nets["resnet18-cifar"], 32)
    assert found[0] == found[4] == 32 and found[-1] == 4
    stem = nets["resnet18-cifar"].resnet.embedder
    assert stem.embedder.convolution.kernel_size == (3, 3) and isinstance(stem.pooler, nn.Identity)


@pytest.mark.parametrize("name", ["efficientnet-b0", "mobilenet-v2"])
def test_every_stride_pads_both_sides_alike(name):
    """With kernels that are their own mirror images, a mirrored image gives the same: not so with TensorFlow's padding.

    Of an image of 65 px, where symmetric padding leaves both borders the same.
    """
    net = standard.build(name, class_ids=["a", "b"], seed=0)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data = (conv.weight.data + conv.weight.data.flip(-1)) / 2
    net.dropout.p = 0.0
    for branch in (m for m in net.modules() if isinstance(m, standard.DropBranch)):
        branch.p = 0.0
    image = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # with the batch's own statistics: those of a new net let hardly anything through
        torch.testing.assert_close(net(image.flip(-1)).logits, net(image).logits, atol=1e-4, rtol=1e-3)


def test_dropout_is_torchvisions(nets):
    assert nets["mobilenet-v2"].dropout.p == nets["efficientnet-b0"].dropout.p == 0.2
    rates = [m.p for m in nets["efficientnet-b0"].modules() if isinstance(m, standard.DropBranch)]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_dropped_branches_are_whole_images_and_the_mean_stays():
    branch = standard.DropBranch(0.25)
    x = torch.ones(4000, 2, 3, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = branch(x)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == out[:, :1, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(branch.eval()(x), x)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-b0", "mobilenet-v2"])
def test_first_weights(built, name):
    norms = [m for m in built[name].modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    for conv in (m for m in built[name].modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    head = next(m for m in built[name].modules() if isinstance(m, nn.Linear))
    std = {"mobilenet-v2": 0.01, "efficientnet-b0": 1 / math.sqrt(3 * head.out_features)}
    assert head.weight.std().item() == pytest.approx(std.get(name, 1 / math.sqrt(3 * head.in_features)), rel=0.05)


def test_weights_depend_on_the_seed_alone_and_the_global_rng_is_untouched():
    def weights(seed: int) -> torch.Tensor:
        net = standard.build("mobilenet-v2", class_ids=["a", "b"], seed=seed)
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(3), first) and not torch.equal(weights(4), first)


@pytest.mark.parametrize("name", ["resnet18-cifar", "efficientnet-b0", "mobilenet-v2"])
def test_a_checkpoint_is_the_net_again(built, tmp_path, name):
    net = built[name].eval()
    for file, content in standard.files(net).items():
        (tmp_path / file).write_bytes(content)
    again = standard.load(tmp_path)
    assert standard.class_ids(tmp_path) == ["b", "a", "c"]
    pixels = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, net(pixels).logits)
    assert not again.training
    if name == "mobilenet-v2":
        from transformers import AutoModelForImageClassification

        plain = AutoModelForImageClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(plain.eval()(pixels).logits, net(pixels).logits)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        standard.class_ids(tmp_path)
    files = standard.files(standard.build("mobilenet-v2", class_ids=["a", "b"], seed=0))
    (tmp_path / "config.json").write_bytes(files["config.json"])
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        standard.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(files["model.safetensors"])
    tensors = load_file(weights)
    tensors.pop("classifier.bias")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"not those of its config\.json"):
        standard.load(tmp_path)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet18-cifar, resnet50"):
        standard.build("resnet10", class_ids=["a"], seed=0)
