"""The whole pipeline: the same bytes from every engine, through kills and restarts, and nothing done twice."""

import json
import os
import re
import signal
import subprocess

import pytest

from runs import MICRO, artefacts, command, markers, vlcp
from vlcp_dist import config, pipeline
from vlcp_dist.engine.progress import Progress

STAGES = [
    "index", "caption", "pretrain", "encode", "pack", "finetune", "prototypes", "synthesize", "baselines", "evaluate",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A quiet run without Ray."""
    root = tmp_path_factory.mktemp("reference") / "run"
    pipeline.run(config.load(MICRO, [f"root={root}", "engine.kind=serial"]), Progress())
    return root


def test_every_stage_leaves_its_artefacts(reference):
    files = artefacts(reference)
    stages = {name.split("-")[0] for name in files}
    assert stages == set(STAGES)
    images = [name for name in files if name.endswith(".png")]
    assert len(images) == 2 * (1 + 2) * 10  # two strategies, IPC 1 and 2, ten classes
    (model,) = reference.glob("pretrain-*/model")
    widths = [json.loads((model / part / "config.json").read_text())["block_out_channels"] for part in ("vae", "unet")]
    assert widths == [[8, 16, 16], [16, 32]]  # as micro.yaml has them
    assert not list(reference.glob("**/.*.tmp"))
    assert not [path for name in ("checkpoint*", "inputs-*") for path in reference.glob(f"finetune-*/{name}")]


def test_the_longest_units_are_done_first(reference):
    done = [json.loads(path.read_text()) for path in reference.glob("evaluate-*/done/**/*.json")]
    images = [marker["n_in"] for marker in sorted(done, key=lambda marker: marker["finished"])]
    assert images == sorted(images, reverse=True) and len(set(images)) > 1


def test_ray_gives_the_bytes_of_the_serial_engine(reference, tmp_path):
    vlcp("run", "-c", str(MICRO), f"root={tmp_path / 'run'}", "engine.workers=2")
    assert artefacts(tmp_path / "run") == artefacts(reference)


def test_models_from_folders_take_the_place_of_what_the_demo_makes(reference, tmp_path):
    """LLaVA and Stable Diffusion as a user has them: here tiny ones of the same architectures, loaded the same way."""
    from vlcp_dist.models.tiny_llava import build_tiny_llava

    build_tiny_llava(tmp_path / "llava")
    root, model = tmp_path / "run", next(reference.glob("pretrain-*/model"))
    overrides = ["caption.captioner=llava", f"caption.model={tmp_path / 'llava'}", "caption.max_new_tokens=12"]
    overrides += ["pretrain=null", f"diffusion.model={model}", "max_failed_samples=120"]
    cfg = config.load(MICRO, [f"root={root}", "engine.kind=serial", "ipc=[1]", "evaluate.baselines=[]", *overrides])
    states = pipeline.run(cfg, Progress())
    assert [state.stage.name for state in states] == [s for s in STAGES if s != "pretrain"]
    latents = {name.split("/")[1]: digest for name, digest in artefacts(reference).items() if name.startswith("encode")}
    assert {name.split("/")[1]: d for name, d in artefacts(root).items() if name.startswith("encode")} == latents
    assert len(list(root.glob("synthesize-*/DCS/ipc=1/train/*/0000-0.png"))) == 10


def test_missing_weights_are_one_clear_error(tmp_path):
    overrides = ["pretrain=null", f"diffusion.model={tmp_path / 'absent'}", "engine.kind=serial"]
    result = vlcp("run", "-c", str(MICRO), f"root={tmp_path / 'run'}", *overrides, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "absent") in result.stderr and "hf download" in result.stderr
    assert "Traceback" not in result.stderr


def test_killed_three_times_and_still_the_same_bytes(reference, tmp_path):
    root = tmp_path / "run"
    arguments = ["run", "-c", str(MICRO), f"root={root}", "--progress-interval", "0.2"]
    kept: dict[str, float] = {}
    # By step 10 the checkpoint of step 4 is there: that of step 6, or the next, has waited for it.
    for moment in (r"caption: [1-4] of 5", r"finetune: .*unet step \d\d+/", r"synthesize: [1-5] of 6"):
        process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
        seen = False
        for line in process.stderr:
            if re.search(moment, line):
                seen = True
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL and seen, f"{moment} was never printed"
        now = markers(root)
        assert kept.items() <= now.items()
        kept = now
    vlcp(*arguments)
    assert artefacts(root) == artefacts(reference)
    assert kept.items() <= markers(root).items()
    unet = json.loads(next(root.glob("finetune-*/done/unet.json")).read_text())
    assert unet["info"]["resumed_at_step"] > 0


def test_a_second_run_does_nothing_and_a_larger_ipc_only_the_difference(reference):
    before = markers(reference)
    again = vlcp("run", "-c", str(MICRO), f"root={reference}", "engine.kind=serial")
    assert markers(reference) == before
    assert again.stderr.count("were done before") == len(STAGES)
    vlcp("run", "-c", str(MICRO), f"root={reference}", "engine.kind=serial", "ipc=[1,2,3]")
    after = markers(reference)
    assert before.items() <= after.items()
    new = {name for name in after if name not in before}
    assert all("ipc=3" in name for name in new)
    assert {name.split("-")[0] for name in new} == {"prototypes", "synthesize", "baselines", "evaluate"}
    infos = [json.loads((reference / name).read_text())["info"] for name in new if name.startswith("prototypes")]
    assert len(infos) == 10 and all(info["lof"] == 0 for info in infos)  # a unit of each class, and no outlier sought


def test_a_deleted_file_is_made_again_and_nothing_else(reference):
    before, files = markers(reference), artefacts(reference)
    victim = next(reference.glob("caption-*/000002.tar"))
    victim.unlink()
    state = vlcp("status", "-c", str(MICRO), f"root={reference}", "--json", check=False)
    assert state.returncode == 1
    assert {row["stage"]: row["done"] for row in json.loads(state.stdout)}["caption"] == 4
    vlcp("run", "-c", str(MICRO), f"root={reference}", "engine.kind=serial")
    after = markers(reference)
    assert {name for name in after if after[name] != before[name]} == {f"{victim.parent.name}/done/000002.json"}
    assert artefacts(reference) == files


def test_status_plan_and_report_speak_json(reference):
    arguments = ["-c", str(MICRO), f"root={reference}", "--json"]
    state = json.loads(vlcp("status", *arguments).stdout)
    assert [row["stage"] for row in state] == STAGES
    assert all(row["done"] == row["units"] for row in state)
    planned = json.loads(vlcp("plan", *arguments, "ipc=[4]").stdout)
    left = {row["stage"]: row["samples_left"] for row in planned}
    assert left["caption"] == left["finetune"] == 0
    assert left["synthesize"] == 2 * 4 * 10
    assert next(row for row in planned if row["stage"] == "synthesize")["worker_seconds_left"] is None
    results = json.loads(vlcp("report", *arguments).stdout)
    assert {(r["method"], r["ipc"]) for r in results} == {(m, i) for m in ("random", "DCS", "L") for i in (1, 2)}
    assert {"method", "ipc", "net", "protocol", "seed", "top1_best", "top1_last", "train_images"} <= set(results[0])


def test_a_plan_before_anything_ran(tmp_path):
    planned = json.loads(vlcp("plan", "-c", str(MICRO), f"root={tmp_path / 'new'}", "--json").stdout)
    assert planned[0]["units"] == 1
    assert all(row["units"] is None for row in planned[1:])
    assert not (tmp_path / "new").exists()
