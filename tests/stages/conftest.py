"""One small run of every stage in this process, which the tests of the stages share, also under other settings."""

from pathlib import Path

import pytest
import torch

from vlcp_dist import config, pipeline
from vlcp_dist.engine.executor import Event
from vlcp_dist.engine.progress import Progress
from vlcp_dist.engine.serial import SerialEngine
from vlcp_dist.stages import base

MICRO = Path(__file__).parents[1] / "micro.yaml"
SETTINGS = [
    "engine.kind=serial",
    "ipc=[2]",
    "diffusion.dtype=float32",
    "pretrain.vae_steps=40",
    "finetune.epochs=2",
    "synthesize.strategies=[L, L+FK, GGS, DCS, DCS-shuffled]",
    "synthesize.guidance_scale=8.0",
    "synthesize.prototypes_per_unit=6",
    "evaluate.baselines=[k-center, herding, full]",
    "evaluate.epochs={2: 3, 0: 15}",
]


@pytest.fixture(autouse=True)
def one_thread():
    """As in the stages: sums on several threads differ in the last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_with(tmp_path_factory):
    """run_with(*overrides) -> Run, in the folder of a finished run: stages that the overrides leave alone are done."""
    root = tmp_path_factory.mktemp("stages") / "run"

    def load(*overrides: str) -> base.Run:
        cfg = config.load(MICRO, [f"root={root}", *SETTINGS, *overrides])
        return base.make_run(cfg, pipeline.stages(cfg))

    pipeline.run(load().cfg, Progress())
    return load


@pytest.fixture(scope="session")
def whole(run_with) -> base.Run:
    """The finished run."""
    return run_with()


@pytest.fixture
def do():
    """do(run, stage name) -> the events of all its units, run one after the other."""

    def run_stage(run: base.Run, name: str) -> list[Event]:
        stage = next(stage for stage in pipeline.stages(run.cfg) if stage.name == name)
        events: list[Event] = []
        SerialEngine(max_retries=0).run(stage.job(run), stage.units(run), events.append)
        return events

    return run_stage
