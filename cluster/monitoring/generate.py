"""Writes grafana.json, the dashboard of a run, from the names in vlcp_dist/engine/metrics.py.

python cluster/monitoring/generate.py > cluster/monitoring/grafana.json
"""

import json
from typing import Any

from vlcp_dist.engine.metrics import COUNTERS, WORKERS

SUMS = [(f"ray_{name}_total", text) for name, text in COUNTERS.items()]


def rate(name: str) -> str:
    return f"sum by (stage) (rate(ray_{name}_total[$__rate_interval]))"


def share(name: str) -> str:
    """Of the time that all workers had."""
    return f"{rate(name)} / sum by (stage) (ray_{WORKERS})"


PANELS = [  # title, unit in Grafana's terms, queries
    ("Workers", "short", [f"sum by (stage) (ray_{WORKERS})"]),
    ("Samples per second", "short", [rate("vlcp_samples")]),
    ("Computing: share of the workers' time", "percentunit", [share("vlcp_compute_seconds")]),
    ("Waiting for data: share of the workers' time", "percentunit", [share("vlcp_wait_seconds")]),
    ("Seconds of reading and writing per second", "short", [rate("vlcp_read_seconds"), rate("vlcp_write_seconds")]),
    ("Bytes written per second", "Bps", [rate("vlcp_written_bytes")]),
    ("Units done", "short", ["sum by (stage) (ray_vlcp_units_done_total)"]),
    ("Attempts repeated", "short", ["sum by (stage) (ray_vlcp_units_retried_total)"]),
    (
        "Units given up or stopped",
        "short",
        ["sum by (stage) (ray_vlcp_units_failed_total)", "sum by (stage) (ray_vlcp_units_stopped_total)"],
    ),
    ("Samples left out", "short", ["sum by (stage) (ray_vlcp_samples_failed_total)"]),
]


def dashboard() -> dict[str, Any]:
    """Two panels in a row, each 12 columns wide."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"h": 8, "w": 12, "x": 12 * (i % 2), "y": 8 * (i // 2)},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + j), "expr": query, "legendFormat": "{{stage}}"}
                for j, query in enumerate(queries)
            ],
        }
        for i, (title, unit, queries) in enumerate(PANELS)
    ]
    return {
        "title": "vlcp_dist",
        "uid": "vlcp-dist",
        "description": "A run of vlcp_dist, by stage. " + "; ".join(f"{name}: {text}" for name, text in SUMS),
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
