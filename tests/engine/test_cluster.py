"""What happens to nodes and processes while units run, on a simulated cluster: real raylets, GPUs by name only.

Units and tests wait for each other by files: nothing here depends on how fast the machine is.
"""

import contextlib
import json
import os
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from misbehaving import PATIENCE, attempts
from ray.cluster_utils import Cluster

from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.executor import Resources
from vlcp_dist.engine.pool import RayEngine

DASHBOARD = Path(__file__).parents[2] / "cluster" / "monitoring" / "grafana.json"
QUICKLY = {  # a node that is gone is noticed, and metrics are sent, sooner than on a real cluster
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
    "metrics_report_interval_ms": 500,
}


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs: it holds the driver and no worker."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICKLY},
    )
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add(cluster):
    """add(...) -> the node; all are gone after the test."""
    added = []

    def add(**args):
        added.append(cluster.add_node(**args))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        time.sleep(0.05)


@pytest.fixture
def engine(cluster):
    engine = RayEngine(max_retries=2, start_timeout=60)
    yield engine
    engine.close()


@pytest.fixture
def going(engine, run, scratch):
    """with going(units): the units run while the body acts. At its end the file `gate` is left."""

    @contextlib.contextmanager
    def going(units):
        with ThreadPoolExecutor(1) as aside:
            future = aside.submit(run, engine, units, resources=Resources(gpus=0))
            try:
                yield future
            finally:
                (scratch / "gate").touch()

    return going


def name(node) -> str:
    return node.node_id[:12]


def process_of(unit: str, scratch) -> int:
    return int((scratch / f"{unit}.attempt1").read_text())


def some(scratch, pattern, n=1):
    """Wait until `n` files match, and return them."""
    deadline = time.monotonic() + PATIENCE
    while len(found := sorted(scratch.glob(pattern))) < n:
        assert time.monotonic() < deadline, f"{len(found)} of {n} {pattern}"
        time.sleep(0.01)
    return found


def test_a_worker_that_is_killed_midway_costs_nothing_but_time(add, going, scratch):
    add(num_cpus=2)
    units = [Unit(f"u{i:02d}", 1) for i in range(12)]
    units[5] = Unit("u05", 1, {"await": ["gate"]})
    with going(units) as running:
        some(scratch, "u05.on-*")
        os.kill(process_of("u05", scratch), signal.SIGKILL)
    ran = running.result()
    assert set(ran.final.values()) == {"done"}
    assert "its worker died" in ran.messages("retry")["u05"]
    assert attempts(scratch, "u05") >= 2


def test_a_node_that_goes_midway_costs_nothing_but_time(cluster, add, going, scratch):
    stays, goes = add(num_cpus=1), add(num_cpus=2)
    units = [Unit(f"u{i:02d}", 1, {"await": ["gate"]}) for i in range(12)]
    with going(units) as running:
        there = [path.name.partition(".")[0] for path in some(scratch, f"*.on-{name(goes)}", 2)]
        cluster.remove_node(goes, allow_graceful=False)
        for unit in there:
            os.kill(process_of(unit, scratch), signal.SIGKILL)
    ran = running.result()
    assert set(ran.final.values()) == {"done"}
    assert set(there) <= set(ran.messages("retry"))
    assert {ran.markers[unit]["info"]["node"] for unit in there} == {name(stays)}


def test_a_node_that_comes_midway_gets_work(add, going, scratch):
    """The units wait until one of them runs on a node that comes once the first has begun."""
    first = add(num_cpus=1)
    with going([Unit(f"u{i}", 1, {"await": ["gate"]}) for i in range(8)]) as running:
        some(scratch, f"*.on-{name(first)}")
        second = add(num_cpus=1)
        some(scratch, f"*.on-{name(second)}")
    ran = running.result()
    assert set(ran.final.values()) == {"done"}
    assert {marker["info"]["node"] for marker in ran.markers.values()} == {name(first), name(second)}


def test_a_unit_that_kills_every_worker_harms_no_other(engine, add, run, scratch):
    add(num_cpus=1)
    add(num_cpus=1)
    units = [Unit(f"u{i:02d}", 1) for i in range(30)]
    units[7] = Unit("deadly", 1, {"act": "die"})
    units[8] = Unit("deadly too", 1, {"act": "die"})
    ran = run(engine, units, resources=Resources(gpus=0))
    assert {unit: kind for unit, kind in ran.final.items() if kind != "done"} == {
        "deadly": "failed",
        "deadly too": "failed",
    }
    assert all("quarantined: 3 workers" in message for message in ran.messages("failed").values())


def test_workers_share_a_gpu_and_see_it_alone(engine, add, run, scratch):
    """Two GPUs hold four halves; four units run at once, or wait for each other in vain."""
    add(num_cpus=8, num_gpus=2)
    names = [f"u{i}" for i in range(4)]
    units = [Unit(unit, 1, {"await": [f"{other}.computing" for other in names]}) for unit in names]
    ran = run(engine, units, resources=Resources(gpus=0.5))
    assert set(ran.final.values()) == {"done"}
    seen = sorted((m["info"]["gpus"], m["info"]["pid"]) for m in ran.markers.values())
    assert [gpu for gpu, _ in seen] == ["0", "0", "1", "1"]
    assert len({pid for _, pid in seen}) == 4


def test_workers_go_where_labels_and_custom_resources_send_them(engine, add, run):
    add(num_cpus=2, labels={"zone": "a"})
    labelled = add(num_cpus=2, labels={"zone": "b"})
    with_disk = add(num_cpus=2, resources={"disk": 1})
    for where, resources in [
        (labelled, Resources(gpus=0, labels={"zone": "b"})),
        (with_disk, Resources(gpus=0, custom={"disk": 0.5})),
    ]:
        units = [Unit(f"{name(where)}-{i}", 1) for i in range(8)]
        ran = run(engine, units, resources=resources)
        assert {marker["info"]["node"] for marker in ran.markers.values()} == {name(where)}


def test_prometheus_finds_what_the_run_has_done(engine, add, run):
    add(num_cpus=2)
    units = [
        *(Unit(f"u{i}", 3) for i in range(4)),
        Unit("holed", 3, {"broken": 2}),
        Unit("mends", 3, {"act": "raise", "times": 1}),
        Unit("bad", 3, {"act": "value"}),
        Unit("stops", 3, {"act": "stop"}),
    ]
    ran = run(engine, units, resources=Resources(gpus=0), stage="metered")
    expected = {
        "vlcp_units_done": 6,
        "vlcp_units_failed": 1,
        "vlcp_units_retried": 1,
        "vlcp_units_stopped": 1,
        "vlcp_samples": 18,
        "vlcp_samples_failed": 2,
        "vlcp_written_bytes": sum(len(content) for content in ran.files().values()),
        "vlcp_write_seconds": sum(marker["write_seconds"] for marker in ran.markers.values()),
    }
    deadline = time.monotonic() + PATIENCE
    while (found := {key: scrape().get(key, 0.0) for key in expected}) != pytest.approx(expected):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"ray_\w+", query)}
    there = set(re.findall(r'^(\w+)\{[^}]*stage="metered"', metrics(), re.MULTILINE))
    times = {"compute": "seconds", "read": "read_seconds", "wait": "wait_seconds"}  # too short to count, perhaps
    zero = {f"ray_vlcp_{n}_seconds_total" for n, key in times.items() if not sum(m[key] for m in ran.markers.values())}
    assert asked and asked - there <= zero


def metrics() -> str:
    """What Prometheus reads from the driver's node."""
    head = next(node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"])
    url = f"http://{head['NodeManagerAddress']}:{head['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def scrape() -> dict[str, float]:
    """The counters of stage `metered`."""
    found = re.findall(r'^(?:ray_)?(vlcp_\w+?)(?:_total)?\{[^}]*stage="metered"[^}]*\} (\S+)$', metrics(), re.MULTILINE)
    return {key: float(value) for key, value in found}
