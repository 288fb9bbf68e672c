"""quality: top-1 on held-out real images of nets trained on what each method leaves, at IPC 1, 10 and 50, three seeds.

Whole runs, which take long, in `runs/`; one that is there already is gone on with. `ours` is the mean over the
seeds, the baseline random real images.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from vlcp_dist import config, pipeline, report

CONFIGS = Path(__file__).parents[1] / "configs"


def measure() -> list[dict[str, Any]]:
    return [*digits(), *cifar10_mini()]


def digits() -> list[dict[str, Any]]:
    """scikit-learn's digits, with the settings of the demo."""
    return _run("demo", "ipc=[1,10,50]", "root=runs/digits", "evaluate.epochs={0: 12, 1: 150, 10: 55, 50: 25}")


def cifar10_mini() -> list[dict[str, Any]]:
    """Left out where the images are not at hand; the configuration says where they are looked for."""
    path = config.load(CONFIGS / "cifar10-mini.yaml").data.path
    if not Path(path or "").is_dir():
        sys.stderr.write(f"quality.cifar10_mini is left out: there is no folder {path}\n")
        return []
    return _run("cifar10-mini")


def _run(name: str, *overrides: str) -> list[dict[str, Any]]:
    """`vlcp run` to its end; a row for every IPC and method."""
    path = CONFIGS / f"{name}.yaml"
    subprocess.run([sys.executable, "-m", "vlcp_dist", "run", "--config", str(path), *overrides], check=True)
    cfg = config.load(path, list(overrides))
    rows = report.summarize(report.results(pipeline.status(cfg)))
    random = {row["ipc"]: row["best_mean"] for row in rows if row["method"] == "random"}
    return [_row(Path(cfg.root).name, row, random.get(row["ipc"])) for row in rows]


def _row(name: str, row: dict[str, Any], random: float | None) -> dict[str, Any]:
    return {
        "name": f"quality.{name}.{row['ipc']}.{row['method']}",
        "ours": row["best_mean"],
        "baseline": random,
        "ratio": row["best_mean"] / random if random else None,
        "unit": "top-1 %",
        "note": f"± {row['best_std']:.2f} over {row['seeds']} seeds, {row['net']}, {row['train_images']} images",
    }
