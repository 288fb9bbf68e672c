"""The page's section on fine-tuning: loss, learning rate, speed, and sample images after the epochs."""

import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from vlcp_dist.data import storage
from vlcp_dist.report.charts import Line, Style, line_chart, smooth, thin
from vlcp_dist.report.material import Material
from vlcp_dist.report.pictures import data_uri, tile

SHOWN_EPOCHS = 8
COLOR = "#0072b2"


def section(found: Material) -> dict[str, Any] | None:
    """What the template shows, None as long as the training is not finished."""
    if "training.json" not in found.files["finetune"]:
        return None
    folder = found.path("finetune")
    history = json.loads((folder / "training.json").read_text())
    rates = list(enumerate(history["learning_rate"], start=1))
    return {
        "steps": len(history["loss"]),
        "loss": _loss(history["loss"]),
        "learning_rate": _chart([Line("learning rate", thin(rates), Style(COLOR, width=2))], "learning rate", "rate"),
        "speed": _speed(folder),
        "samples": _samples(found, folder),
    }


def _loss(losses: Sequence[float]) -> dict[str, Any]:
    """The loss of every step, and its moving mean over 2 % of the steps."""
    window = max(1, len(losses) // 50)
    steps = range(1, len(losses) + 1)
    mean = smooth(losses, window)
    lines = [
        Line("each step", thin(list(zip(steps, losses, strict=True))), Style(COLOR, width=1, opacity=0.3)),
        Line("moving mean", thin(list(zip(steps, mean, strict=True))), Style(COLOR, width=2)),
    ]
    chart = _chart(
        lines, f"loss over {len(losses)} steps, from {mean[0]:.3f} to {mean[-1]:.3f}", "noise-prediction loss"
    )
    return {"chart": chart, "window": window, "first": mean[0], "last": mean[-1]}


def _speed(folder: storage.Location) -> dict[str, Any] | None:
    (content,) = storage.fetch([folder / "speed.json"], missing=b"[]")
    rows = json.loads(content)
    if not rows:
        return None
    points = [(step, rate) for step, rate, _ in rows]
    workers = ", then ".join(str(n) for i, (*_, n) in enumerate(rows) if i == 0 or n != rows[i - 1][2])
    chart = _chart([Line("samples / s", thin(points), Style(COLOR, width=2))], "samples per second", "samples / s")
    return {"chart": chart, "median": statistics.median(rate for _, rate in points), "workers": workers}


def _samples(found: Material, folder: storage.Location) -> dict[str, Any] | None:
    """A row for each description, a column for each of at most SHOWN_EPOCHS epochs, the last one among them."""
    names = set(storage.listing(folder / "samples"))
    epochs = sorted({int(match[1]) for name in names if (match := re.fullmatch(r"epoch=(\d+)/\d+\.png", name))})
    if not epochs or "prompts.json" not in names:
        return None
    count = min(SHOWN_EPOCHS, len(epochs))
    shown = sorted(epochs[-1 - i * len(epochs) // count] for i in range(count))
    rows = []
    for i, prompt in enumerate(json.loads((folder / "samples" / "prompts.json").read_text())):
        files = [f"epoch={epoch:03d}/{i}.png" for epoch in shown]
        cells = [_uri(found, folder / "samples" / name) if name in names else None for name in files]
        rows.append({**prompt, "cells": cells})
    return {"epochs": shown, "rows": rows}


def _uri(found: Material, path: storage.Location) -> str:
    with path.open("rb") as file, Image.open(file) as image:
        return data_uri(tile(image), found.tile_size)


def _chart(lines: Sequence[Line], what: str, y_label: str) -> Markup:
    return line_chart(lines, description=f"Fine-tuning: {what}", x_label="step", y_label=y_label)
