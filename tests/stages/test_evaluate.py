"""Every record is what the protocol gives on the right images and labels, chosen and read anew here."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlcp_dist.models import classifiers
from vlcp_dist.models.hard_label import Protocol, train
from vlcp_dist.ops.selection import herding, k_center_greedy
from vlcp_dist.stages import base, evaluate

IPC = 2
CLASSES = [f"digit-{digit}" for digit in range(10)]


def records(run, stage):
    """Every record of a stage by its method, and where it lies."""
    found = {}
    for path in run.folders[stage].path.rglob("*.json"):
        content = json.loads(path.read_text())
        if "top1_last" in content:
            assert content["method"] not in found
            found[content["method"]] = (content, path)
    return found


def real(run, rows):
    """Images uint8 (n, 3, 32, 32) and labels of index rows; digits are stored at that size."""
    images = [
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in run.source.read([row.ref for row in rows])
    ]
    labels = [CLASSES.index(row.class_id) for row in rows]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def distilled(run, method):
    """As any reader of an image folder does it: labels by the order of the folders' names."""
    root = run.folders["synthesize"].path / method / f"ipc={IPC}" / "train"
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.png"))]
    images = np.stack([np.asarray(Image.open(path)) for path, _ in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def chosen(run, pick):
    latents = run.latents(run.index.shards)
    rows = []
    for class_id in CLASSES:
        of_class = sorted((row for row in run.index.split("train") if row.class_id == class_id), key=lambda r: r.key)
        x = torch.from_numpy(np.stack([latents[row.key].astype(np.float32).ravel() for row in of_class]))
        rows += [of_class[i] for i in pick(x, IPC).tolist()]
    return rows


def expected(run, images, labels, *, split="test", epochs=3):
    """The result of the protocol, under the settings of the micro configuration."""
    protocol = Protocol(net="convnet3", image_size=32, width=8, epochs=epochs, flip=0.0)
    test = real(run, list(run.index.split(split)))
    options = {"num_classes": 10, "ipc": IPC, "protocol": protocol, "seed": 0, "device": base.device()}
    return train(images, labels, *test, **options)[0]


def assert_same(record, result):
    assert record["epochs"] == result.epochs
    assert record["train_images"] == result.train_images
    assert [point["epoch"] for point in record["curve"]] == [point["epoch"] for point in result.curve]
    losses = [point["loss"] for point in result.curve]
    assert [point["loss"] for point in record["curve"]] == pytest.approx(losses, rel=1e-5)
    assert record["per_class"] == pytest.approx(result.per_class, abs=0.01)
    assert record["top1_best"] == pytest.approx(result.top1_best, abs=0.01)
    assert record["top1_last"] == pytest.approx(result.top1_last, abs=0.01)


@pytest.mark.parametrize("method", ["L", "L+FK", "GGS", "DCS", "DCS-shuffled"])
def test_distilled_images_are_trained_on_with_the_labels_of_their_folders(whole, method):
    record, _ = records(whole, "evaluate")[method]
    assert (record["ipc"], record["net"], record["seed"], record["split"]) == (IPC, "convnet3", 0, "test")
    assert record["classes"] == CLASSES
    assert record["test_images"] == len(list(whole.index.split("test")))
    result = expected(whole, *distilled(whole, method))
    assert_same(record, result)
    assert record["protocol"] == json.loads(json.dumps(result.protocol))
    assert record["protocol"]["optimizer"] == "SGD" and record["image_size"] == 32


@pytest.mark.parametrize(("method", "pick"), [("k-center", k_center_greedy), ("herding", herding)])
def test_baselines_are_trained_on_what_their_rule_picks_of_the_latents(whole, method, pick):
    record, _ = records(whole, "baselines")[method]
    rows = chosen(whole, pick)
    assert len(rows) == IPC * len(CLASSES)
    assert_same(record, expected(whole, *real(whole, rows)))


def test_full_is_trained_on_every_training_image(whole):
    record, _ = records(whole, "baselines")["full"]
    rows = list(whole.index.split("train"))
    assert record["ipc"] == "full" and record["train_images"] == len(rows) == 120
    assert_same(record, expected(whole, *real(whole, rows), epochs=15))


def test_the_validation_split_is_what_it_says(whole, run_with):
    run = run_with("evaluate.split=validation", "synthesize.strategies=[DCS]", "evaluate.baselines=[]")
    (unit,) = evaluate.distilled_units(run)
    worker = evaluate.Worker(run)
    outcome = worker.process(unit, worker.read(unit))
    (data,) = outcome.files.values()
    record = json.loads(data)
    assert record["split"] == "validation"
    assert record["test_images"] == len(list(run.index.split("validation")))
    assert record["test_images"] != len(list(run.index.split("test")))
    assert_same(record, expected(run, *distilled(whole, "DCS"), split="validation"))


def test_random_images_are_training_images_that_the_seed_chooses(run_with, monkeypatch):
    """Which images are read is told by the source that they are read from."""
    run = run_with("evaluate.baselines=[random]", "evaluate.seeds=[0, 1]")
    worker = evaluate.Worker(run)
    read, read_many = [], type(run.source).read

    def recorded(source, refs):
        read.extend(refs)
        return read_many(source, refs)

    monkeypatch.setattr(type(run.source), "read", recorded)
    picks = []
    for unit in evaluate.baseline_units(run) * 2:
        read.clear()
        record = json.loads(worker.process(unit, worker.read(unit)).files[f"{unit.name}.json"])
        assert record["train_images"] == len(read)
        picks.append(set(read))
    class_of = {row.ref: row.class_id for row in run.index.split("train")}
    for pick in picks:
        assert Counter(class_of[ref] for ref in pick) == dict.fromkeys(CLASSES, IPC)
    assert picks[:2] == picks[2:]
    assert picks[0] != picks[1]


@pytest.mark.parametrize("method", ["L", "L+FK", "GGS", "DCS", "DCS-shuffled"])
def test_recognised_is_the_share_that_the_net_trained_on_all_gets_right(whole, method):
    record, _ = records(whole, "evaluate")[method]
    (weights,) = whole.folders["baselines"].path.rglob("*.safetensors")
    assert "full" in weights.relative_to(whole.folders["baselines"].path).parts
    net = classifiers.build("convnet3", num_classes=10, image_size=32, width=8, seed=0).eval()
    net.load_state_dict(load_file(weights))
    images, labels = distilled(whole, method)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = net((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert record["recognised"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=0.01)
