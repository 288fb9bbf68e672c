"""A whole run on a simulated cluster: nodes come and go, the driver is killed, the bytes stay those of a quiet run."""

import os
import re
import signal
import subprocess

import pytest

from runs import MICRO, SMALL, artefacts, command, markers

QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster():
    """A head that holds no worker, so that nodes can be taken away beside it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK_TO_NOTICE})
    yield cluster
    cluster.shutdown()


def start(cluster, root, *overrides: str) -> subprocess.Popen:
    arguments = ["run", "-c", str(MICRO), f"root={root}", f"engine.address={cluster.address}", *SMALL, *overrides]
    return subprocess.Popen(command(*arguments, "--progress-interval", "0"), stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen, pattern: str) -> None:
    seen = []
    for line in process.stderr:
        seen.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError(f"{pattern} was never printed, exit code {process.wait()}: {''.join(seen[-20:])}")


def test_a_node_is_lost_another_joins_and_the_driver_is_killed(cluster, small_reference, tmp_path):
    root = tmp_path / "run"
    lost = cluster.add_node(num_cpus=1)
    first = start(cluster, root)
    until(first, r"caption: 2 of 15")
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    until(first, r"caption: .*will be tried again|caption: [4-9] of 15")
    until(first, r"encode: 2 of 15")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    kept = markers(root)
    cluster.add_node(num_cpus=1)
    second = start(cluster, root, "finetune.workers=1")
    _, log = second.communicate()
    assert second.returncode == 0, log
    assert kept.items() <= markers(root).items()
    assert artefacts(root) == artefacts(small_reference)
