"""Fine-tuning on Ray Train loses a worker and ends with the losses of a quiet run in one process."""

import json
import os
import shutil
import signal

import psutil
import pytest

from vlcp_dist import pipeline
from vlcp_dist.stages import finetune

SETTINGS = ["finetune.epochs=10", "finetune.warmup_steps=10", "finetune.text_dropout=0.2", "finetune.sample_images=0"]
SETTINGS += ["finetune.checkpoint_every=3", "finetune.micro_batch_size=3", "engine.kind=ray"]
SETTINGS += ["finetune.strategy=deepspeed", "finetune.deepspeed=zero2", "finetune.elastic=true"]


@pytest.fixture
def two_cpus():
    import ray

    ray.init(address="local", num_cpus=2, logging_level="WARNING")
    yield
    ray.shutdown()


class Killer:
    """Asked once a second while the training runs: kills one of its processes."""

    def __init__(self, folder):
        self._folder = folder
        self.killed = 0

    def __call__(self) -> bool:
        beat = self._folder.last_heartbeat() or {}
        if not self.killed and beat.get("phase") == "unet" and beat["step"] > 4:
            workers = [
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            self.killed = len(workers)
            os.kill(workers[0].pid, signal.SIGKILL)
        return False


def test_a_lost_worker_leaves_no_trace_in_the_losses(two_cpus, run_with):
    """Of the four workers asked for there is room for two; ZeRO-2 in them, plain PyTorch in the run to compare with."""
    run = run_with(*SETTINGS, "finetune.workers=4")
    stage, folder = finetune.STAGE, run.folders["finetune"]
    (unit,) = stage.units(run)
    quiet = run_with(*SETTINGS, "finetune.strategy=ddp", "engine.kind=serial")
    assert quiet.folders["finetune"].path == folder.path
    expected = json.loads(finetune.Worker(quiet).process(unit, None).files["training.json"])
    shutil.rmtree(folder.path)
    killer, events = Killer(folder), []
    with pipeline.Engines(run.cfg) as engines:
        engines.start((), print)
        engines.run(run, stage, [unit], events.append, killer)
    assert [event.kind for event in events] == ["done"], events[-1].message
    info = events[0].marker["info"]
    assert killer.killed == 2 and info["workers"] == 2 and info["resumed_at_step"] > 0
    history = json.loads((folder.path / "training.json").read_text())
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert history["learning_rate"] == expected["learning_rate"]
    assert not [path for path in folder.path.iterdir() if path.name.startswith(("checkpoint-", "inputs-"))]
