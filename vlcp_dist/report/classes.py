"""A page for each class, `<root>/report/classes/<class>.html`: all its clusters at every IPC (Table 6), and outliers.

Pages of a thousand classes are too much for one file and take minutes to draw: those whose material has not changed
since are left as they are.
"""

import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from vlcp_dist.data import storage
from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.threads import concurrently
from vlcp_dist.report.material import Material, class_table, is_tiny, pieces, table_ipc, text_strategy

_MADE_FROM = re.compile(rb'<meta name="made-from" content="([0-9a-f]*)">')
TEMPLATES = ("layout.html", "class.html", "clusters.html", "style.css")
_THREADS = 4


def write(material: Material, folder: storage.Location, render: Callable[[str, dict[str, Any]], str]) -> None:
    """Write the pages of all classes that have prototypes; `render` fills a template."""
    ipcs = material.ipcs_with("prototypes")
    todo = [info for info in material.classes if any(material.has_table(ipc, info.id) for ipc in ipcs)]
    before = storage.fetch([folder / f"{info.id}.html" for info in todo], missing=b"")
    digests = _digests(material, ipcs)
    changed = [info for info, page in zip(todo, before, strict=True) if _made_from(page) != digests[info.id]]

    def draw(info: ClassInfo) -> None:
        context = _context(material, info, ipcs)
        grey = any(c["nearest"] in material.unreadable for table in context["tables"] for c in table["clusters"])
        # A page with a grey picture is drawn again the next time: the image may be there then.
        page = render("class.html", {**context, "made_from": "" if grey else digests[info.id]})
        storage.publish(folder / f"{info.id}.html", page.encode())

    concurrently(draw, changed, threads=_THREADS)


def _context(material: Material, info: ClassInfo, ipcs: list[int]) -> dict[str, Any]:
    """The clusters at every IPC; with images at the one that the main page shows, for they make the file large."""
    tables = []
    facts: dict[str, Any] = {}
    for ipc in ipcs:
        if not material.has_table(ipc, info.id):
            continue
        facts = material.table(ipc, info.id) or {}
        if ipc == table_ipc(material):
            tables.append({**class_table(material, info, ipc), "ipc": ipc, "pictures": True})
        else:
            clusters = [
                {"number": c, "image": None, "real": None, "pieces": pieces(x["description"], x["keywords"]), **x}
                for c, x in enumerate(facts["clusters"])
            ]
            words = facts["nonrepresentative"]
            tables.append(
                {"name": info.name, "nonrepresentative": words, "clusters": clusters, "ipc": ipc, "pictures": False}
            )
    return {
        "name": info.name,
        "class_id": info.id,
        "images": facts["images"],
        "outliers": sorted(facts["outliers"], key=lambda outlier: (-outlier["score"], outlier["key"])),
        "tables": tables,
        "strategy": text_strategy(material),
        "tiny": is_tiny(material),
    }


def _digests(material: Material, ipcs: list[int]) -> dict[str, str]:
    """By class, of all that its page shows and how: its name, tables and distilled images, the templates."""
    ipc, strategy = table_ipc(material), text_strategy(material)
    templates = [(files("vlcp_dist.report") / name).read_text(encoding="utf-8") for name in TEMPLATES]
    shown: dict[str, list[str]] = {info.id: [*templates, info.name, f"{ipc} {strategy}"] for info in material.classes}
    below_of = {"prototypes": [f"ipc={i}/" for i in ipcs], "synthesize": [f"{strategy}/ipc={ipc}/train/"]}
    for stage, below in below_of.items():
        for marker in material.states[stage].markers.values():
            for name, facts in marker["files"].items():
                prefix = next((prefix for prefix in below if name.startswith(prefix)), None)
                class_id = name.removeprefix(prefix).split("/")[0].removesuffix(".json") if prefix else None
                if class_id in shown:
                    shown[class_id].append(f"{name} {facts['sha256']}")
    return {
        class_id: hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:16]
        for class_id, facts in shown.items()
    }


def _made_from(page: bytes) -> str | None:
    match = _MADE_FROM.search(page[:4096])
    return match[1].decode() if match else None
