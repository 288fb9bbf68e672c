"""What the finished units of a run left for the page: prototypes, images, outliers. Only what is shown is read."""

import json
import re
from collections.abc import Collection, Iterable
from functools import cache, cached_property, lru_cache
from typing import Any

from PIL import Image

from vlcp_dist.data import storage
from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.index import Row
from vlcp_dist.pipeline import stages
from vlcp_dist.report.pictures import TILE, TINY, blank, contact_sheet, data_uri, tile
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import make_run
from vlcp_dist.stages.synthesize import image_path
from vlcp_dist.status import StageStatus

SHOWN_CLASSES = 20
SHOWN_CLUSTERS = 10
SHOWN_OUTLIERS = 6
KEPT = 64  # classes whose rows and tables stay in memory: those shown, not all of a thousand


class Material:
    """Reads the run's files by the markers in `states`: what has no marker yet is not there."""

    def __init__(self, cfg: Config, states: list[StageStatus]):
        self.cfg = cfg
        self.states = {state.stage.name: state for state in states}
        self.unreadable: dict[str, str] = {}  # real images by key, with the reason
        self._run = make_run(cfg, stages(cfg))
        self.tile_size = min(TILE, cfg.synthesize.image_size)
        self.table = lru_cache(KEPT)(self._table)
        self.real = cache(self._real)
        self.rows = lru_cache(KEPT)(self._rows)

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
        if not self.has_table(ipc, class_id):
            return None
        table: dict[str, Any] = json.loads((self.path("prototypes") / f"ipc={ipc}/{class_id}.json").read_text())
        return table

    def has_table(self, ipc: int, class_id: str) -> bool:
        return f"ipc={ipc}/{class_id}.json" in self.files.get("prototypes", ())

    def _rows(self, class_id: str) -> list[Row]:
        return self._run.index.of_class(class_id)

    def _real(self, class_id: str, key: str) -> Image.Image:
        return self.reals(class_id, [key])[key]

    def reals(self, class_id: str, keys: Collection[str]) -> dict[str, Image.Image]:
        """Training images as the method saw them (squashed or cropped), the size of a tile; grey if they are gone."""
        rows = [row for row in self.rows(class_id) if row.key in keys]
        good, arrays, failed = self._run.arrays(self._run.read(rows), self.tile_size, crop=self.cfg.encode.resize)
        self.unreadable |= {failure.key: failure.reason for failure in failed}
        grey = {failure.key: blank(self.tile_size) for failure in failed}
        return grey | {row.key: Image.fromarray(a.transpose(1, 2, 0)) for row, a in zip(good, arrays, strict=True)}


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
    """Per shown class the clusters of one IPC, the smallest above 1: images, size, keywords, description (Table 6)."""
    ipc = table_ipc(material)
    if ipc is None:
        return None
    classes = []
    for info in material.shown:
        table = material.table(ipc, info.id)
        if table:
            classes.append({**class_table(material, info, ipc, most=SHOWN_CLUSTERS), "id": info.id})
    others = [{"id": info.id, "name": info.name} for info in material.classes if material.has_table(ipc, info.id)]
    return {
        "ipc": ipc,
        "strategy": text_strategy(material),
        "classes": classes,
        "cut": ipc > SHOWN_CLUSTERS,
        "pages": others,
        "hidden": len(material.classes) - len(material.shown),
    }


def table_ipc(material: Material) -> int | None:
    """The IPC whose text prototypes are shown with images."""
    ipcs = material.ipcs_with("prototypes")
    return min((i for i in ipcs if i > 1), default=ipcs[0]) if ipcs else None


def text_strategy(material: Material) -> str:
    """The strategy whose images stand beside the texts."""
    strategies = material.cfg.synthesize.strategies
    return "DCS" if "DCS" in strategies else strategies[0]


def class_table(material: Material, info: ClassInfo, ipc: int, *, most: int | None = None) -> dict[str, Any]:
    """A class's clusters (at most `most`) at an IPC, each with its distilled image and the nearest real one."""
    table = material.table(ipc, info.id)
    assert table is not None
    shown = table["clusters"][:most]
    near = material.reals(info.id, {cluster["nearest"] for cluster in shown})
    clusters = [
        {
            "number": c,
            "image": _uri(material, material.distilled(text_strategy(material), ipc, info.id, c)),
            "real": _uri(material, near[cluster["nearest"]]),
            "pieces": pieces(cluster["description"], cluster["keywords"]),
            **cluster,
        }
        for c, cluster in enumerate(shown)
    ]
    return {"name": info.name, "nonrepresentative": table["nonrepresentative"], "clusters": clusters}


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


def pieces(text: str | None, keywords: Iterable[tuple[str, int]]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is one of the keywords that it scored by."""
    words = {word for word, _ in keywords}
    return [(piece, piece.lower() in words) for piece in re.split(r"([^\W\d_]+)", text or "") if piece]
