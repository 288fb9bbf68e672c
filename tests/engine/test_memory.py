"""Ray kills a worker before its node is out of memory: a death like any other. Ray is told of a limit close by."""

import pytest
import ray
from misbehaving import attempts
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.executor import Resources
from vlcp_dist.engine.pool import RayEngine

GIB = 2**30


@pytest.fixture
def engine():
    limit, used = get_system_memory(), get_used_memory()
    if limit - used < 6 * GIB:
        pytest.skip("takes up to 3 GiB of memory, and 6 are not free")
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        _system_config={"memory_usage_threshold": (used + 2 * GIB) / limit, "memory_monitor_refresh_ms": 100},
    )
    engine = RayEngine(max_retries=2, start_timeout=60)
    yield engine
    engine.close()
    ray.shutdown()


def test_a_unit_that_runs_out_of_memory_is_tried_again(engine, run):
    units = [Unit("a", 1), Unit("eats", 1, {"act": "eat", "times": 1}), Unit("b", 1)]
    ran = run(engine, units, resources=Resources(workers=1, gpus=0))
    assert set(ran.final.values()) == {"done"}
    assert "running low on memory" in ran.messages("retry")["eats"]
    assert attempts(ran.scratch, "eats") == 2
