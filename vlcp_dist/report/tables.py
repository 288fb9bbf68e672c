"""Numbers and sentences of the page, made from the records of the trainings alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median_low
from typing import Any

from vlcp_dist.report.results import METHOD_ORDER

Record = dict[str, Any]
Summary = dict[str, Any]

ABOUT = {
    "full": "all real training images",
    "random": "real images, chosen at random",
    "k-center": "real images, greedy k-center of latents",
    "herding": "real images, herding of latents",
    "L": "prototype, class name as prompt",
    "L+FK": "prototype, class name and keywords",
    "GGS": "prototype, a sentence of the keywords",
    "DCS": "prototype, the cluster's best description",
    "DCS-shuffled": "control: DCS texts of another class",
}


def spread(average: float, deviation: float, seeds: int) -> str:
    """`90.1 ± 0.4`, or `90.1` where one seed says nothing about the spread."""
    return f"{average:.1f} ± {deviation:.1f}" if seeds > 1 else f"{average:.1f}"


def headline(summaries: Sequence[Summary], strategy: str) -> str | None:
    """One net's result at the smallest IPC in a sentence: the strategy, random real images, all real images."""
    distilled = [row for row in summaries if row["method"] == strategy]
    if not distilled:
        return None
    first = min(distilled, key=lambda row: row["ipc"])
    parts = [f"{strategy} {_percent(first)}"]
    parts += [
        f"{name} {_percent(row)}"
        for method, name in (("random", "random real images"), ("full", "full data"))
        for row in summaries
        if row["method"] == method and row["ipc"] in (first["ipc"], "full")
    ]
    return f"At {first['ipc']} image{'s' * (first['ipc'] > 1)} per class: {', '.join(parts)}."


def published(
    figures: Mapping[Any, Mapping[int, float]], summaries: Sequence[Summary], strategy: str
) -> list[dict[str, Any]]:
    """Of every published figure, what this run measured for the strategy: None where it has not."""
    measured = {(row["net"], row["ipc"]): row for row in summaries if row["method"] == strategy}
    rows = []
    for net, by_ipc in figures.items():
        for ipc, figure in sorted(by_ipc.items()):
            row = measured.get((net, ipc))
            shown = row and {
                "best": spread(row["best_mean"], row["best_std"], row["seeds"]),
                "difference": row["best_mean"] - figure,
            }
            rows.append({"net": net, "ipc": ipc, "published": figure, "measured": shown})
    return rows


def ipcs_of(summaries: Iterable[Summary]) -> list[int]:
    return sorted({row["ipc"] for row in summaries if row["ipc"] != "full"})


def methods_of(summaries: Iterable[Summary]) -> list[str]:
    found = {row["method"] for row in summaries}
    return [method for method in METHOD_ORDER if method in found]


def accuracy_table(summaries: Sequence[Summary]) -> dict[str, Any]:
    """One net's rows (methods) and columns (IPC). `*_rank` is 1 for the best of a column, 2 for the second."""
    ipcs = ipcs_of(summaries)
    places = {(row["method"], row["ipc"]): row for row in summaries}
    most = max((row["seeds"] for row in summaries), default=0)
    ranks = {name: {ipc: _ranks(summaries, ipc, name) for ipc in ipcs} for name in ("best", "last")}

    def cell(row: Summary | None) -> dict[str, Any] | None:
        if row is None:
            return None
        made = {"seeds": row["seeds"] if row["seeds"] < most else None}
        for name in ("best", "last"):
            made[name] = spread(row[f"{name}_mean"], row[f"{name}_std"], row["seeds"])
            made[f"{name}_rank"] = ranks[name].get(row["ipc"], {}).get(row["method"])
        return made

    return {
        "ipcs": ipcs,
        "rows": [
            {
                "method": method,
                "about": ABOUT[method],
                "cells": [cell(places.get((method, ipc))) for ipc in ipcs],
            }
            for method in methods_of(summaries)
            if method != "full"
        ],
        "full": cell(places.get(("full", "full"))),
        "full_images": next((row["train_images"] for row in summaries if row["method"] == "full"), None),
        "seeds": most,
    }


def protocol_text(records: Sequence[Record]) -> str:
    """The protocol of some trainings: what they share once, what depends on the IPC by IPC."""
    parts = []
    for name in records[0]["protocol"]:
        values: dict[str, list[str]] = {}
        for record in records:
            ipcs = values.setdefault(_plain(record["protocol"][name]), [])
            if str(record["ipc"]) not in ipcs:
                ipcs.append(str(record["ipc"]))
        if name in ("net", "name") or list(values) == ["None"]:
            continue
        label = name.replace("_", " ")
        if len(values) == 1:
            parts.append(f"{label} {next(iter(values))}")
        else:
            by_ipc = "; ".join(f"{value} at {_ipc_names(ipcs)}" for value, ipcs in values.items())
            parts.append(f"{label} {by_ipc}")
    return f"{_listed(sorted({record['protocol']['name'] for record in records}))}: {', '.join(parts)}"


def text_effect(summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """DCS minus every other strategy, from the same prototypes and noise: top-1 points, best epoch, one net.

    A difference is `beyond_noise` when it is more than twice its standard error over the seeds.
    """
    places = {(row["method"], row["ipc"]): row for row in summaries}
    rows = []
    for other in ("L", "L+FK", "GGS", "DCS-shuffled"):
        cells = {
            ipc: _difference(places["DCS", ipc], places[other, ipc])
            for ipc in ipcs_of(summaries)
            if ("DCS", ipc) in places and (other, ipc) in places
        }
        if cells:
            average = mean(cell["points"] for cell in cells.values())
            rows.append({"other": other, "cells": cells, "mean": average})
    if not rows:
        return None
    prompts = [row for row in rows if row["other"] != "DCS-shuffled"]
    shuffled = [row for row in rows if row["other"] == "DCS-shuffled"]
    sentences = [_prompt_sentence(prompts)] if prompts else []
    sentences += [_shuffled_sentence(shuffled[0])] if shuffled else []
    return {"rows": rows, "ipcs": sorted({ipc for row in rows for ipc in row["cells"]}), "sentences": sentences}


def recognised(records: Iterable[Record]) -> dict[str, Any] | None:
    """Share of distilled images that one net, trained on all real images, gives their own class; mean over seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if "recognised" in record:
            found.setdefault((record["method"], record["ipc"]), []).append(record["recognised"])
    if not found:
        return None
    ipcs = sorted({ipc for _, ipc in found})
    strategies = [method for method in METHOD_ORDER if any(method == strategy for strategy, _ in found)]
    return {
        "ipcs": ipcs,
        "rows": [
            {"strategy": s, "cells": [mean(found[s, ipc]) if (s, ipc) in found else None for ipc in ipcs]}
            for s in strategies
        ],
    }


def per_class(records: Sequence[Record], ipc: int, limit: int) -> dict[str, Any]:
    """Accuracy of each class after the last epoch, mean over seeds, of the trainings at an IPC and on all data."""
    accuracies = {}
    for method in methods_of(records):
        lists = [r["per_class"] for r in records if r["method"] == method and r["ipc"] in (ipc, "full")]
        if lists:
            shown = list(zip(*lists, strict=True))[:limit]
            accuracies[method] = [None if None in seeds else mean(seeds) for seeds in shown]
    known = [value for values in accuracies.values() for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    rows = [
        {"method": method, "cells": [_shade(value, low, high) for value in values]}
        for method, values in accuracies.items()
    ]
    return {"ipc": ipc, "rows": rows, "low": low, "high": high}


def median_run(records: Iterable[Record]) -> Record:
    """The training whose best top-1 is the median of its seeds (the lower one of two)."""
    listed = list(records)
    middle = median_low(record["top1_best"] for record in listed)
    return next(record for record in listed if record["top1_best"] == middle)


def _percent(row: Summary) -> str:
    return f"{spread(row['best_mean'], row['best_std'], row['seeds'])} %"


def _ranks(summaries: Iterable[Summary], ipc: int, name: str) -> dict[str, int]:
    """Rank by what the page prints, so that equal numbers get equal marks."""
    shown = {row["method"]: round(row[f"{name}_mean"], 1) for row in summaries if row["ipc"] == ipc}
    order = sorted(set(shown.values()), reverse=True)
    return {method: order.index(value) + 1 for method, value in shown.items() if len(shown) > 1}


def _difference(a: Summary, b: Summary) -> dict[str, Any]:
    points = a["best_mean"] - b["best_mean"]
    if min(a["seeds"], b["seeds"]) < 2:
        return {"points": points, "error": None, "beyond_noise": False}
    error = math.sqrt(a["best_std"] ** 2 / a["seeds"] + b["best_std"] ** 2 / b["seeds"])
    return {"points": points, "error": error, "beyond_noise": abs(points) > 2 * error}


def _prompt_sentence(rows: Sequence[dict[str, Any]]) -> str:
    names = {"L": "the class name alone", "L+FK": "class name and keywords", "GGS": "a sentence of the keywords"}
    parts = [
        f"{signed(row['mean'])} points against {names[row['other']]} ({row['other']}{_clear(row)})" for row in rows
    ]
    return f"Averaged over the IPCs, the text prototypes (DCS) change top-1 by {_listed(parts)}."


def _shuffled_sentence(row: dict[str, Any]) -> str:
    cells = list(row["cells"].values())
    losses = [cell["beyond_noise"] and cell["points"] > 0 for cell in cells]
    if all(losses):
        meaning = "what the images show follows the text"
    elif any(losses):
        meaning = f"what the images show follows the text, clearly at {sum(losses)} of {len(losses)} IPCs"
    elif all(cell["error"] is None for cell in cells):
        meaning = "from one seed, so how much of it is chance is not known"
    else:
        meaning = "at no IPC a clear loss, so no sign that the text changes what classifiers learn"
    change = signed(-row["mean"])
    return f"Shuffling the same texts between classes (DCS-shuffled) changes it by {change} points: {meaning}."


def _clear(row: dict[str, Any]) -> str:
    cells = list(row["cells"].values())
    if all(cell["error"] is None for cell in cells):
        return ""
    return f"; clear at {sum(cell['beyond_noise'] for cell in cells)} of {len(cells)} IPCs"


def signed(points: float) -> str:
    text = f"{points:+.1f}".replace("-", "−")
    return "±0.0" if text in ("+0.0", "−0.0") else text


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "–".join(_plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ipc_names(ipcs: Sequence[str]) -> str:
    numbers = [ipc for ipc in ipcs if ipc != "full"]
    names = [f"IPC {', '.join(numbers)}"] if numbers else []
    return " and ".join([*names, *(["full data"] if "full" in ipcs else [])])


def _shade(value: float | None, low: float, high: float) -> dict[str, str]:
    """Text and background of a heat map's cell: white for the lowest, light blue for the highest."""
    if value is None:
        return {"text": "–", "color": "#fff"}
    share = (value - low) / (high - low) if high > low else 1.0
    red, green, blue = (round(255 + (end - 255) * share) for end in (126, 182, 222))
    return {"text": f"{value:.0f}", "color": f"#{red:02x}{green:02x}{blue:02x}"}
