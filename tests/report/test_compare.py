"""Runs side by side: each number in the row of its run, and only what differs is called a difference."""

import json

import pytest
import yaml

from runs import MICRO, vlcp
from vlcp_dist import config
from vlcp_dist.data import storage
from vlcp_dist.errors import ConfigError, InputError
from vlcp_dist.report import compare


def finished(name, value, best, **settings):
    """A run with two seeds of DCS at IPC 1 and 10 around `best`, and a random baseline that all runs share."""
    records = [
        {"method": method, "ipc": ipc, "net": "convnet3", "seed": seed, "train_images": 10,
         "top1_best": mean + ipc / 10 + seed, "top1_last": mean}
        for method, mean in (("random", 30.0), ("DCS", best))
        for ipc in (1, 10)
        for seed in (0, 1)
    ]  # fmt: skip
    stages = [
        {"stage": "caption", "worker_seconds": 100.0, "gpu_hours": 0.5, "samples": 200},
        {"stage": "evaluate", "worker_seconds": 0.0, "gpu_hours": 0.0, "samples": 0},
    ]
    return compare.Finished(name, records, stages, {"prototypes.beta": value, "root": name, **settings})


RUNS = [finished("beta=0.3", 0.3, 40.0), finished("beta=0.7", 0.7, 50.0)]


def test_each_number_is_in_the_row_of_its_run():
    rows = {(row["run"], row["method"]): row["cells"] for row in compare.rows_of("convnet3", RUNS)}
    assert list(rows) == [("all runs", "random"), ("beta=0.3", "DCS"), ("beta=0.7", "DCS")]
    assert rows["beta=0.3", "DCS"][10]["text"] == "41.5 ± 0.7"
    assert [rows[name][1]["rank"] for name in rows] == [3, 2, 1]
    other = [RUNS[0], finished("other", 0.3, 40.0)]  # equal results of a method are no reason to merge its rows
    assert [row["run"] for row in compare.rows_of("convnet3", other)] == ["all runs", "beta=0.3", "other"]


def test_only_what_changes_a_result_is_a_difference():
    runs = [finished("a", 0.3, 1.0, **{"engine.workers": 1}), finished("b", 0.3, 1.0, **{"engine.workers": 8})]
    assert compare.differences(runs) == []
    assert compare.differences(RUNS) == [{"name": "prototypes.beta", "values": ["0.3", "0.7"]}]


def test_the_page_has_the_curve_of_a_sweep_and_the_costs(tmp_path):
    compare.write(RUNS, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Top-1 accuracy against beta: the table has the numbers" in page and "DCS, IPC 10" in page
    assert "100.0 (0.50 h)" in page and "2.0/s" in page
    assert "http" not in page.replace("http-equiv", "")


def test_names_are_the_shortest_that_differ():
    assert compare.names_of(["runs/a", "runs/b"]) == ["a", "b"]
    assert compare.names_of(["x/run", "y/run", "s3://bucket/z/run"]) == ["x/run", "y/run", "z/run"]
    with pytest.raises(InputError, match="named twice"):
        compare.names_of(["a", "a"])


def test_a_folder_without_a_report_is_named(tmp_path):
    with pytest.raises(InputError, match=r"empty/report holds no report .* vlcp report --config"):
        compare.load(storage.locate(str(tmp_path / "empty")) / "report", "empty")


def test_a_sweep_shares_what_does_not_depend_on_it(tmp_path):
    tree = yaml.safe_load(MICRO.read_text()) | {"sweep": {"prototypes.contamination": [0.0, 0.3]}, "ipc": [1]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["-c", str(tmp_path / "sweep.yaml"), f"root={tmp_path / 'run'}", "engine=serial"]
    vlcp("run", *arguments)
    folders = [path.name.split("-")[0] for path in (tmp_path / "run").glob("*-*")]
    assert {name: folders.count(name) for name in folders} == {
        "index": 1, "caption": 1, "pretrain": 1, "encode": 1, "pack": 1, "finetune": 1, "baselines": 1,
        "prototypes": 2, "synthesize": 2, "evaluate": 2,
    }  # fmt: skip
    rows = json.loads(vlcp("status", *arguments, "--json").stdout)
    assert sum(row["stage"].endswith("prototypes.contamination=0.3") for row in rows) == 3
    reports = [str(tmp_path / "run" / "report" / f"prototypes.contamination={value}") for value in ("0.0", "0.3")]
    runs = [compare.load(storage.locate(path), path) for path in reports]
    assert compare.differences(runs) == [{"name": "prototypes.contamination", "values": ["0.0", "0.3"]}]
    assert "against prototypes.contamination" in (tmp_path / "run" / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("{prototypes.betta: [0.3, 0.5]}", "unknown key 'prototypes.betta'; did you mean 'beta'"),
        ("{prototypes.beta: [0.3, 7]}", "prototypes.beta = 7"),
        ("{prototypes.beta: [0.3]}", "at least 2"),
        ("{prototypes.beta: [0.3, 0.3]}", "twice"),
        ("{engine.workers: [1, 2]}", "changes no result"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_it_starts(sweep, words):
    with pytest.raises(ConfigError, match=r".") as error:
        config.load(MICRO, ["root=x", f"sweep={sweep}"])
    assert words in str(error.value)
