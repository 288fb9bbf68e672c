"""How many actors fit, and what is said when none does: from what Ray says of its nodes."""

import pytest

from vlcp_dist.data.manifest import StageFolder
from vlcp_dist.engine.actors import actor_options, capacity, describe, describe_cluster
from vlcp_dist.engine.executor import Job, Resources


def node(alive=True, labels=(), **resources):
    return {"Alive": alive, "Labels": dict(labels), "Resources": {k: float(v) for k, v in resources.items()}}


def options(tmp_path, nodes, threads=1, **asked):
    return actor_options(Job("s", StageFolder(tmp_path), None, None, threads, Resources(**asked)), nodes)


NODES = [
    node(CPU=8, GPU=4, memory=64 * 2**30, labels={"zone": "a", "gpu": "h100"}),
    node(CPU=8, GPU=2, memory=16 * 2**30, disk=2, labels={"zone": "b", "gpu": "a10"}),
    node(CPU=8, memory=64 * 2**30, labels={"zone": "b"}),
    node(CPU=64, GPU=8, memory=64 * 2**30, alive=False),
]


@pytest.mark.parametrize(
    ("asked", "fit"),
    [
        ({"gpus": 0}, 24),
        ({"gpus": None}, 6),  # a GPU each, for the cluster has some
        ({"gpus": 0, "cpus": 3}, 6),
        ({"gpus": 0.5}, 12),
        ({"gpus": 0.6}, 6),  # the rests of two GPUs make no worker
        ({"gpus": 0.1}, 16),  # by then CPUs are what is short
        ({"gpus": 2}, 3),
        ({"gpus": 3}, 1),
        ({"gpus": 0, "memory": 10 * 2**30}, 13),
        ({"gpus": 0, "custom": {"disk": 0.5}}, 4),
        ({"gpus": 0, "labels": {"zone": "b"}}, 16),
        ({"gpus": 0, "labels": {"zone": "!b"}}, 8),
        ({"gpus": 0, "labels": {"gpu": "in(h100, a10)"}}, 16),
        ({"gpus": 0, "labels": {"gpu": "!in(h100, a10)"}}, 8),
        ({"gpus": 0, "labels": {"zone": "c"}}, 0),
    ],
    ids=str,
)
def test_each_node_is_counted_for_itself(asked, fit, tmp_path):
    assert capacity(NODES, options(tmp_path, NODES, **asked)) == fit


def test_a_worker_has_a_cpu_for_each_of_its_threads(tmp_path):
    assert options(tmp_path, NODES, threads=4, gpus=0)["num_cpus"] == 4


def test_gpus_that_are_not_alive_are_not_asked_for(tmp_path):
    assert options(tmp_path, NODES[2:])["num_gpus"] == 0


def test_what_is_asked_for_and_what_there_is_in_words(tmp_path):
    asked = options(tmp_path, NODES, gpus=0.5, memory=2**34, custom={"disk": 3}, labels={"zone": "b"})
    assert describe(asked) == "1 CPU and 0.5 GPU and 16.0 GiB memory and 3 disk and a node with zone=b"
    assert describe_cluster(NODES, asked) == (
        "16 CPU and 2 GPU and 80.0 GiB memory and 2 disk on 2 alive nodes that have these labels"
    )
