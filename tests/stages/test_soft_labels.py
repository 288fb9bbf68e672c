"""Stored soft labels are what the teacher says of the stored images, in the order of metadata.jsonl."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlcp_dist import pipeline
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import InputError
from vlcp_dist.models import standard
from vlcp_dist.stages import soft_labels

CLASSES = [f"digit-{digit}" for digit in range(10)]
LABELLED = ["synthesize.soft_labels=mobilenet-v2", "evaluate.teacher.epochs=1", "evaluate.teacher.batch_size=40"]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def labelled(run_with):
    """The hard-label run with soft labels asked for afterwards."""
    run = run_with(*LABELLED)
    pipeline.run(run.cfg, Progress(), only=["teachers", "soft_labels"])
    return run


def test_logits_are_those_of_the_teacher_row_by_row(labelled):
    teacher = standard.load(labelled.folders["teachers"].path / "mobilenet-v2")
    images = labelled.folders["synthesize"].path
    for strategy in ("DCS", "L"):
        stem = labelled.folders["soft_labels"].path / strategy / "ipc=2" / "soft_labels" / "mobilenet-v2-trained"
        logits, facts = load_file(f"{stem}.safetensors"), json.loads(stem.with_suffix(".json").read_text())
        assert sorted(logits) == facts["classes"] == CLASSES
        for class_id, of_class in logits.items():
            folder = images / strategy / "ipc=2" / "train" / class_id
            names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
            pixels = torch.from_numpy(np.stack([np.asarray(Image.open(folder / name)) for name in names]))
            with torch.no_grad():
                expected = teacher(((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2)).logits
            assert of_class.dtype == torch.float16
            torch.testing.assert_close(of_class.float(), expected, rtol=2e-3, atol=2e-3)
        taught = json.loads((labelled.folders["teachers"].path / "mobilenet-v2" / "training.json").read_text())
        assert facts["teacher"]["top1"] == pytest.approx(taught["top1_last"], abs=0.01)
        assert (facts["temperature"], facts["images"], facts["made_from"]) == (20.0, 20, images.name)


def test_they_cost_nothing_that_is_there_already(labelled, whole):
    """The setting renames no folder of a hard-label run, and no classifier waits for the teacher."""
    assert {name: labelled.folders[name].path for name in whole.folders} == {
        n: f.path for n, f in whole.folders.items()
    }
    assert all(state.complete for state in pipeline.status(labelled.cfg))


def test_they_lie_in_the_published_folder_without_disturbing_it(labelled, tmp_path):
    published = tmp_path / "published"
    for stage in ("synthesize", "soft_labels"):
        for path in (labelled.folders[stage].path / "DCS" / "ipc=2").rglob("*.*"):
            target = published / path.relative_to(labelled.folders[stage].path / "DCS" / "ipc=2")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert {"README.md", "train", "webdataset", "soft_labels"} == {path.name for path in published.iterdir()}
    assert "`soft_labels/`" in (published / "README.md").read_text()
    images = datasets.load_dataset(str(published), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(images) == 20 and set(images["class_id"]) == set(CLASSES)


@pytest.mark.parametrize(
    ("class_ids", "words"), [(CLASSES[:9], "knows 9 classes"), ([*CLASSES[1:], CLASSES[0]], "another order")]
)
def test_a_teacher_of_other_classes_or_another_order_is_refused(run_with, tmp_path, class_ids, words):
    for name, data in standard.files(standard.build("mobilenet-v2", class_ids=class_ids, seed=3)).items():
        (tmp_path / name).write_bytes(data)
    run = run_with(*LABELLED, f"evaluate.teacher.checkpoints={{mobilenet-v2: {tmp_path}}}")
    with pytest.raises(InputError, match=words):
        soft_labels.Worker(run)
    with pytest.raises(InputError, match=words):
        pipeline.run(run.cfg, Progress(), only=["index"])
