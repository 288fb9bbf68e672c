"""The caption stage around a tiny LLaVA: what its files and markers hold, and what it needs before it starts."""

import json
import shutil

import pytest

from vlcp_dist import pipeline
from vlcp_dist.data import shards
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import InputError
from vlcp_dist.models.tiny_llava import build_tiny_llava
from vlcp_dist.stages.caption import Worker
from vlcp_dist.status import stage_status


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    build_tiny_llava(folder)
    return folder


@pytest.fixture
def llava(run_with, model):
    return lambda *more: run_with(
        "caption.captioner=llava", f"caption.model={model}", "caption.max_new_tokens=24", *more
    )


def outcome_of(run, spoil=()):
    """What the worker makes of the first shard, with some of its images replaced by other bytes."""
    worker, unit = Worker(run), pipeline.caption.units(run)[0]
    data = worker.read(unit)
    return worker.process(unit, [(row, b"no image" if i in spoil else image) for i, (row, image) in enumerate(data)])


def described(outcome, tmp_path):
    (name, content), *_ = outcome.files.items()
    (tmp_path / name).write_bytes(content)
    return dict(shards.read(tmp_path / name))


def test_files_do_not_depend_on_batches_or_threads(llava, tmp_path):
    one = outcome_of(llava("caption.batch_size=1", "engine.cpus_per_worker=1"))
    eight = outcome_of(llava("caption.batch_size=8", "engine.cpus_per_worker=3"))
    assert one.files == eight.files
    facts = [json.loads(parts["json"]) for parts in described(eight, tmp_path).values()]
    assert all(set(fact) == {"raw", "tokens", "finish_reason"} for fact in facts)
    assert sum(fact["tokens"] for fact in facts) == eight.info["tokens"] > 0
    ends = [fact["finish_reason"] for fact in facts]
    assert [eight.info.get(f"finished_{end}", 0) for end in ("end", "length")] == [
        ends.count(e) for e in ("end", "length")
    ]
    assert len(eight.info["seconds_each"]) == len(facts) == eight.n_in
    assert eight.wait_seconds > 0


def test_a_bad_image_costs_itself_alone(llava, tmp_path):
    run = llava()
    rows = run.index.shard(pipeline.caption.units(run)[0].name)
    spoilt = outcome_of(run, spoil=(0, 5))
    assert [(f.key, f.source) for f in spoilt.failed] == [(rows[i].key, rows[i].ref) for i in (0, 5)]
    assert all("not a readable image" in failure.reason for failure in spoilt.failed)
    (tmp_path / "whole").mkdir()
    whole = described(outcome_of(run), tmp_path / "whole")
    assert described(spoilt, tmp_path) == {k: v for k, v in whole.items() if k not in (rows[0].key, rows[5].key)}


def test_what_is_odd_of_descriptions_is_told(llava, do):
    run = llava("caption.prompt=What is the {class_name}?")
    events = do(run, "caption")
    assert {event.kind for event in events} == {"done"}
    stage = next(stage for stage in pipeline.stages(run.cfg) if stage.name == "caption")
    state = stage_status(run, stage)
    total = sum(unit.size for unit in state.units)
    unnamed = "descriptions without the name of their class"
    assert state.summary()["notices"][unnamed] == total  # a tiny LLaVA knows no digits
    assert "empty descriptions" not in state.summary()["notices"]
    marker = events[0].marker
    assert marker["wait_seconds"] > 0 and {"empty", "repeating", "unnamed"} <= marker["info"].keys()


def test_missing_weights_end_a_run_before_it_starts(micro, model, tmp_path):
    llava = ["caption.captioner=llava", "caption.max_new_tokens=4", "data.shard_size=200"]
    cfg = micro(*llava, f"caption.model={tmp_path}/none")
    with pytest.raises(InputError, match=rf"caption: .*\n.*\n +hf download llava.* --local-dir {tmp_path}/none"):
        pipeline.run(cfg, Progress())
    assert not list(tmp_path.glob("run/index-*"))
    pipeline.run(cfg, Progress(), only=["index"])  # which needs none

    moved = tmp_path / "llava"
    shutil.copytree(model, moved)
    cfg = micro(*llava, f"caption.model={moved}")
    pipeline.run(cfg, Progress(), only=["index", "caption"])
    (moved / "model.safetensors").unlink()
    pipeline.run(cfg, Progress(), only=["index", "caption"])  # all is there that they made


def test_a_missing_diffusion_model_is_told_as_soon(micro):
    cfg = micro("pretrain=null", "diffusion.model=nobody/no-such-model", "diffusion.revision=v7")
    with pytest.raises(
        InputError, match=r"diffusion: .*nobody/no-such-model(.|\n)*hf download nobody/.* --revision v7"
    ):
        pipeline.run(cfg, Progress())
