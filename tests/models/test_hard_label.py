import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from vlcp_dist.models import classifiers, hard_label
from vlcp_dist.models.hard_label import Protocol
from vlcp_dist.ops import augment

SMALL = Protocol(net="convnet3", image_size=16, width=8, epochs=12, lr=0.05, evaluations=4)
PLAIN = {"crop_scale": (1.0, 1.0), "flip": 0.0, "color_jitter": 0.0, "lighting": 0.0, "cutmix_probability": 0.0}


def stripes(count: int, seed: int, size: int = 16, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of four patterns that a small net tells apart: rows, columns, checks and plain."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    y, x = (torch.arange(size) // 2 % 2).view(1, size, 1), (torch.arange(size) // 2 % 2).view(1, 1, size)
    patterns = torch.cat([y + 0 * x, x + 0 * y, (x + y) % 2, 0 * (x + y)])
    noise = torch.randint(0, 80, (count, 3, size, size), generator=generator)
    return (patterns[labels][:, None] * 150 + noise).to(torch.uint8), labels


def run(protocol: Protocol = SMALL, *, seed: int = 0, **changes):
    images, labels = stripes(24, 0)
    test_images, test_labels = stripes(40, 1)
    data = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    others = {"num_classes": 4, "ipc": 6, "protocol": protocol, "seed": seed, "device": "cpu"}
    return hard_label.train(**{**data, **others, **changes})[0]


@pytest.mark.parametrize(
    ("ipc", "classes", "epochs"),
    [
        *[(1, 10, 3000), (2, 10, 2000), (10, 10, 2000), (11, 10, 1500), (50, 10, 1500), (200, 10, 1000)],
        *[(500, 10, 500), (501, 10, 300), (1, 100, 2000), (10, 100, 1300), (50, 100, 1000), (100, 100, 600)],
    ],
)
def test_published_epochs(ipc, classes, epochs):
    assert hard_label.published_epochs(ipc, classes) == epochs


def test_full_data_has_no_ipc_of_zero():
    with pytest.raises(ValueError, match="no published epochs for IPC 0"):
        run(replace(SMALL, epochs=None), ipc=0)
    assert run(replace(SMALL, epochs=1), ipc=0).epochs == 1


def test_published_values_fill_what_is_left_open():
    ten = hard_label.resolve(Protocol(), num_classes=10, ipc=10)
    assert (ten.epochs, ten.batch_size, ten.lr, ten.weight_decay) == (2000, 64, 0.01, 5e-4)
    many = hard_label.resolve(Protocol(), num_classes=1000, ipc=10)
    assert (many.batch_size, many.lr, many.weight_decay) == (128, 0.1, 1e-4)
    assert ten.cutmix_probability == 1.0
    assert hard_label.resolve(Protocol(image_size=32), num_classes=10, ipc=10).cutmix_probability == 0.5
    own = Protocol(epochs=7, batch_size=3, lr=0.2, weight_decay=0.0, cutmix_probability=0.7)
    assert hard_label.resolve(own, num_classes=1000, ipc=10) == own


def test_a_separable_set_is_learned_and_reported():
    result = run(replace(SMALL, epochs=60))
    assert result.top1_best == 100
    assert result.train_images == 24 and result.epochs == 60 and result.seconds > 0
    assert [point["epoch"] for point in result.curve] == [15, 30, 45, 60]
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]
    assert result.top1_last == result.curve[-1]["top1"] == pytest.approx(np.mean(result.per_class))
    first_best = next(point["epoch"] for point in result.curve if point["top1"] == 100)
    assert result.best_epoch == first_best
    settings = asdict(replace(SMALL, epochs=60, batch_size=64, weight_decay=5e-4, cutmix_probability=0.5))
    assert settings.items() <= result.protocol.items()
    assert (
        result.protocol["optimizer"] == "SGD"
        and "after epoch 40 and again after epoch 50" in result.protocol["schedule"]
    )
    assert json.loads(json.dumps(result.protocol)) == {**result.protocol, "crop_scale": [0.5, 1.0]}


def test_wrong_labels_teach_the_wrong_thing():
    """Training and test labels are really used: with the classes turned by one, nothing on the test split is right."""
    _, labels = stripes(24, 0)
    assert run(replace(SMALL, epochs=60), labels=(labels + 1) % 4).top1_last == 0


def test_result_depends_on_the_arguments_alone():
    before = torch.get_rng_state()
    first = run(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, other = run(seed=1), run(seed=2)
    assert replace(again, seconds=0.0) == replace(first, seconds=0.0)
    assert other.curve != first.curve


def test_cudnn_is_on_and_deterministic_while_training_only():
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic

    before, during = flags(), set()
    hook = register_module_forward_pre_hook(lambda *_: during.add(flags()))
    run()
    hook.remove()
    assert during == {(True, True)}
    assert flags() == before


def test_training_follows_a_plain_loop():
    """Without augmentation: SGD with momentum and decay on the whole set, the rate times 0.2 at 2/3 and 5/6."""
    protocol = replace(SMALL, epochs=12, evaluations=12, batch_size=24, weight_decay=0.01, **PLAIN)
    images, labels = stripes(24, 0)
    pixels = augment.normalize(images / 255)
    seed = int(np.random.SeedSequence(3).generate_state(2)[0])
    net = classifiers.build("convnet3", num_classes=4, image_size=16, width=8, seed=seed)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    losses = []
    for epoch in range(12):
        loss = F.cross_entropy(net(pixels), labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        rate = 0.05 * (1 if epoch < 8 else 0.2 if epoch < 10 else 0.04)
        with torch.no_grad():
            for p, g, v in zip(net.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(rate * v)
    result = run(protocol, seed=3)
    np.testing.assert_allclose([point["loss"] for point in result.curve], losses, rtol=2e-3)


def test_every_image_is_seen_once_an_epoch_in_batches():
    """With a rate of 0 the epoch's mean loss is that of the untrained net, the smaller last batch included."""
    protocol = replace(SMALL, lr=0.0, epochs=2, evaluations=2, batch_size=10, **PLAIN)
    whole = run(replace(protocol, batch_size=24)).curve
    np.testing.assert_allclose([p["loss"] for p in run(protocol).curve], [p["loss"] for p in whole], rtol=1e-4)


def test_loss_is_that_of_the_targets_mixed_by_pixels():
    images, labels = stripes(12, 0)
    net = classifiers.build("convnet3", num_classes=4, image_size=16, width=8, seed=0)
    settings = {name: getattr(SMALL, name) for name in ("crop_scale", "flip", "color_jitter", "lighting")}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        mixed, (own, pasted, share) = augment.cutmix(
            augment.augment(images, generator=generator, **settings), labels, probability=1.0, generator=generator
        )
        soft = share * F.one_hot(own, 4) + (1 - share) * F.one_hot(pasted, 4)
        want = -(soft * F.log_softmax(net(mixed), 1)).sum(1).mean()
        protocol = hard_label.resolve(replace(SMALL, cutmix_probability=1.0), num_classes=4, ipc=6)
        prepare = hard_label.make_recipe(protocol).prepare
        pixels, loss = prepare(images, labels, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss(net(pixels), slice(0, 12)), want)


@pytest.mark.parametrize(
    ("epochs", "evaluations", "seen"), [(10, 5, [2, 4, 6, 8, 10]), (7, 3, [2, 4, 6, 7]), (3, 100, [1, 2, 3])]
)
def test_evaluations_are_even_and_include_the_last_epoch(epochs, evaluations, seen):
    result = run(replace(SMALL, epochs=epochs, evaluations=evaluations))
    assert [point["epoch"] for point in result.curve] == seen


def test_other_sizes_are_resized_once():
    images, labels = stripes(24, 0, size=24)
    test_images, test_labels = stripes(300, 1, size=24)  # more than one evaluation batch
    test = {"test_labels": test_labels, "labels": labels}
    resized = {
        "images": augment.resize_and_crop(images, 16),
        "test_images": augment.resize_and_crop(test_images, 16),
    }
    direct = run(images=images, test_images=test_images, **test)
    assert direct.curve == run(**resized, **test).curve


def test_a_class_missing_from_the_test_split_has_no_accuracy():
    test_images, test_labels = stripes(40, 1)
    kept = test_labels != 2
    result = run(test_images=test_images[kept], test_labels=test_labels[kept])
    assert [accuracy is None for accuracy in result.per_class] == [False, False, True, False]


def test_bfloat16_learns_too():
    assert run(replace(SMALL, epochs=60, dtype="bfloat16")).top1_best > 90


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match=r"at epoch .*lower lr"):
        run(replace(SMALL, lr=1e30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(24, 3, 16, 16)}, "the training images must be uint8"),
        ({"images": torch.zeros(24, 16, 16, 3, dtype=torch.uint8)}, "the training images must be uint8 of shape"),
        ({"test_images": torch.zeros(0, 3, 16, 16, dtype=torch.uint8)}, r"the test images .* n > 0"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, r"the training labels must be int64 of shape \(24,\)"),
        ({"test_labels": torch.full((40,), 4)}, "the test labels run from 4 to 4: 4 classes need 0 to 3"),
        ({"protocol": replace(SMALL, dtype="float16")}, "unknown dtype 'float16'"),
    ],
)
def test_data_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
