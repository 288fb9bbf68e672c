"""What tests of whole runs share: the command, and what a run left."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

MICRO = Path(__file__).parent / "micro.yaml"
SMALL = [
    "data.shard_size=8",
    "ipc=[1]",
    "synthesize.strategies=[DCS]",
    "evaluate.baselines=[]",
]  # more units, less work


def artefacts(root: Path) -> dict[str, str]:
    """sha256 of every file that a marker of the run names."""
    return {
        f"{marker.relative_to(root).parts[0]}/{name}": hashlib.sha256(
            (root / marker.relative_to(root).parts[0] / name).read_bytes()
        ).hexdigest()
        for marker in root.glob("*/done/**/*.json")
        for name in json.loads(marker.read_text())["files"]
    }


def markers(root: Path) -> dict[str, float]:
    """When every unit was finished."""
    return {
        str(path.relative_to(root)): json.loads(path.read_text())["finished"] for path in root.glob("*/done/**/*.json")
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vlcp_dist", *arguments]


def vlcp(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
