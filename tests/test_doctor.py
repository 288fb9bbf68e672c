"""`vlcp doctor`, and what `vlcp run` says before it starts, on a simulated cluster of two nodes: real raylets.

A root below /proc/self/cwd is another folder for a node that was started in another one: storage that is not shared.
"""

import contextlib
import json
import re
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
from vlcp_dist.doctor import Check, checks, examine
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import ConfigError, InputError
from vlcp_dist.models.tiny_llava import build_tiny_llava


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Where the head is started."""
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def cluster(here, tmp_path_factory):
    """A head and a node that was started in another folder."""
    with contextlib.chdir(here):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def bad(cfg) -> dict[str, Check]:
    return {check.name: check for check in examine(cfg).checks if not check.ok}


def refused(cfg) -> str:
    """What `run` says before any unit is begun."""
    with pytest.raises(InputError) as caught:
        pipeline.run(cfg, Progress())
    assert not list(Path(cfg.root).glob("*/done/*"))
    return str(caught.value)


def test_a_cluster_that_is_not_there(micro):
    with pytest.raises(InputError, match=r"no Ray cluster at 127\.0\.0\.1:1 \(engine\.address"):
        examine(micro("engine={address: '127.0.0.1:1'}"))


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


def test_what_is_not_shared(cluster, here, micro, tmp_path, monkeypatch):
    """Of the head and this process, by their folder: the root, and the images. And weights that no node would load."""
    monkeypatch.chdir(here)
    (here / "images" / "a").mkdir(parents=True)
    build_tiny_llava(tmp_path / "llava")
    (tmp_path / "llava" / "model.safetensors").rename(tmp_path / "llava" / "pytorch_model.bin")
    images = ["engine.kind=ray", "data.source=imagefolder", "data.path=/proc/self/cwd/images"]
    root = Path("/proc/self/cwd/run")
    found = bad(micro(*images, "caption.captioner=llava", f"caption.model={tmp_path / 'llava'}", root=root))
    assert "2 of 2 nodes do not see" in found["shared storage"].found
    assert "this process does not see what 1 of 2 nodes write" in found["shared storage"].found
    assert "data.path not seen" in found["inputs"].found
    assert "no *.safetensors in" in found["caption.model"].found
    assert "root=/proc/self/cwd/run is not shared: 1 of 1 other nodes do not see" in refused(micro(*images, root=root))
    assert "data.path=/proc/self/cwd/images is not shared" in refused(micro(*images))


def test_a_gpu_where_there_is_none(cluster, micro):
    message = refused(micro("engine.kind=ray", "engine.stages={caption: {gpus_per_worker: 0.5}}"))
    assert re.search(r"caption: a worker needs 0\.5 GPU .* 2 alive nodes with 2 CPUs and no GPU", message)


def test_a_node_unlike_the_others(cluster, micro, tmp_path):
    """It has code of its own, imported before Ray can put the driver's folders first, and GPUs by name only."""
    code = tmp_path / "code"
    shutil.copytree(Path(vlcp_dist.__file__).parent, code / "vlcp_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "vlcp_dist" / "__init__.py").write_text('__version__ = "9.9"\n')
    (code / "sitecustomize.py").write_text("import vlcp_dist\n")
    node = cluster.add_node(num_cpus=1, num_gpus=2, env_vars={"PYTHONPATH": str(code)}).node_id[:8]
    cfg = micro("engine.kind=ray")
    found = bad(cfg)
    assert node in found["code"].node and "vlcp_dist 9.9" in found["code"].found
    assert node in found["GPUs"].node and "Ray counts 2, the driver 0 (nvidia-smi" in found["GPUs"].found
    assert re.search(rf"1 of 2 other nodes run other code[\s\S]*{node}\): vlcp_dist 9\.9 ", refused(cfg))


def test_an_autoscaler_needs_to_know_what_for(micro):
    with pytest.raises(ConfigError, match=r"engine\.autoscaling needs engine\.workers and engine\.gpus_per_worker"):
        micro("engine={autoscaling: true, workers: 8}")
