"""Fine-tuning on two processes with DeepSpeed, stopped and gone on with on one, is that of one process all along."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from vlcp_dist.data import checkpoints
from vlcp_dist.stages import finetune

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SETTINGS = ["finetune.epochs=3", "finetune.micro_batch_size=3", "finetune.warmup_steps=6", "finetune.text_dropout=0.2"]
SETTINGS += ["finetune.sample_images=1", "finetune.checkpoint_every=5"]
# What a launcher does: the same program in every process. Each prints what accelerate says it runs, and its losses.
PROGRAM = """
import json, sys
import torch
from vlcp_dist import config, errors, pipeline
from vlcp_dist.models import unet_trainer
from vlcp_dist.stages import base, finetune

torch.set_num_threads(1)
path, stop_at, *overrides = sys.argv[1:]
cfg = config.load(path, overrides)
run = base.make_run(cfg, pipeline.stages(cfg))
worker, (unit,) = finetune.Worker(run), finetune.units(run)
trainers = []
step = unet_trainer.Trainer.step

def stopping_step(self, *arguments, stop):
    trainers.append(self)
    return step(self, *arguments, stop=self.rank == 1 and self.step_number == int(stop_at) - 1)

unet_trainer.Trainer.step = stopping_step
try:
    worker.process(unit, None)
except errors.Stopped:
    pass
trainer = trainers[0]
print(json.dumps({
    "type": str(trainer.accelerator.distributed_type), "processes": trainer.world, "losses": trainer.losses,
    "stage": trainer.accelerator.deepspeed_plugin.zero_stage,
    "state": sum(p.numel() for p in trainer._inner_optimizer.single_partition_of_fp32_groups),
    "weights": sum(p.numel() for p in trainer.unet.parameters()),
}))
"""


def on_two_processes(config: Path, stop_at: int, *overrides: str) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(config), str(stop_at), *overrides],
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_zero_1_on_two_processes_goes_on_in_one(run_with, tmp_path):
    """Process 1 asks for a stop after step 8, amid an epoch; both save, and one process ends the training."""
    quiet = run_with(*SETTINGS)
    folder, (unit,) = quiet.folders["finetune"].path, finetune.units(quiet)
    worker = finetune.Worker(quiet)
    files = worker.process(unit, None).files
    expected, average = json.loads(files["training.json"])["loss"], load_file(files[WEIGHTS])
    for name in checkpoints.names(folder):
        (folder / name).unlink()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(quiet.cfg.model_dump()))
    both = on_two_processes(config, 8, "finetune.strategy=deepspeed", "finetune.deepspeed=zero1")
    for one in both:
        assert one["type"] == "DistributedType.DEEPSPEED" and (one["processes"], one["stage"]) == (2, 1)
        assert 0.5 * one["weights"] <= one["state"] < 0.51 * one["weights"]  # each keeps half of the optimizer
        assert one["losses"] == pytest.approx(expected[:8], rel=1e-5)
    saved = checkpoints.newest(folder)
    assert (saved["step"], saved["workers"]) == (8, 2)
    resumed = finetune.Worker(quiet)  # its files live as long as it does
    outcome = resumed.process(unit, None)
    assert outcome.info["resumed_at_step"] == 8 and outcome.info["workers"] == 1
    assert json.loads(outcome.files["training.json"])["loss"] == pytest.approx(expected, rel=1e-4)
    again, start = load_file(outcome.files[WEIGHTS]), load_file(Path(quiet.diffusion_model) / WEIGHTS)
    apart, moved = (sum((a[k] - b[k]).square().sum() for k in a) for a, b in ((again, average), (average, start)))
    assert apart < 1e-4 * moved
