"""What the finished units of a run left for the page: prototypes, images, outliers. Only what is shown is read."""

import json
import re
from collections.abc import Iterable
from functools import cache, cached_property
from typing import Any

from PIL import Image

from vlcp_dist.config import Config
from vlcp_dist.data import storage
from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.index import Row
from vlcp_dist.pipeline import stages
from vlcp_dist.report.pictures import TILE, TINY, blank, contact_sheet, data_uri, tile
from vlcp_dist.stages.base import make_run
from vlcp_dist.stages.synthesize import image_path
from vlcp_dist.status import StageStatus

SHOWN_CLASSES = 20
SHOWN_CLUSTERS = 10
SHOWN_OUTLIERS = 6


class Material:
    """Reads the run's files by the markers in `states`: what has no marker yet is not there."""

    def __init__(self, cfg: Config, states: list[StageStatus]):
        self.cfg = cfg
        self.states = {state.stage.name: state for state in states}
        self.unreadable: dict[str, str] = {}  # real images by key, with the reason
        self._run = make_run(cfg, stages(cfg))
        self.tile_size = min(TILE, cfg.synthesize.image_size)
        self.table = cache(self._table)
        self.real = cache(self._real)
        self.rows = cache(self._rows)

    @property
    def indexed(self) -> bool:
        return bool(self.states["index"].markers)

    @cached_property
    def classes(self) -> list[ClassInfo]:
        return self._run.index.classes

    @property
    def shown(self) -> list[ClassInfo]:
        return self.classes[:SHOWN_CLASSES]

    @cached_property
    def split_sizes(self) -> dict[str, int]:
        return self._run.index.split_sizes

    @cached_property
    def files(self) -> dict[str, set[str]]:
        """Files of every stage that belong to finished units."""
        return {
            name: {file for marker in state.markers.values() for file in marker["files"]}
            for name, state in self.states.items()
        }

    def path(self, stage: str) -> storage.Location:
        return self.states[stage].folder.path

    def distilled(self, strategy: str, ipc: int, class_id: str, cluster: int) -> Image.Image | None:
        name = image_path(strategy, ipc, class_id, cluster)
        if name not in self.files.get("synthesize", ()):
            return None
        with (self.path("synthesize") / name).open("rb") as file, Image.open(file) as image:
            return tile(image)

    def ipcs_with(self, stage: str, strategy: str = "") -> list[int]:
        """IPCs of the configuration for which a stage has finished any class."""
        prefix = f"{strategy}/" if strategy else ""
        names = self.files.get(stage, set())
        return sorted(i for i in self.cfg.ipc if any(name.startswith(f"{prefix}ipc={i}/") for name in names))

    def _table(self, ipc: int, class_id: str) -> dict[str, Any] | None:
        name = f"ipc={ipc}/{class_id}.json"
        if name not in self.files.get("prototypes", ()):
            return None
        table: dict[str, Any] = json.loads((self.path("prototypes") / name).read_text())
        return table

    def _rows(self, class_id: str) -> list[Row]:
        return self._run.index.of_class(class_id)

    def _real(self, class_id: str, key: str) -> Image.Image:
        """A training image as the method saw it (squashed or cropped), the size of a tile; grey if it is gone."""
        row = next(row for row in self.rows(class_id) if row.key == key)
        _, arrays, failed = self._run.arrays(self._run.read([row]), self.tile_size, crop=self.cfg.encode.resize)
        if failed:
            self.unreadable[key] = failed[0].reason
            return blank(self.tile_size)
        return Image.fromarray(arrays[0].transpose(1, 2, 0))


def not_shown(material: Material, stage: str, below: str = "") -> str | None:
    """Which classes are left out of a section, and where their files are."""
    more = len(material.classes) - len(material.shown)
    if not more:
        return None
    return f"{more:,} more classes are not shown; their files are in {material.path(stage).name}/{below}."


def distilled_grid(material: Material) -> dict[str, Any] | None:
    """Of every shown class a contact sheet: distilled images above, the real image nearest to each prototype below."""
    strategy = material.cfg.synthesize.strategies[0]
    ipcs = material.ipcs_with("synthesize", strategy)
    if not ipcs:
        return None
    ipc = max((i for i in ipcs if i <= SHOWN_CLUSTERS), default=ipcs[0])
    sheets = []
    for info in material.shown:
        table = material.table(ipc, info.id)
        above, below = [], []
        for c in range(min(ipc, SHOWN_CLUSTERS)):
            image = material.distilled(strategy, ipc, info.id, c)
            if image and table:
                above.append(image)
                below.append(material.real(info.id, table["clusters"][c]["nearest"]))
        if above:
            sheet = contact_sheet([above, below])
            sheets.append({"name": info.name, "uri": data_uri(sheet, material.tile_size), "columns": len(above)})
    note = not_shown(material, "synthesize", f"{strategy}/ipc={ipc}/")
    return {"strategy": strategy, "ipc": ipc, "columns": min(ipc, SHOWN_CLUSTERS), "sheets": sheets, "note": note}


def strategy_rows(material: Material, ipc: int) -> dict[str, Any] | None:
    """The first prototype of every shown class under all strategies: same latent, same noise, other text (Fig. 3)."""
    strategies = [s for s in material.cfg.synthesize.strategies if ipc in material.ipcs_with("synthesize", s)]
    tables = {info: table for info in material.shown if (table := material.table(ipc, info.id))}
    if len(strategies) < 2 or not tables:
        return None
    nearest = [material.real(info.id, table["clusters"][0]["nearest"]) for info, table in tables.items()]
    rows = [{"label": "nearest real", "cells": [_uri(material, image) for image in nearest]}]
    rows += [
        {
            "label": strategy,
            "cells": [_uri(material, material.distilled(strategy, ipc, info.id, 0)) for info in tables],
        }
        for strategy in strategies
    ]
    return {"classes": [short_name(info) for info in tables], "rows": rows}


def text_prototypes(material: Material) -> dict[str, Any] | None:
    """Per shown class the clusters of one IPC, the smallest above 1: image, size, keywords, description (Table 6)."""
    ipcs = material.ipcs_with("prototypes")
    if not ipcs:
        return None
    ipc = min((i for i in ipcs if i > 1), default=ipcs[0])
    strategies = material.cfg.synthesize.strategies
    strategy = "DCS" if "DCS" in strategies else strategies[0]
    classes = []
    for info in material.shown:
        table = material.table(ipc, info.id)
        if table:
            clusters = [
                {
                    "number": c,
                    "image": _uri(material, material.distilled(strategy, ipc, info.id, c)),
                    "pieces": _pieces(cluster["description"], cluster["keywords"]),
                    **cluster,
                }
                for c, cluster in enumerate(table["clusters"][:SHOWN_CLUSTERS])
            ]
            classes.append({"name": info.name, "nonrepresentative": table["nonrepresentative"], "clusters": clusters})
    note = not_shown(material, "prototypes", f"ipc={ipc}/")
    return {"ipc": ipc, "strategy": strategy, "classes": classes, "cut": ipc > SHOWN_CLUSTERS, "note": note}


def outliers(material: Material) -> dict[str, Any] | None:
    """Per shown class the images with the highest LOF scores of those that were left out."""
    ipcs = material.ipcs_with("prototypes")
    if not ipcs:
        return None
    classes = []
    for info in material.shown:
        table = next((t for ipc in ipcs if (t := material.table(ipc, info.id))), None)
        if table and table["outliers"]:
            ordered = sorted(table["outliers"], key=lambda outlier: (-outlier["score"], outlier["key"]))
            images = [
                {**outlier, "uri": _uri(material, material.real(info.id, outlier["key"]))}
                for outlier in ordered[:SHOWN_OUTLIERS]
            ]
            classes.append(
                {"name": short_name(info), "removed": len(ordered), "images": table["images"], "outliers": images}
            )
    return {"classes": classes, "note": not_shown(material, "prototypes", f"ipc={ipcs[0]}/")}


def short_name(info: ClassInfo) -> str:
    """The first of a class's names, for the heads of tables: ImageNet's are lists of synonyms."""
    return info.name.split(",")[0]


def is_tiny(material: Material) -> bool:
    return material.tile_size <= TINY


def _uri(material: Material, image: Image.Image | None) -> str | None:
    return data_uri(image, material.tile_size) if image else None


def _pieces(text: str | None, keywords: Iterable[tuple[str, int]]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is one of the keywords that it scored by."""
    words = {word for word, _ in keywords}
    return [(piece, piece.lower() in words) for piece in re.split(r"([^\W\d_]+)", text or "") if piece]
