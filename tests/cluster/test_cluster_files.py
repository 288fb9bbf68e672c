"""The files in cluster/: valid for what reads them, closed to strangers, and nothing that was made is out of date."""

import copy
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
CLOUDS = ["aws.yaml", "gcp.yaml"]


def read(name: str):
    return yaml.safe_load((CLUSTER / name).read_text())


def validate(name: str, content) -> None:
    jsonschema.validate(content, SCHEMA | {"$ref": f"#/definitions/{name}"})


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_takes_the_file(name):
    """As `ray up` does: its defaults are filled in, then its schema is applied."""
    config = prepare_config(read(name))
    validate_config(config)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["available_node_types"]["gpu"]["max_workers"] <= config["max_workers"]
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"min_worker": 1})


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_cluster_lets_in_only_who_has_the_token(name):
    config = read(name)
    starts = [
        line for kind in ("head", "worker") for line in config[f"{kind}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_takes_the_file(name):
    content = read(f"{name}.yaml")
    validate(name, content)
    for key, value in (("rayVersions", "2.60.0"), ("enableInTreeAutoscaling", "yes")):
        wrong = copy.deepcopy(content)
        (wrong["spec"] if name == "raycluster" else wrong["spec"]["rayClusterSpec"])[key] = value
        with pytest.raises(jsonschema.ValidationError):
            validate(name, wrong)


def test_a_job_on_kubernetes_has_the_cluster_that_stays_and_the_environment_of_other_jobs():
    cluster, job = read("raycluster.yaml")["spec"], read("rayjob.yaml")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert job["shutdownAfterJobFinishes"] and job["activeDeadlineSeconds"]
    submitted = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"] == submitted["env_vars"]


def test_pods_have_a_token_no_privileges_and_mount_what_they_name():
    spec = read("raycluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    claims, wall = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert claims["metadata"]["name"] in (CLUSTER / "raycluster.yaml").read_text()
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    assert wall["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_files_agree_on_the_version_of_ray_and_on_the_image():
    pinned = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert read("raycluster.yaml")["spec"]["rayVersion"] == pinned
    images = {
        image
        for path in CLUSTER.glob("*.yaml")
        for image in re.findall(r"REGISTRY/vlcp-dist:\d+\.\d+\.\d+", path.read_text())
    }
    version = re.search(r'^version = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert images == {f"REGISTRY/vlcp-dist:{version}"}


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_scripts_have_the_token_and_a_dashboard_on_loopback(name):
    path = CLUSTER / name
    subprocess.run(["bash", "-n", path], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, path], check=True)
    text = path.read_text()
    assert "RAY_AUTH_MODE=token" in text and "--dashboard-host=127.0.0.1" in text and "umask 077" in text


def test_the_grafana_dashboard_is_what_its_script_writes():
    monitoring = CLUSTER / "monitoring"
    made = runpy.run_path(str(monitoring / "generate.py"))["dashboard"]()
    assert made == json.loads((monitoring / "grafana.json").read_text()), "run cluster/monitoring/generate.py"


def test_every_file_is_in_the_table():
    readme = (CLUSTER / "README.md").read_text()
    for path in set(CLUSTER.iterdir()) - {CLUSTER / "README.md"}:
        assert path.name in readme, path
