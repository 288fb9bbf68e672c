"""Writes the report of a run: `index.html`, a page per class, tables as JSON, and a `config.yaml` that repeats it."""

import json
import platform
import shlex
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from vlcp_dist.data import storage
from vlcp_dist.report import classes, figures, finetuning, material, tables
from vlcp_dist.report.material import Material
from vlcp_dist.report.results import results, summarize
from vlcp_dist.schema import Config
from vlcp_dist.status import StageStatus, failures

LONG = ("curve", "per_class", "classes")  # stay in the records of the evaluate and baselines folders
PACKAGES = ("vlcp-dist", "torch", "diffusers", "transformers", "accelerate", "ray", "numpy", "scikit-learn")
SHOWN_FAILURES = 50
PRETRAIN = {
    "vae_psnr": "VAE PSNR, dB",
    "scaling_factor": "latent scaling factor",
    "text_accuracy": "texts that find their latent, share",
    "vae_seconds": "VAE training, s",
    "text_seconds": "text encoder training, s",
    "unet_parameters": "U-Net parameters",
}


def write(cfg: Config, states: list[StageStatus], name: str = "") -> storage.Location:
    """Write the report of what is finished, of a whole run or of a part of it, and return the path of its page.

    It goes to `<root>/report/`, or to the folder `name` in it. The page loads nothing from elsewhere; it links to one
    for each class. The same run gives the same page.
    """
    folder = storage.locate(cfg.root) / "report" / name
    records = results(states)
    short = [{name: value for name, value in record.items() if name not in LONG} for record in records]
    storage.write(folder / "results.json", (json.dumps(short, indent=1) + "\n").encode())
    rows = [state.summary() for state in states]
    storage.write(folder / "stages.json", (json.dumps(rows, indent=1) + "\n").encode())
    settings = yaml.safe_dump(cfg.model_dump(), sort_keys=False, allow_unicode=True)
    storage.write(folder / "config.yaml", settings.encode())
    found = Material(cfg, states)
    if found.indexed:
        classes.write(found, folder / "classes", render)
    page = folder / "index.html"
    context = _context(found, records, settings)
    context["command"] = f"vlcp run --config {shlex.quote(f'{folder}/config.yaml')}"
    storage.write(page, render("page.html", context).encode())
    return page


def render(template: str, context: dict[str, Any]) -> str:
    """A page of this package's templates."""
    return _environment().get_template(template).render(context) + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vlcp_dist", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"mib": lambda n: f"{n / 2**20:,.1f}", "signed": tables.signed}
    return environment


def _context(found: Material, records: list[dict[str, Any]], settings: str) -> dict[str, Any]:
    cfg, states = found.cfg, list(found.states.values())
    summaries = summarize(records)
    nets = [net for net in cfg.evaluate.nets if _of_net(records, net)]
    stage_rows = [_stage_row(state) for state in states]
    failed = failures(states)
    grid = material.distilled_grid(found) if found.indexed else None
    return {
        "title": _source(cfg),
        "facts": _facts(cfg, found, states),
        "headline": tables.headline(_of_net(summaries, nets[0]), cfg.synthesize.strategies[0]) if nets else None,
        "unfinished": [row for row in stage_rows if row["units"] is None or row["done"] < row["units"]],
        "nets": [_net(net, summaries, records) for net in nets],
        "published": tables.published(cfg.published, summaries, cfg.synthesize.strategies[0]),
        "split": cfg.evaluate.split,
        "grid": grid,
        "strategies": material.strategy_rows(found, grid["ipc"]) if grid else None,
        "texts": material.text_prototypes(found) if found.indexed else None,
        "prototype_settings": cfg.prototypes,
        "outliers": material.outliers(found) if found.indexed else None,
        "tiny": material.is_tiny(found),
        "finetuning": finetuning.section(found),
        "class_names": [material.short_name(info) for info in found.shown] if found.indexed else [],
        "hidden_classes": len(found.classes) - len(found.shown) if found.indexed else 0,
        "stages": stage_rows,
        "failures": failed[:SHOWN_FAILURES],
        "failures_total": len(failed),
        "metrics": _metrics(found),
        "unreadable": found.unreadable,  # after all that reads images
        "settings": settings,
        "versions": [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)],
    }


def _source(cfg: Config) -> str:
    if cfg.data.source == "digits":
        return "scikit-learn digits"
    if isinstance(cfg.data.classes, str):
        return cfg.data.classes
    return PurePosixPath(cfg.data.path or "").name


def _facts(cfg: Config, found: Material, states: list[StageStatus]) -> list[tuple[str, str]]:
    """What was distilled, as name and value."""
    facts = [("source", _source(cfg) if cfg.data.source == "digits" else f"{_source(cfg)} ({cfg.data.source})")]
    if found.indexed:
        sizes = {name: size for name, size in found.split_sizes.items() if size}
        facts.append(("classes", f"{len(found.classes):,}"))
        facts.append(("real images", ", ".join(f"{size:,} {name}" for name, size in sizes.items())))
        distilled = [(ipc, ipc * len(found.classes)) for ipc in sorted(cfg.ipc)]
        train = sizes.get("train", 0)
        shares = [f"{n:,} ({100 * n / train:.1f} %)" for _, n in distilled] if train else []
        facts.append(("images per class (IPC)", ", ".join(str(ipc) for ipc, _ in distilled)))
        facts.append(("distilled images", ", ".join(shares)))
    facts.append(("captioner", cfg.caption.model if cfg.caption.captioner == "llava" else cfg.caption.captioner))
    facts.append(("diffusion model", cfg.diffusion.model or "small, made from the training images"))
    finished = [marker["finished"] for state in states for marker in state.markers.values()]
    if finished:
        facts.append(("last result", datetime.fromtimestamp(max(finished), UTC).strftime("%Y-%m-%d %H:%M UTC")))
    return facts


def _of_net(items: list[dict[str, Any]], net: str) -> list[dict[str, Any]]:
    return [item for item in items if item["net"] == net]


def _net(net: str, summaries: list[dict[str, Any]], records: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the page says of one net's trainings."""
    summaries, records = _of_net(summaries, net), _of_net(records, net)
    ipcs = tables.ipcs_of(records)
    return {
        "net": net,
        "table": tables.accuracy_table(summaries),
        "protocol": tables.protocol_text(records),
        "test_images": records[0]["test_images"],
        "seeds": sorted({record["seed"] for record in records}),
        "legend": figures.legend(tables.methods_of(summaries)),
        "chart": figures.accuracy_by_ipc(summaries),
        "effect": tables.text_effect(summaries),
        "recognised": tables.recognised(records),
        "curves": figures.training_curves(records),
        "per_class": [tables.per_class(records, ipc, material.SHOWN_CLASSES) for ipc in ipcs],
    }


def _stage_row(state: StageStatus) -> dict[str, Any]:
    row = state.summary()
    rate = row["samples"] / row["worker_seconds"] if row["worker_seconds"] else None
    return {**row, "folder": state.folder.path.name, "rate": rate}


def _metrics(found: Material) -> list[tuple[str, str]]:
    """What stages measured beside time: sums over the units that describe, the one unit that makes a model."""
    metrics = []
    if captions := _total(found, "caption"):
        described = sum(marker["n_ok"] for marker in found.states["caption"].markers.values())
        metrics.append(("tokens per description", f"{captions.pop('tokens', 0) / max(1, described):.1f}"))
        ends = {end: captions.get(f"finished_{end}", 0) for end in ("end", "length")}
        metrics.append(("descriptions by end", ", ".join(f"{count:,} {end}" for end, count in ends.items() if count)))
        metrics += [(words, f"{count:,}") for words, count in found.states["caption"].notices().items()]
    if prototypes := _total(found, "prototypes"):
        metrics.append(("clusters without a text", f"{prototypes['fallbacks']:,}"))
    made = _total(found, "pretrain") if "pretrain" in found.states else {}
    for name, value in made.items():
        metrics.append((PRETRAIN[name], f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))
    return metrics


def _total(found: Material, stage: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for marker in found.states[stage].markers.values():
        for name, value in marker["info"].items():
            if isinstance(value, int | float):
                total[name] = total.get(name, 0) + value
    return total
