"""`vlcp doctor`, and what `vlcp run` says before it starts, on a simulated cluster of two nodes: real raylets.

A root below /proc/self/cwd is another folder for every node that was started in another one: storage that is not shared.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

import vlcp_dist
from runs import MICRO
from vlcp_dist import pipeline
from vlcp_dist.cli import app
from vlcp_dist.doctor import checks, examine
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import InputError
from vlcp_dist.models.tiny_llava import build_tiny_llava


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a node that was started in another folder."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    cluster.add_node(num_cpus=1)
    os.chdir(before)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add(cluster):
    """add(...) -> the node's id; it is gone after the test."""
    added = []

    def add(**args):
        added.append(cluster.add_node(num_cpus=1, **args))
        return added[-1].node_id

    yield add
    for node in added:
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def unlike(tmp_path, monkeypatch):
    """A root that every node takes for another folder."""
    monkeypatch.chdir(tmp_path)
    return Path("/proc/self/cwd/run")


def bad(cfg) -> dict[str, checks.Check]:
    return {check.name: check for check in examine(cfg).checks if not check.ok}


def refused(cfg) -> str:
    """What `run` says before any unit is begun."""
    with pytest.raises(InputError) as caught:
        pipeline.run(cfg, Progress())
    assert not list(Path(cfg.root).glob("*/done/*"))
    return str(caught.value)


def test_all_is_well(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "SLOW", 0)
    root = tmp_path / "run"
    result = CliRunner().invoke(app, ["doctor", "-c", str(MICRO), f"root={root}", "engine.gpus_per_worker=0", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["ok"] and len(found["nodes"]) == 2
    said = {check["name"]: check["found"] for check in found["checks"]}
    assert {"code", "libraries", "GPUs", "clock", "disk", "shared storage", "gloo", "workers", "room"} == said.keys()
    assert "all-reduce of 4 MiB over 2 nodes" in said["gloo"]
    assert all(facts["memory"] > 2**30 and facts["packages"]["ray"] for facts in found["nodes"].values())
    assert list(root.iterdir()) == []
