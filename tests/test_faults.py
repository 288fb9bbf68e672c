"""What a run survives: each fault is caused for real, and the same command then gives the bytes of a quiet run."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from runs import MICRO, SMALL, artefacts, command, markers, vlcp
from vlcp_dist.data import storage


@pytest.fixture
def copy(small_reference, tmp_path):
    """A finished run that a test may damage."""
    return Path(shutil.copytree(small_reference, tmp_path / "run"))


def until(process: subprocess.Popen, pattern: str) -> str:
    """Read the log of a run up to the line that holds `pattern`."""
    for line in process.stderr:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"{pattern} was never printed, exit code {process.wait()}")


def start(root, *overrides: str, interval: str = "0") -> subprocess.Popen:
    return subprocess.Popen(
        command("run", "-c", str(MICRO), f"root={root}", *SMALL, *overrides, "--progress-interval", interval),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def state_of(root, *arguments: str) -> list[dict]:
    result = vlcp("status", "-c", str(MICRO), f"root={root}", "--json", *SMALL, *arguments, check=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_ctrl_c_once_finishes_what_is_in_flight(small_reference, tmp_path, engine):
    root = tmp_path / "run"
    process = start(root, f"engine.kind={engine}")
    until(process, r"caption: 1 of 15")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, rest = process.communicate()
    assert process.returncode == 130, rest
    assert "in flight" in rest and "the same command goes on" in rest and "Traceback" not in rest
    done = markers(root)
    assert 1 <= sum(name.startswith("caption") for name in done) < 15
    assert not any(name.startswith("encode") for name in done)
    assert json.loads((root / "progress.json").read_text())["state"] == "interrupted"
    vlcp("run", "-c", str(MICRO), f"root={root}", "engine=serial", *SMALL)
    assert done.items() <= markers(root).items()
    assert artefacts(root) == artefacts(small_reference)
    assert json.loads((root / "progress.json").read_text())["state"] == "done"


@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_ctrl_c_in_fine_tuning_writes_a_checkpoint_and_goes_on_from_it(tmp_path, engine):
    root = tmp_path / "run"
    long = ["finetune.checkpoint_every=100000", "finetune.epochs=12"]
    process = start(root, f"engine.kind={engine}", *long, interval="0.2")
    until(process, r"finetune: .*unet step (?!1/)\d+/")
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130, rest
    assert list(root.glob("finetune-*/checkpoint-*.json"))
    arguments = ["-c", str(MICRO), f"root={root}", "engine=serial", *SMALL, *long]
    row = next(r for r in json.loads(vlcp("plan", *arguments, "--json").stdout) if r["stage"] == "finetune")
    assert re.fullmatch(r"\d+ steps", row["rate_from"]) and row["worker_seconds_left"] > 0
    vlcp("run", *arguments, "--only", "finetune")
    (marker,) = root.glob("finetune-*/done/unet.json")
    assert json.loads(marker.read_text())["info"]["resumed_at_step"] > 1


@pytest.mark.parametrize(
    ("moment", "signals", "code"),
    [
        (r"caption: 1 of 15", (signal.SIGINT, signal.SIGINT), 130),
        (r"caption: 1 of 15", (signal.SIGTERM,), 143),
        (r"finetune: .*unet step (?!1/)\d+/", (signal.SIGTERM,), 143),
    ],
)
def test_two_ctrl_c_or_a_sigterm_end_it_at_once(small_reference, tmp_path, moment, signals, code):
    root = tmp_path / "run"
    process = start(root, "finetune.epochs=5000", interval="0.2" if "finetune" in moment else "0")
    until(process, moment)
    for number in signals:
        process.send_signal(number)
    _, rest = process.communicate(timeout=120)  # the training alone would take many times that
    assert process.returncode == code, rest
    assert "what is done stays done" in rest and "Traceback" not in rest
    done = markers(root)
    vlcp("run", "-c", str(MICRO), f"root={root}", "engine=serial", *SMALL, "--only", "caption")
    assert done.items() <= markers(root).items()
    captions = {name: digest for name, digest in artefacts(small_reference).items() if name.startswith("caption")}
    assert captions.items() <= artefacts(root).items()


def test_a_damaged_file_is_named_and_made_again_and_nothing_else(small_reference, copy):
    before = markers(copy)
    cut, gone = next(copy.glob("encode-*/000001.tar")), next(copy.glob("caption-*/000003.tar"))
    cut.write_bytes(cut.read_bytes()[:-512])
    gone.unlink()
    rows = {row["stage"]: row for row in state_of(copy)}
    assert "000001.tar" in rows["encode"]["damaged"]["000001"] and rows["encode"]["done"] == 14
    assert "000003.tar" in rows["caption"]["damaged"]["000003"]
    shown = vlcp("status", "-c", str(MICRO), f"root={copy}", *SMALL, check=False)
    assert shown.returncode == 1 and "000001 will be done again" in shown.stdout
    vlcp("run", "-c", str(MICRO), f"root={copy}", "engine=serial", *SMALL)
    changed = {name.split("/", 1)[1] for name, at in markers(copy).items() if at != before[name]}
    assert changed == {"done/000001.json", "done/000003.json"}
    assert artefacts(copy) == artefacts(small_reference)


def test_verify_finds_a_file_that_was_changed_in_place(small_reference, copy):
    victim = next(copy.glob("synthesize-*/DCS/ipc=1/train/*/0000-0.png"))
    data = bytearray(victim.read_bytes())
    data[-20] ^= 1
    victim.write_bytes(data)
    assert all(row["done"] == row["units"] for row in state_of(copy))
    found = vlcp("status", "-c", str(MICRO), f"root={copy}", "--verify", *SMALL, check=False)
    assert found.returncode == 1 and str(victim) in found.stdout and "delete it" in found.stdout
    victim.unlink()
    vlcp("run", "-c", str(MICRO), f"root={copy}", "engine=serial", *SMALL)
    assert vlcp("status", "-c", str(MICRO), f"root={copy}", "--verify", *SMALL).returncode == 0
    assert artefacts(copy) == artefacts(small_reference)


def test_a_marker_that_was_cut_short_does_not_count(small_reference, copy):
    marker = next(copy.glob("caption-*/done/000002.json"))
    marker.write_bytes(marker.read_bytes()[:40])
    assert "000002" in next(row for row in state_of(copy) if row["stage"] == "caption")["damaged"]
    vlcp("run", "-c", str(MICRO), f"root={copy}", "engine=serial", *SMALL)
    assert artefacts(copy) == artefacts(small_reference)


def test_a_changed_configuration_works_beside_the_old_one(small_reference, copy):
    before = markers(copy)
    vlcp("run", "-c", str(MICRO), f"root={copy}", "engine=serial", "prototypes.contamination=0.2", *SMALL)
    after = markers(copy)
    assert before.items() <= after.items()
    assert {name.split("-")[0] for name in after if name not in before} == {"prototypes", "synthesize", "evaluate"}


def test_the_second_of_two_drivers_is_told_who_holds_the_root(tmp_path):
    root = tmp_path / "run"
    first = start(root, "engine=serial")
    until(first, "index: 1 of 1")
    second = vlcp("run", "-c", str(MICRO), f"root={root}", "engine=serial", *SMALL, check=False)
    assert second.returncode == 1
    assert re.search(rf"in use by .*{first.pid} on .* since 20", second.stderr)
    first.kill()
    first.communicate()
    vlcp("run", "-c", str(MICRO), f"root={root}", "engine=serial", *SMALL, "--max-units", "1")


def test_disk_full(small_reference, tmp_path):
    """A root on a file system that is too small, then large enough."""
    mount = tmp_path / "mount"
    mount.mkdir()
    run = " ".join(command("run", "-c", str(MICRO), f"root={mount}/run", "engine=serial", *(f"'{o}'" for o in SMALL)))
    script = (
        f"mount -t tmpfs -o size=400k tmpfs {mount} || exit 77; {run}; code=$?; "
        f"find {mount} -name '.*.tmp' | grep . && exit 76; "
        f"mount -o remount,size=200m {mount}; {run} || exit 75; cp -r {mount}/run {tmp_path}/copy; exit $code"
    )
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if result.returncode in (1, 77) and not re.search("No space left", result.stderr):
        pytest.skip(f"this machine does not let the test mount a file system of its own: {result.stderr[-200:]}")
    assert result.returncode == 1, result.stderr
    assert "No space left on device" in result.stderr and "Traceback" not in result.stderr
    assert artefacts(tmp_path / "copy") == artefacts(small_reference)


def test_a_trial_of_some_units_measures_the_rates(tmp_path):
    root = tmp_path / "run"
    arguments = ["-c", str(MICRO), f"root={root}", *SMALL, "engine=serial"]
    assert "vlcp run --only index" in vlcp("plan", *arguments).stdout
    vlcp("run", *arguments, "--only", "index")
    assert {name.split("-")[0] for name in markers(root)} == {"index"}
    early = vlcp("run", *arguments, "--only", "encode", check=False)
    assert early.returncode == 1 and "--only pretrain" in early.stderr
    assert "no such stage" in vlcp("run", *arguments, "--only", "captoin", check=False).stderr
    trial = vlcp("run", *arguments, "--max-units", "2")
    assert "pretrain: waits for caption" in trial.stderr and "caption (13 of 15 units)" in trial.stdout
    plan = {row["stage"]: row for row in json.loads(vlcp("plan", *arguments, "--json").stdout)}
    row, marker = plan["caption"], [json.loads(p.read_text()) for p in root.glob("caption-*/done/*.json")]
    assert row["done"] == 2 and row["samples_left"] == 104 and row["rate_from"] == "2 units"
    spent = sum(m["read_seconds"] + m["seconds"] + m["write_seconds"] for m in marker)  # one after the other
    assert row["worker_seconds_left"] == pytest.approx(104 / 16 * spent, abs=0.06)
    written = sum(f["bytes"] for m in marker for f in m["files"].values())
    assert row["bytes_left"] == pytest.approx(104 / 16 * written, abs=1)
    assert plan["encode"]["rate_from"] is None
    assert json.loads((root / "progress.json").read_text())["state"] == "incomplete"


def with_a_failure(marker: Path) -> None:
    """Make a marker say that one sample of its unit had failed."""
    record = json.loads(marker.read_text())
    failed = [{"key": "digit-0-0000", "reason": "of old", "source": "0"}]
    marker.write_text(json.dumps(record | {"n_failed": 1, "n_ok": record["n_in"] - 1, "failed": failed}))


def test_what_is_made_from_a_unit_that_changed_no_longer_counts(copy):
    arguments = ["-c", str(MICRO), f"root={copy}", "engine=serial", *SMALL, "max_failed_samples=5"]
    marker = next(copy.glob("caption-*/done/000000.json"))
    with_a_failure(marker)
    rows = {row["stage"]: row for row in state_of(copy, "max_failed_samples=5")}
    assert rows["caption"]["done"] == 15
    assert {name for name, row in rows.items() if not row["done"]} == {
        "pretrain", "encode", "pack", "finetune", "prototypes", "synthesize", "baselines", "evaluate",
    }  # fmt: skip
    assert all("made from" in why for why in rows["evaluate"]["damaged"].values())
    assert vlcp("status", *arguments, check=False).returncode == 1
    vlcp("run", *arguments, "--only", "caption", "--retry-failed")
    assert json.loads(marker.read_text())["n_failed"] == 0
    assert vlcp("status", *arguments).returncode == 0
    assert not list(copy.glob("*.superseded-1"))


def test_retry_failed_does_not_train_again_for_what_failed_before_it(copy):
    arguments = ["-c", str(MICRO), f"root={copy}", "engine=serial", *SMALL, "max_failed_samples=5"]
    unet = next(copy.glob("finetune-*/done/unet.json"))
    with_a_failure(unet)
    before = markers(copy)
    vlcp("run", *arguments, "--retry-failed")
    assert markers(copy)[str(unet.relative_to(copy))] == before[str(unet.relative_to(copy))]
    assert json.loads(unet.read_text())["n_failed"] == 1


def test_status_is_not_content_above_the_limit(copy):
    with_a_failure(next(copy.glob("evaluate-*/done/**/seed=0.json")))
    shown = vlcp("status", "-c", str(MICRO), f"root={copy}", *SMALL, check=False)
    assert shown.returncode == 1 and "1 samples failed, more than max_failed_samples=0" in shown.stderr


def test_a_run_in_an_object_store_leaves_what_a_local_one_does(small_reference, bucket, tmp_path):
    root = storage.locate(f"{bucket}/run")
    vlcp("run", "-c", str(MICRO), f"root={root}", *SMALL, "engine.workers=2")
    local = tmp_path / "copy"
    for name in storage.listing(root):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes((root / name).read_bytes())
    assert artefacts(local) == artefacts(small_reference)
    again = vlcp("run", "-c", str(MICRO), f"root={root}", *SMALL)
    assert again.stderr.count("were done before") == len({name.split("-")[0] for name in artefacts(local)}) + 1
    assert (root / "report" / "index.html").exists()
    assert vlcp("status", "-c", str(MICRO), f"root={root}", "--verify", *SMALL).returncode == 0
