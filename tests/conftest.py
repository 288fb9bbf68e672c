"""What several tests share: a configuration that runs every stage in seconds, and an S3 bucket."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import s3
from runs import MICRO, SMALL, vlcp
from vlcp_dist import config

# No statistics are sent from tests, and Ray's own log lines stay out of the output.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")


@pytest.fixture
def micro(tmp_path):
    """micro(*overrides) -> Config, in a folder of its own."""

    def load(*overrides: str, root: Path | str = tmp_path / "run") -> config.Config:
        return config.load(MICRO, [f"root={root}", "engine.kind=serial", *overrides])

    return load


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server that runs for the whole session, started by the first test that wants it."""
    with s3.server() as address:
        yield address


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch) -> str:
    """The URL of a new bucket. Processes and Ray workers started by the test find the server by their environment."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("VLCP_CACHE", str(tmp_path / "cache"))
    S3FileSystem.clear_instance_cache()  # an instance keeps the address that it was made with
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def small_reference(tmp_path_factory) -> Path:
    """A quiet run of runs.SMALL without Ray, and its files."""
    root = tmp_path_factory.mktemp("small") / "run"
    vlcp("run", "-c", str(MICRO), f"root={root}", "engine=serial", *SMALL)
    return root
