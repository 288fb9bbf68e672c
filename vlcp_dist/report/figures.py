"""The charts of the page: accuracy against IPC, and the trainings."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vlcp_dist.report.charts import Line, Style, key, line_chart
from vlcp_dist.report.tables import ipcs_of, median_run, methods_of

# Colours that the colour-blind can tell apart, each at least 3:1 against white; baselines of real images are dashed.
STYLES = {
    "full": Style("#57606a", dash="2 3"),
    "random": Style("#6e7781", "circle", dash="5 3"),
    "k-center": Style("#8a6d1f", "square", dash="5 3"),
    "herding": Style("#8f4a2b", "triangle", dash="5 3"),
    "L": Style("#0072b2", "square"),
    "L+FK": Style("#00845f", "triangle"),
    "GGS": Style("#b0468a", "diamond"),
    "DCS": Style("#d1480a", "circle", width=2.4),
    "DCS-shuffled": Style("#6f42c1", "diamond", dash="1.5 2.5"),
}


def legend(methods: Sequence[str]) -> list[dict[str, Any]]:
    return [{"name": "full data" if m == "full" else m, "key": key(STYLES[m])} for m in methods]


def accuracy_by_ipc(summaries: Sequence[dict[str, Any]]) -> Markup | None:
    """Best top-1 against IPC with standard deviations, full data as a level; None for fewer than two IPCs."""
    ipcs = ipcs_of(summaries)
    if len(ipcs) < 2:
        return None
    lines, levels = [], []
    for method in methods_of(summaries):
        rows = [row for row in summaries if row["method"] == method]
        if method == "full":
            levels.append(Line("full data", [(ipcs[0], rows[0]["best_mean"])], STYLES["full"]))
            continue
        points = [(row["ipc"], row["best_mean"]) for row in rows]
        lines.append(Line(method, points, STYLES[method], [row["best_std"] for row in rows]))
    return line_chart(
        lines,
        description=f"Top-1 accuracy against images per class, {', '.join(map(str, ipcs))}: the table has the numbers",
        x_label="images per class (log scale)",
        y_label="top-1 %",
        x_ticks=ipcs,
        log_x=True,
        y_limits=(0, 100),
        y_span=5,
        levels=levels,
    )


def training_curves(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every IPC, and for the full data, the median seed's top-1 during the training, a line per method."""
    groups = [(f"IPC {ipc}", [r for r in records if r["ipc"] == ipc]) for ipc in ipcs_of(records)]
    groups.append(("full data", [r for r in records if r["ipc"] == "full"]))
    return [{"title": title, "chart": _curves(title, group)} for title, group in groups if group]


def _curves(title: str, records: Sequence[dict[str, Any]]) -> Markup:
    lines = []
    for method in methods_of(records):
        run = median_run(r for r in records if r["method"] == method)
        style = STYLES[method]
        points = [(point["epoch"], point["top1"]) for point in run["curve"]]
        lines.append(Line(method, points, Style(style.color, dash=style.dash, width=style.width)))
    return line_chart(
        lines,
        description=f"Top-1 accuracy during the training, {title}: {', '.join(line.label for line in lines)}",
        x_label="epoch",
        y_label="top-1 %",
        y_limits=(0, 100),
        y_span=5,
    )
