"""What several tests share: a configuration that runs every stage in seconds."""

import os
from pathlib import Path

import pytest

from vlcp_dist import config

# No statistics are sent from tests, and Ray's own log lines stay out of the output.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")

MICRO = Path(__file__).parent / "micro.yaml"


@pytest.fixture
def micro(tmp_path):
    """micro(*overrides) -> Config, in a folder of its own."""

    def load(*overrides: str, root: Path = tmp_path / "run") -> config.Config:
        return config.load(MICRO, [f"root={root}", "engine.kind=serial", *overrides])

    return load
