"""The arithmetic of costs: pieces as real units hold them, rates from markers, and the time of many workers."""

import itertools
import json
import random
from typing import get_args

import pytest
from safetensors.numpy import load_file

from runs import SMALL
from vlcp_dist import costs, pipeline
from vlcp_dist.data import shards
from vlcp_dist.schema import StageName


@pytest.fixture
def states(micro, small_reference):
    """The finished run's stages by name."""
    return {state.stage.name: state for state in pipeline.status(micro(*SMALL, root=small_reference))}


def test_the_makespan_is_between_the_best_schedule_and_a_third_more():
    draw = random.Random(0)
    for workers in (1, 2, 3):
        seconds = [draw.choice([0.5, 1.0, 2.5, 4.0, 7.0]) for _ in range(7)]
        loads = [[0.0] * workers for _ in range(workers ** len(seconds))]
        for load, places in zip(loads, itertools.product(range(workers), repeat=len(seconds)), strict=True):
            for place, each in zip(places, seconds, strict=True):
                load[place] += each
        best = min(max(load) for load in loads)
        assert best <= costs.makespan(seconds, workers) <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9
    assert costs.makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert costs.makespan([1.0] * 641, 64) == 11.0  # 641 shards: one of them goes a round of its own
    assert costs.makespan([], 8) == 0.0


def test_pieces_are_those_that_the_units_hold(states):
    def pieces(name: str) -> float:
        return sum(costs.pieces(name, states[name].cfg, unit) for unit in states[name].units)

    def folder(name: str):
        return states[name].folder.path

    cfg = states["index"].cfg
    described = [key for tar in folder("caption").glob("*.tar") for key, _ in shards.read(tar)]
    encoded = [key for tar in folder("encode").glob("*.tar") for key, _ in shards.read(tar)]
    assert pieces("caption") == len(described) == pieces("encode") == len(encoded) == pieces("pack")
    steps = len(json.loads((folder("finetune") / "training.json").read_bytes())["loss"])
    assert pieces("finetune") == steps * cfg.finetune.batch_size
    images = [json.loads(line) for path in folder("synthesize").rglob("metadata.jsonl") for line in path.open()]
    run_steps = {image["strength"] * image["num_inference_steps"] for image in images}
    assert {pieces("synthesize")} == {len(images) * (2 * steps + costs.DECODE) for steps in run_steps}
    records = [json.loads(path.read_bytes()) for path in folder("evaluate").glob("DCS/**/*.json")]
    assert len(records) == 1
    looked = len(records[0]["curve"]) * records[0]["test_images"]
    assert pieces("evaluate") == 3 * records[0]["epochs"] * records[0]["train_images"] + looked
    centers = [load_file(path)["centers"] for path in folder("prototypes").rglob("*.safetensors")]
    state = states["prototypes"]
    assert sum(costs.WORK["prototypes"].volume(cfg, unit) for unit in state.units) == sum(map(len, centers))


def test_pieces_follow_the_settings(micro, states):
    def times(stage: str, *overrides: str) -> float:
        (unit, *_), cfg = states[stage].units, states[stage].cfg
        return costs.pieces(stage, micro(*SMALL, *overrides), unit) / costs.pieces(stage, cfg, unit)

    assert times("encode", "encode.horizontal_flip=true") == 2
    assert times("finetune", "finetune.epochs=16") == 2
    assert times("synthesize", "synthesize.strength=1.0") == (2 * 4 + costs.DECODE) / (2 * 2 + costs.DECODE)
    assert times("synthesize", "synthesize.guidance_scale=1") == (2 + costs.DECODE) / (2 * 2 + costs.DECODE)
    assert 1 < times("prototypes", "prototypes.n_init=20") <= 2


def test_a_rate_gives_back_what_its_units_took(states):
    for name, state in states.items():
        rate = state.rate
        if not state.units:
            assert rate is None  # as without baselines
            continue
        assert int(rate.source.split()[0]) == len(state.units) and rate.device == "cpu"
        spent = sum(costs.seconds_of(marker, 1, state.cfg.finetune.batch_size)[0] for marker in state.markers.values())
        pieces = sum(costs.pieces(name, state.cfg, unit) for unit in state.units)
        assert rate.piece_seconds * pieces == pytest.approx(spent)
        assert rate.start >= max(marker["start_seconds"] for marker in state.markers.values())
        volume = sum(costs.WORK[name].volume(state.cfg, unit) for unit in state.units)
        assert rate.volume_bytes * volume == pytest.approx(state.summary()["bytes"])
    started = [marker["start_seconds"] > 0 for marker in states["encode"].markers.values()]
    assert sum(started) == 1  # one process: its first unit made the worker


def test_what_a_unit_takes_of_a_worker():
    marker = {"seconds": 4.0, "read_seconds": 1.0, "write_seconds": 2.0, "start_seconds": 9.0, "info": {}}
    assert costs.seconds_of(marker, 1, 32) == (7.0, 9.0)  # one after the other
    assert costs.seconds_of(marker, 2, 32) == (4.0, 9.0)  # another unit computes while it is read and written
    assert costs.seconds_of(marker | {"write_seconds": 9.0}, 2, 32) == (7.0, 9.0)  # two are not enough to hide this
    resumed = marker | {"info": {"seconds": 100.0}}
    assert costs.seconds_of(resumed, 2, 32) == (100.0, 9.0)  # a training, of which the marker saw the end alone
    tuned = {"steps": 100, "resumed_at_step": 90, "samples_per_second": 32.0, "workers": 4}
    tuning = marker | {"seconds": 16.0, "info": tuned}  # ten steps of 1 s each, and 6 s before them
    assert costs.seconds_of(tuning, 1, 32) == (400.0, 15.0)


def test_a_rate_is_for_its_settings(micro):
    here = micro()
    assert costs.differences("synthesize", micro("synthesize.strength=0.9", "ipc=[50]"), here) == []
    assert costs.differences("caption", micro("caption.batch_size=7"), here) == [
        "caption.batch_size is 7 there and 32 here"
    ]
    assert costs.differences("index", micro("data.limit_per_class=2"), here)
    assert set(costs.WORK) == set(get_args(StageName))
    assert all(costs.differences(stage, here, here) == [] for stage in costs.WORK)
