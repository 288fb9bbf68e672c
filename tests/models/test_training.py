"""The loop of both protocols: parts of batches, running out of memory, being stopped and resumed."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from vlcp_dist.models import classifiers, hard_label, soft_label, standard, training

CLASSES = ["a", "b", "c", "d"]
HARD = hard_label.Protocol(net="convnet3", image_size=16, width=8, epochs=6, lr=0.05, batch_size=10, evaluations=3)
SOFT = soft_label.Protocol(net="mobilenet-v2", image_size=32, epochs=3, batch_size=6)


def patterns(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 4


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return standard.build("mobilenet-v2", class_ids=CLASSES, seed=9)


def hard(protocol=HARD, **more):
    data = *patterns(26, protocol.image_size), *patterns(8, protocol.image_size)
    return hard_label.train(*data, num_classes=4, ipc=6, protocol=protocol, seed=1, device="cpu", **more)


def soft(teacher, protocol=SOFT, **more):
    data = *patterns(12, 32), *patterns(8, 32)
    common = {"class_ids": CLASSES, "ipc": 3, "seed": 1, "device": "cpu"}
    return soft_label.train(*data, teacher=teacher, protocol=protocol, **common, **more)


def teach(_, **more):
    data = *patterns(12, 32), *patterns(8, 32)
    recipe = soft_label.TeacherRecipe(net="mobilenet-v2", image_size=32, epochs=3, batch_size=6)
    return soft_label.train_teacher(*data, class_ids=CLASSES, recipe=recipe, seed=1, device="cpu", **more)


def same(first, second) -> None:
    (result, net), (other, other_net) = first, second
    assert replace(result, seconds=0.0) == replace(other, seconds=0.0)
    for (name, a), b in zip(net.state_dict().items(), other_net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("train", [lambda _, **more: hard(**more), soft, teach], ids=["hard", "soft", "teacher"])
def test_a_training_resumed_at_any_epoch_ends_the_same(teacher, train):
    states = []
    whole = train(teacher, after_epoch=lambda t: states.append(t.state()))
    assert len(states) == whole[0].epochs - 1
    for done, state in list(enumerate(states, 1))[:: max(1, len(states) - 1)]:
        epochs = []
        same(train(teacher, resume=state, after_epoch=lambda t, seen=epochs: seen.append(t.epoch)), whole)
        assert epochs == list(range(done + 1, whole[0].epochs))


def test_the_global_rng_is_given_back_although_dropout_uses_it(teacher):
    before = torch.get_rng_state()
    first = soft(teacher)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    same(soft(teacher), first)


@pytest.mark.parametrize("net", ["convnet3", "resnetap10", "resnet18"])
def test_parts_of_a_batch_give_the_same_net(net):
    """Every norm is of one image, so that only the order of sums differs."""
    protocol = replace(HARD, net=net, image_size=32, width=4, epochs=2, batch_size=16, lr=0.01)
    result, whole = hard(protocol)
    parts_result, parts = hard(protocol, micro_batch_size=5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    losses = [[point["loss"] for point in r.curve] for r in (result, parts_result)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def too_large(most: int, of: type[nn.Module]):
    """Nets of a type run out of memory with more than `most` images at once."""

    def refuse(module, arguments):
        if isinstance(module, of) and len(arguments[0]) > most:
            raise torch.OutOfMemoryError(f"{len(arguments[0])} images")

    return register_module_forward_pre_hook(refuse)


def test_what_does_not_fit_goes_through_in_halves():
    sizes = []
    hook = too_large(3, nn.Sequential)
    try:
        result, _ = hard(after_epoch=lambda t: sizes.append(t.micro_batch_size))
    finally:
        hook.remove()
    assert set(sizes) == {2}  # 10, 5, 2
    expected, _ = hard(micro_batch_size=2)
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)


def test_batch_norm_cannot_be_split_and_the_error_has_the_numbers(teacher):
    hook = too_large(4, type(teacher))
    try:
        with pytest.raises(
            RuntimeError, match=r"6 of 6 images of 32 px do not fit .* batch norm takes .*gpus_per_worker"
        ):
            soft(teacher)
        with pytest.raises(RuntimeError, match=r"1 of 10 images of 16 px do not fit .* the least there is"):
            hook.remove()
            hook = too_large(0, nn.Conv2d)
            hard()
    finally:
        hook.remove()
    recipe = training.Recipe(1, 8, lambda _: 0.1, lambda _: True, lambda *_: None)
    with pytest.raises(ValueError, match=r"4 images at once of a batch of 8: .* batch norm"):
        training.Training(teacher, None, recipe, seed=0, device="cpu", micro_batch_size=4)


def test_predictions_are_made_in_halves_where_memory_runs_out():
    net = classifiers.build("convnet3", num_classes=4, image_size=16, width=8, seed=0).eval()
    pixels = torch.randn(11, 3, 16, 16)
    want = net(pixels)
    hook = too_large(3, nn.Sequential)
    try:
        torch.testing.assert_close(training.predict(net, pixels, "float32"), want)
        hook.remove()
        hook = too_large(0, nn.Sequential)
        with pytest.raises(torch.OutOfMemoryError):
            training.predict(net, pixels, "float32")
    finally:
        hook.remove()


def test_a_diverged_training_is_not_kept():
    with pytest.raises(FloatingPointError, match="at epoch 1: lower lr"):
        hard(replace(HARD, lr=1e30, evaluations=1), after_epoch=lambda t: t.state())
