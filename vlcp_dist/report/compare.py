"""Several runs side by side: accuracies, the settings they differ in, what each cost; the curve of a sweep."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from markupsafe import Markup

from vlcp_dist.data import storage
from vlcp_dist.errors import InputError
from vlcp_dist.report.charts import Line, Style, key, line_chart
from vlcp_dist.report.page import render
from vlcp_dist.report.results import summarize
from vlcp_dist.report.tables import ipcs_of, spread
from vlcp_dist.schema import REAL_METHODS

# Of up to eight runs, in colours that the colour-blind can tell apart.
STYLES = [
    Style("#d1480a", "circle", width=2.2),
    Style("#0072b2", "square"),
    Style("#00845f", "triangle"),
    Style("#b0468a", "diamond"),
    Style("#8a6d1f", "circle", dash="5 3"),
    Style("#57606a", "square", dash="5 3"),
    Style("#6f42c1", "triangle", dash="5 3"),
    Style("#8f4a2b", "diamond", dash="5 3"),
]
NOT_COMPARED = ("root", "engine", "sweep", "published", "max_failed_samples")


@dataclass(frozen=True)
class Finished:
    """What the report of a run left: records of trainings, rows of stages, its settings by dotted name."""

    name: str
    records: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    settings: dict[str, Any]


def load(report: storage.Location, name: str) -> Finished:
    """Read the folder that `vlcp run` or `vlcp report` wrote.

    Raises:
        InputError: there is no report.
    """
    try:
        records, stages = (json.loads((report / f"{file}.json").read_bytes()) for file in ("results", "stages"))
        settings = yaml.safe_load((report / "config.yaml").read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{report} holds no report ({error}); write it with: vlcp report --config CONFIG") from error
    return Finished(name, records, stages, _flat(settings))


def names_of(roots: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart.

    Raises:
        InputError: a run is named twice.
    """
    if len(set(roots)) < len(roots):
        raise InputError(f"a run is named twice: {' '.join(roots)}")
    parts = [PurePosixPath(root).parts for root in roots]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(roots)


def write(runs: Sequence[Finished], page: storage.Location) -> None:
    """Write the page that compares the runs."""
    context = {
        "runs": [run.name for run in runs],
        "nets": [_net(net, runs) for net in sorted({r["net"] for run in runs for r in run.records})],
        "settings": differences(runs),
        "costs": costs(runs),
    }
    storage.write(page, render("compare.html", context).encode())


def rows_of(net: str, runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """A row for every (run, method) of a net: a cell per IPC with mean, deviation, seeds, and its rank in the column.

    A baseline of real images that has the same result in all runs, as in a sweep, is one row.
    """
    ipcs = ipcs_of(record for run in runs for record in run.records)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for row in summarize([record for record in run.records if record["net"] == net]):
            cell = {name: row[name] for name in ("best_mean", "best_std", "seeds")}
            rows.setdefault((run.name, row["method"]), {"run": run.name, "method": row["method"], "cells": {}})[
                "cells"
            ][row["ipc"]] = {**cell, "text": spread(row["best_mean"], row["best_std"], row["seeds"])}
    merged: list[dict[str, Any]] = []
    for row in rows.values():
        same = [other for other in rows.values() if other["method"] == row["method"] and other["cells"] == row["cells"]]
        if row["method"] not in REAL_METHODS or len(same) < len(runs) or len(runs) == 1:
            merged.append(row)
        elif row is same[0]:
            merged.append(row | {"run": "all runs"})
    for ipc in ipcs:
        means = sorted({round(r["cells"][ipc]["best_mean"], 1) for r in merged if ipc in r["cells"]}, reverse=True)
        for row in merged:
            if ipc in row["cells"] and len(means) > 1:
                row["cells"][ipc]["rank"] = means.index(round(row["cells"][ipc]["best_mean"], 1)) + 1
    return merged


def differences(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """The settings in which the runs differ, by dotted name, with each run's value as text."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = []
    for name in names:
        values = [json.dumps(run.settings.get(name), ensure_ascii=False) for run in runs]
        if len(set(values)) > 1 and name.partition(".")[0] not in NOT_COMPARED:
            rows.append({"name": name, "values": values})
    return rows


def costs(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """Per stage what each run took: worker seconds, GPU hours, samples per worker second."""
    names = list(dict.fromkeys(row["stage"] for run in runs for row in run.stages))
    rows = []
    for name in names:
        cells = []
        for run in runs:
            row = next((row for row in run.stages if row["stage"] == name), None)
            seconds = row["worker_seconds"] if row else 0
            cells.append(row and {**row, "rate": row["samples"] / seconds if seconds else None})
        rows.append({"stage": name, "cells": cells})
    return rows


def _net(net: str, runs: Sequence[Finished]) -> dict[str, Any]:
    rows = rows_of(net, runs)
    return {
        "net": net,
        "ipcs": ipcs_of(record for run in runs for record in run.records if record["net"] == net),
        "rows": rows,
        "by_ipc": _by_ipc(rows),
        "by_value": _by_value(rows),
    }


def _by_ipc(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Top-1 against IPC, a line per run and method; None where there is one IPC, or more lines than styles."""
    lines: list[Line] = []
    for row in rows:
        points = sorted((ipc, cell) for ipc, cell in row["cells"].items() if ipc != "full")
        if len(points) > 1 and len(lines) < len(STYLES):
            style = STYLES[len(lines)]
            means = [(ipc, cell["best_mean"]) for ipc, cell in points]
            lines.append(Line(f"{row['run']}: {row['method']}", means, style, [c["best_std"] for _, c in points]))
    if not lines:
        return None
    ticks = sorted({x for line in lines for x, _ in line.points})
    chart = line_chart(
        lines,
        description="Top-1 accuracy against images per class, a line per run: the table has the numbers",
        x_label="images per class (log scale)",
        y_label="top-1 %",
        x_ticks=ticks,
        log_x=True,
        y_limits=(0, 100),
        y_span=5,
    )
    return {"chart": chart, "legend": _legend(lines)}


def _by_value(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Top-1 against the swept number, a line per method and IPC (Fig. 4); None where the runs are no such sweep."""
    lines: dict[tuple[str, int], list[tuple[float, dict[str, Any]]]] = {}
    setting = ""
    for row in rows:
        name, _, value = row["run"].partition("=")
        try:
            x = float(value)
        except ValueError:
            continue
        setting = name
        for ipc, cell in row["cells"].items():
            lines.setdefault((row["method"], ipc), []).append((x, cell))
    shown = [
        Line(
            f"{method}, IPC {ipc}",
            [(x, cell["best_mean"]) for x, cell in sorted(points, key=lambda p: p[0])],
            style,
            [cell["best_std"] for _, cell in sorted(points, key=lambda p: p[0])],
        )
        for ((method, ipc), points), style in zip(lines.items(), STYLES, strict=False)
        if len(points) > 1
    ]
    if not shown:
        return None
    chart = line_chart(
        shown,
        description=f"Top-1 accuracy against {setting}: the table has the numbers",
        x_label=setting,
        y_label="top-1 %",
        x_ticks=sorted({x for line in shown for x, _ in line.points}),
        y_limits=(0, 100),
        y_span=5,
    )
    return {"setting": setting, "chart": chart, "legend": _legend(shown)}


def _legend(lines: Sequence[Line]) -> list[dict[str, Markup | str]]:
    return [{"name": line.label, "key": key(line.style)} for line in lines]


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat
