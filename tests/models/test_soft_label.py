"""The soft-label protocol against its definition: tables, schedule, loss, decay, transforms."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlcp_dist.models import soft_label, standard
from vlcp_dist.models.soft_label import Protocol
from vlcp_dist.models.training import seed_dropout, seeds
from vlcp_dist.ops import augment

CLASSES = ["a", "b", "c", "d"]
SMALL = Protocol(net="mobilenet-v2", image_size=32, epochs=2, batch_size=4)


def opinionated(seed: int) -> nn.Module:
    """A net whose batch norm knows the data, and which tells images apart, as a trained one does."""
    net = standard.build("mobilenet-v2", class_ids=CLASSES, seed=seed)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net(augment.normalize(pictures(16)[0] / 255))
        net.classifier.weight *= 100
    return net.eval()


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return opinionated(5)


def pictures(count: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 4


def run(teacher: nn.Module, protocol: Protocol = SMALL, **changes):
    (images, labels), (test_images, test_labels) = pictures(8), pictures(12)
    data = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    common = {"teacher": teacher, "class_ids": CLASSES, "ipc": 2, "protocol": protocol, "seed": 0, "device": "cpu"}
    return soft_label.train(**{**data, **common, **changes})


@pytest.mark.parametrize(
    ("ipc", "classes", "batch"),
    [
        *[(1, 10, 10), (10, 10, 50), (50, 10, 100), (1, 100, 20), (10, 100, 100), (50, 100, 200)],
        *[(10, 1000, 100), (50, 1000, 200), (20, 10, 100), (4, 10, 40), (1, 4, 4)],
    ],
)
def test_published_batches(ipc, classes, batch):
    assert soft_label.published_batch(ipc, classes) == batch


def test_published_values_fill_what_is_left_open():
    imagenet = soft_label.resolve(Protocol(), num_classes=1000, ipc=50)
    assert (imagenet.epochs, imagenet.batch_size, imagenet.lr, imagenet.weight_decay) == (300, 200, 1e-3, 0.01)
    assert (imagenet.temperature, imagenet.factor) == (20.0, 2)
    cifar = soft_label.resolve(Protocol(net="resnet18-cifar", image_size=32), num_classes=10, ipc=10)
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.factor) == (300, 50, 1e-3, 1)
    assert soft_label.resolve(Protocol(net="efficientnet-b0"), num_classes=10, ipc=1).lr == 2e-3
    assert soft_label.resolve(Protocol(net="mobilenet-v2"), num_classes=10, ipc=1).lr == 2.5e-3
    own = Protocol(epochs=7, batch_size=3, lr=0.2, weight_decay=0.0, factor=4)
    assert soft_label.resolve(own, num_classes=1000, ipc=10) == own


def test_the_rate_ends_at_half_its_start_and_the_last_fifth_is_looked_at(teacher):
    recipe = soft_label.make_recipe(soft_label.resolve(Protocol(), num_classes=10, ipc=10), teacher)
    assert recipe.lr(0) == 1e-3
    assert recipe.lr(150) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 4)) / 2)
    assert recipe.lr(299) == pytest.approx(0.5e-3, rel=0.01)
    assert [epoch for epoch in range(1, 301) if recipe.look(epoch)] == [250, 260, 270, 280, 290, 300]


def test_a_batch_is_shuffled_cropped_flipped_and_mixed_and_the_teacher_labels_what_comes_of_it(teacher):
    protocol = soft_label.resolve(replace(SMALL, factor=2), num_classes=4, ipc=2)
    images, labels = pictures(8)
    pixels, loss = soft_label.make_recipe(protocol, teacher).prepare(images, labels, torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    shuffled = augment.shuffle_patches(images, 2, generator=generator)
    crops = augment.draw_crops(8, 32, 32, scale=(0.5, 1.0), generator=generator)
    flips = torch.rand(8, generator=generator) < 0.5
    plain = augment.normalize(augment.crop_and_flip(shuffled / 255, crops, flips))
    mixed, (_, _, share) = augment.cutmix(plain, labels, probability=1.0, generator=generator)
    assert share < 1 and flips.any() and not torch.equal(shuffled, images)
    torch.testing.assert_close(pixels, mixed)

    logits = torch.randn(8, 4, generator=generator)
    with torch.no_grad():
        p = (teacher(mixed).logits / 20).softmax(1)
    want = (p * (p.log() - (logits / 20).log_softmax(1))).sum(1).mean()  # batchmean, no factor of T^2
    torch.testing.assert_close(loss(logits, slice(0, 8)), want)
    torch.testing.assert_close(
        loss(logits[:3], slice(0, 3)), F.kl_div((logits[:3] / 20).log_softmax(1), p[:3], reduction="batchmean")
    )


def test_training_follows_a_plain_loop(teacher):
    """AdamW on the recipe's own batches; biases and norms are not decayed."""
    protocol = replace(SMALL, epochs=3, batch_size=8, weight_decay=0.5)
    result, trained = run(teacher, protocol)
    recipe = soft_label.make_recipe(soft_label.resolve(protocol, num_classes=4, ipc=2), teacher)
    net_seed, draw_seed = seeds(0)
    net = standard.build("mobilenet-v2", class_ids=CLASSES, seed=net_seed).train()
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in net.parameters()}
    generator = torch.Generator().manual_seed(draw_seed)
    images, labels = pictures(8)
    with torch.random.fork_rng():
        for epoch in range(3):
            seed_dropout(draw_seed, epoch, torch.device("cpu"))
            order = torch.randperm(8, generator=generator)
            pixels, loss_of = recipe.prepare(images[order], labels[order], generator)
            loss = loss_of(net(pixels).logits, slice(0, 8))
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            rate = 0.0025 * (1 + math.cos(math.pi * epoch / 6)) / 2
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    m, v = moments[p]
                    m.lerp_(g, 0.1)
                    v.lerp_(g * g, 0.001)
                    p.mul_(1 - rate * (0.5 if p.ndim > 1 else 0.0))
                    step = epoch + 1
                    p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    assert result.curve[-1]["loss"] == pytest.approx(loss.item(), rel=0.02)
    start = standard.build("mobilenet-v2", class_ids=CLASSES, seed=net_seed)
    begin, got, want = (nn.utils.parameters_to_vector(n.parameters()) for n in (start, trained, net))
    assert (got - want).norm() < 0.1 * (want - begin).norm()  # first steps of Adam enlarge what rounding leaves of 0


def test_only_weights_of_more_than_one_dimension_decay():
    net = standard.build("mobilenet-v2", class_ids=CLASSES, seed=0)
    decayed, others = soft_label._groups(net, 0.01)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"convolution", "classifier"}
    assert {names[id(p)].split(".")[-2] for p in others["params"]} == {"normalization", "classifier"}
    assert len(decayed["params"]) == 53 and len(others["params"]) == 105  # 52 convolutions and the head; 52 norms twice


def test_the_student_follows_the_teacher_and_not_the_labels(teacher):
    _, labels = pictures(8)
    first, net = run(teacher)
    second, other = run(teacher, labels=(labels + 1) % 4)
    assert first.curve == second.curve
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert run(opinionated(6))[0].curve[-1]["loss"] != pytest.approx(first.curve[-1]["loss"], rel=1e-3)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_the_whole_protocol_is_told(teacher):
    result, _ = run(teacher)
    settings = soft_label.resolve(SMALL, num_classes=4, ipc=2)
    assert asdict(settings).items() <= result.protocol.items()
    assert json.loads(json.dumps(result.protocol)) == result.protocol
    told = soft_label.describe(soft_label.resolve(Protocol(), num_classes=1000, ipc=50))
    assert "shuffle of 2x2 patches, random resized crop (0.5, 1)" in told["train_transform"]
    assert told["test_transform"] == "shorter side to 256, centre crop 224, ImageNet statistics"
    assert "pi epoch / 600" in told["schedule"] and "temperature 20" in told["loss"]


def test_test_images_are_resized_to_eight_sevenths_and_cropped():
    assert (soft_label.test_size(224), soft_label.test_size(32), soft_label.test_size(64)) == (256, 32, 72)
    images, _ = pictures(3, 90)
    placed = soft_label.place_test(images, 56, "cpu")
    want = augment.resize_and_crop(images, 64)[..., 4:60, 4:60]
    assert torch.equal(placed, want)
    assert torch.equal(soft_label.place_test(augment.resize_and_crop(images, 64), 56, "cpu"), want)


def test_a_teacher_is_trained_on_the_labels():
    images, labels = pictures(16)
    images[:, 0] = (labels * 60).to(torch.uint8)[:, None, None]
    recipe = soft_label.TeacherRecipe(net="mobilenet-v2", image_size=32, epochs=12, batch_size=16, lr=0.02)
    result, net = soft_label.train_teacher(
        images, labels, images, labels, class_ids=CLASSES, recipe=recipe, seed=0, device="cpu"
    )
    assert result.curve[-1]["loss"] < 0.5 * math.log(4)
    assert [net.config.id2label[i] for i in range(4)] == CLASSES and not net.training
    assert result.protocol["net"] == "mobilenet-v2" and result.protocol["lr"] == 0.02


def test_data_that_do_not_fit_are_refused(teacher):
    with pytest.raises(ValueError, match="the training labels run from 0 to 7: 4 classes need 0 to 3"):
        run(teacher, labels=torch.arange(8))
    with pytest.raises(ValueError, match="unknown dtype 'float16'"):
        run(teacher, replace(SMALL, dtype="float16"))
