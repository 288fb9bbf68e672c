"""`vlcp plan` with the rates of another run, and on so many machines."""

import json
import runpy
from pathlib import Path

import pytest

from runs import MICRO, SMALL, vlcp
from vlcp_dist import pipeline, plan
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import ConfigError, InputError

TWO_CPUS = plan.Machines(2, gpus=False)


def planned(cfg, trial, *columns):
    states = {state.stage.name: state for state in pipeline.status(cfg)}
    return {row["stage"]: row for row in plan.rows(states, trial, columns)}


@pytest.fixture
def larger(micro):
    """larger(*overrides) -> Config on Ray with five times the images, IPC 1 and 4, of which the index is done."""

    def load(*overrides: str):
        settings = [*SMALL, "ipc=[1,4]", "data.limit_per_class=60", "finetune.epochs=2", *overrides]
        pipeline.run(micro(*settings), Progress(), only=["index"])
        return micro(*settings, "engine.kind=ray")

    return load


def test_the_rates_of_a_trial_price_a_larger_run(larger, small_reference):
    trial = plan.load_trial(str(small_reference))
    cfg = larger()
    assert all(row["rate_from"] is None for name, row in planned(cfg, None, TWO_CPUS).items() if name != "index")
    rows = planned(cfg, trial, TWO_CPUS, plan.Machines(8, gpus=True))
    marker = json.loads(next(small_reference.glob("synthesize-*/done/DCS/ipc=1/0000.json")).read_bytes())
    took = trial.rates["synthesize"].piece_seconds * 7 * 10  # a unit of ten images, 2 steps with guidance, decoding
    assert took == pytest.approx(marker["read_seconds"] + marker["seconds"] + marker["write_seconds"], abs=0.01)
    row = rows["synthesize"]
    assert row["rate_from"] == f"1 unit of {small_reference}"
    assert row["worker_seconds_left"] == pytest.approx(5 * took, abs=0.06)
    # IPC 1 is one unit of ten images, IPC 4 five of eight: of two workers one has 10 + 8 + 8 of them, the other 3 x 8.
    assert row["wall_seconds"]["2 CPUs"] == pytest.approx(trial.rates["synthesize"].start + 2.6 * took, abs=0.06)
    assert row["bytes_left"] == pytest.approx(5 * sum(f["bytes"] for f in marker["files"].values()), rel=0.01)
    assert rows["caption"]["worker_seconds_left"] == pytest.approx(
        5 * trial.rates["caption"].piece_seconds * 120, abs=0.06
    )
    model = next(small_reference.glob("finetune-*/done/unet.json"))
    assert rows["finetune"]["bytes_left"] == sum(f["bytes"] for f in json.loads(model.read_bytes())["files"].values())
    # A GPU is not a CPU; packing needs none.
    assert rows["synthesize"]["wall_seconds"]["8 GPUs"] is None
    assert rows["pack"]["wall_seconds"]["8 GPUs"] < rows["pack"]["wall_seconds"]["2 CPUs"] + 0.1
    lines = plan.table(list(rows.values()), [TWO_CPUS, plan.Machines(8, gpus=True)])
    assert {len(line) for line in lines} == {10}
    assert lines[0][7:9] == ["2 CPUs", "8 GPUs"] and lines[-1][0] == "all" and lines[-1][8] == "?"


def test_no_rate_is_invented(larger, small_reference, tmp_path):
    trial = plan.load_trial(str(small_reference))
    cfg = larger("caption.batch_size=7", "evaluate.baselines=[random]")
    rows = planned(cfg, trial, TWO_CPUS)
    assert rows["caption"]["no_rate"].endswith("caption.batch_size is 32 there and 7 here")
    assert rows["baselines"]["no_rate"] == f"{small_reference} has done nothing of it"
    for name in ("caption", "baselines"):
        assert rows[name]["wall_seconds"] == {"2 CPUs": None} and rows[name]["worker_seconds_left"] is None
    assert rows["encode"]["no_rate"] is None
    assert plan.table(list(rows.values()), [TWO_CPUS])[-1][0] == "known so far"
    with pytest.raises(InputError, match="vlcp report --config"):
        plan.load_trial(str(tmp_path / "absent"))
    for counts in ("0", "8,", "many", "-1", "1.5"):
        with pytest.raises(ConfigError, match="--gpus"):
            plan.machines_of(counts, gpus=True)


def test_workers_of_a_stage_on_so_many_machines(larger):
    settings = [
        "engine.stages={prototypes: {gpus_per_worker: 0.25}, synthesize: {workers: 3}, encode: {cpus_per_worker: 2}}"
    ]
    cfg = larger("finetune.workers=8", *settings)
    states = {state.stage.name: state for state in pipeline.status(cfg)}

    def workers(stage: str, count: int, *, gpus: bool = True) -> int:
        return plan.workers_on(states[stage], plan.Machines(count, gpus))

    assert [workers("caption", n) for n in (1, 8, 64)] == [1, 8, 64]
    assert [workers("prototypes", n) for n in (1, 8)] == [4, 32]
    assert [workers("synthesize", n) for n in (1, 8)] == [1, 3]
    assert [workers("finetune", n) for n in (1, 3, 8, 64)] == [1, 2, 8, 8]  # a batch of 16 does not share out among 3
    assert workers("pack", 8) == 8
    assert [workers("encode", n, gpus=False) for n in (1, 2, 8)] == [1, 1, 4]
    assert workers("pretrain", 8, gpus=False) == 8


def test_the_command_prints_a_column_for_each_size(small_reference: Path):
    arguments = ["plan", "-c", str(MICRO), f"root={small_reference}", *SMALL, "engine=serial"]
    shown = vlcp(*arguments, "ipc=[1,2]", "--gpus", "8", "--cpus", "1,2", "--rates", str(small_reference)).stdout
    assert all(column in shown for column in ("8 GPUs", "1 CPU ", "2 CPUs", "units on cpu"))
    wrong = vlcp(*arguments, "--gpus", "0", check=False)
    assert wrong.returncode == 2 and "--gpus 0: '0' is no count of GPUs" in wrong.stderr


def test_the_work_of_imagenet_in_the_docs_is_that_of_the_code():
    docs = Path(__file__).parents[1] / "docs"
    tables = runpy.run_path(str(docs / "sizing.py"))["imagenet"]()
    assert all(table in (docs / "sizing.md").read_text() for table in tables), "python docs/sizing.py"
