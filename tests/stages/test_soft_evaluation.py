"""Soft labels from the images to the records, teachers that do not fit, and trainings that are cut short."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlcp_dist import pipeline
from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.index import Index, RowGroup
from vlcp_dist.data.manifest import StageFolder
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import InputError, Stopped
from vlcp_dist.models import soft_label, standard
from vlcp_dist.models.soft_label import Protocol
from vlcp_dist.stages import base, evaluate, image_sets, teachers

SOFT = [
    "evaluate.protocol=soft",
    "evaluate.nets=[mobilenet-v2]",
    "evaluate.width=null",
    "evaluate.epochs=2",
    "evaluate.baselines=[]",
    "evaluate.teacher.epochs=2",
    "evaluate.teacher.batch_size=40",
    "synthesize.strategies=[DCS]",
]
CLASSES = [f"digit-{digit}" for digit in range(10)]


@pytest.fixture(scope="module")
def soft(run_with):
    """A run whose teacher is trained."""
    run = run_with(*SOFT)
    pipeline.run(run.cfg, Progress(), only=["teachers"])
    return run


def checkpoint(folder, class_ids):
    folder.mkdir()
    for name, data in standard.files(standard.build("mobilenet-v2", class_ids=class_ids, seed=3)).items():
        (folder / name).write_bytes(data)
    return folder


def images_of(run, rows):
    data = run.source.read([row.ref for row in rows])
    images = np.stack([np.asarray(Image.open(io.BytesIO(item)).convert("RGB")) for item in data])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        [CLASSES.index(row.class_id) for row in rows]
    )


def process(run, worker=None):
    (unit,) = evaluate.distilled_units(run)
    worker = worker or evaluate.Worker(run)
    outcome = worker.process(unit, worker.read(unit))
    return unit, outcome, json.loads(outcome.files[f"{unit.name}.json"])


def test_a_record_is_what_the_protocol_gives_with_the_teacher_that_was_trained(soft):
    folder = soft.folders["teachers"].path / "mobilenet-v2"
    assert standard.class_ids(folder) == CLASSES
    training = json.loads((folder / "training.json").read_text())
    assert training["epochs"] == 2 and training["train_images"] == 120 and training["protocol"]["batch_size"] == 40

    unit, _, record = process(soft)
    assert unit.name == "DCS/ipc=2/mobilenet-v2/teacher=trained/epochs=2/seed=0"
    test = images_of(soft, list(soft.index.split("test")))
    result, _ = soft_label.train(
        *image_sets.distilled_images(soft, "DCS", 2),
        *test,
        teacher=standard.load(folder),
        class_ids=CLASSES,
        ipc=2,
        protocol=Protocol(net="mobilenet-v2", image_size=32, epochs=2, flip=0.0),
        seed=0,
        device=base.device(),
    )
    assert record["curve"][-1]["loss"] == pytest.approx(result.curve[-1]["loss"], rel=1e-5)
    assert record["top1_last"] == pytest.approx(result.top1_last, abs=0.01)
    assert record["protocol"] == json.loads(json.dumps(result.protocol)) and record["classes"] == CLASSES
    taught = soft_label.accuracy(standard.load(folder), *test, image_size=32, device=base.device())
    assert (
        record["teacher"]["top1"] == pytest.approx(taught, abs=0.01) == pytest.approx(training["top1_last"], abs=0.01)
    )


def test_a_checkpoint_takes_the_place_of_training_one_and_names_its_units(run_with, tmp_path):
    folder = checkpoint(tmp_path / "teacher", CLASSES)
    run = run_with(*SOFT, f"evaluate.teacher.checkpoints={{mobilenet-v2: {folder}}}")
    evaluate.check(run.cfg, run.index)
    assert teachers.units(run) == []
    unit, _, record = process(run)
    digest = record["teacher"]["digest"]
    assert unit.name == f"DCS/ipc=2/mobilenet-v2/teacher={digest}/epochs=2/seed=0"
    assert record["teacher"]["from"] == "checkpoint"
    without = run_with(*SOFT)
    assert {name: f.path for name, f in run.folders.items()} == {name: f.path for name, f in without.folders.items()}


@pytest.mark.parametrize(
    ("class_ids", "words"),
    [
        ([*CLASSES, "digit-x"], ["knows 11 classes", "digit-0", "the data have 10"]),
        ([*CLASSES[:9], "digit-x"], ["knows digit-x, which the data lack", "not digit-9, which they have"]),
        ([*CLASSES[1:], CLASSES[0]], ["another order", "output 0 is digit-1, class 0 of the data digit-0"]),
    ],
)
def test_a_teacher_of_other_classes_or_another_order_is_refused(run_with, tmp_path, class_ids, words):
    folder = checkpoint(tmp_path / "teacher", class_ids)
    run = run_with(*SOFT, f"evaluate.teacher.checkpoints={{mobilenet-v2: {folder}}}")
    for refused in (lambda: evaluate.check(run.cfg, run.index), lambda: process(run)):
        with pytest.raises(InputError) as caught:
            refused()
        for word in [*words, str(folder), "id2label"]:
            assert word in str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_refused(run_with, tmp_path):
    run = run_with(*SOFT, f"evaluate.teacher.checkpoints={{mobilenet-v2: {tmp_path / 'absent'}}}")
    with pytest.raises(InputError, match="absent is no checkpoint"):
        evaluate.distilled_units(run)
    with pytest.raises(InputError, match=r"checkpoints\.mobilenet-v2: .*absent"):
        evaluate.check(run.cfg, run.index)


def test_a_split_with_other_classes_than_the_training_images_names_both_sides(tmp_path):
    names = ["a", "b", "c"]
    groups = [RowGroup("0", "train", 0, 4, {"a": 2, "b": 2}), RowGroup("t", "test", 1, 4, {"b": 2, "c": 2})]
    index = Index(tmp_path, [ClassInfo(name, name) for name in names], groups)
    with pytest.raises(InputError, match=r"1 \(c\) only in the test split, 1 \(a\) only among the training images"):
        image_sets.check_split("test", index)
    image_sets.check_split("validation", index)  # there is none: said where it is needed


def test_an_ipc_that_is_not_synthesised_is_named_beside_those_that_are(whole, run_with):
    with pytest.raises(InputError, match=r"DCS at IPC 7 is not synthesised: .* holds of DCS IPC 2;"):
        image_sets.distilled_images(whole, "DCS", 7)
    with pytest.raises(InputError, match=r"evaluate needs .*synthesize \(.* units are not done, such as L/ipc=3/"):
        pipeline.run(run_with("ipc=[2,3]", "evaluate.epochs=3").cfg, Progress(), only=["evaluate"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("settings", [["evaluate.epochs=5", "evaluate.seeds=[4]"], [*SOFT, "evaluate.epochs=4"]])
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(run_with, soft, settings, monkeypatch):
    """The record is the uninterrupted one to the byte, and the checkpoint goes when it is committed."""
    run = run_with("synthesize.strategies=[DCS]", "evaluate.baselines=[]", "evaluate.checkpoint_every=0", *settings)
    unit, uninterrupted, _ = process(run)
    path = run.folders["evaluate"].path / f"{unit.name}.checkpoint.safetensors"
    path.unlink()
    epochs: list[int] = []
    heartbeat = StageFolder.heartbeat

    def die_in_the_third(self, phase, step, steps, **facts):
        epochs.append(step)
        if epochs == [1, 2, 3]:
            raise Killed
        heartbeat(self, phase, step, steps, **facts)

    monkeypatch.setattr(StageFolder, "heartbeat", die_in_the_third)
    worker = evaluate.Worker(run)
    with pytest.raises(Killed):
        process(run, worker)
    assert path.exists()
    _, resumed, _ = process(run, worker)
    assert epochs[:4] == [1, 2, 3, 3]  # the third was computed again
    assert resumed.files == uninterrupted.files
    run.folders["evaluate"].commit(unit, resumed, seconds=1.0)
    assert not path.exists()


def test_a_stop_is_heeded_after_the_epoch_and_nothing_is_lost(run_with):
    run = run_with("synthesize.strategies=[DCS]", "evaluate.baselines=[]", "evaluate.epochs=4", "evaluate.seeds=[5]")
    unit, whole, _ = process(run)
    folder = run.folders["evaluate"]
    folder.request_stop()
    folder._next_look = 0.0
    with pytest.raises(Stopped, match="stopped after epoch 1 of 4"):
        process(run)
    folder.open()
    assert process(run)[1].files == whole.files
    (folder.path / f"{unit.name}.checkpoint.safetensors").unlink()


def test_a_teacher_in_training_is_resumed_too(run_with, monkeypatch):
    run = run_with(*SOFT, "evaluate.teacher.epochs=3", "evaluate.checkpoint_every=0")
    (unit,) = teachers.units(run)
    uninterrupted = teachers.Worker(run).process(unit, None)
    epochs: list[int] = []
    monkeypatch.setattr(StageFolder, "heartbeat", lambda self, phase, step, steps, **facts: epochs.append(step))
    assert teachers.Worker(run).process(unit, None).files == uninterrupted.files
    assert epochs == []  # the checkpoint is that of the second epoch of three
    assert uninterrupted.obsolete == ["mobilenet-v2.checkpoint.safetensors"]
