"""prototypes: per class, outliers once, and for every IPC image prototypes (centres) and texts (Algorithm 2)."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from vlcp_dist.config import content
from vlcp_dist.data import storage
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.ops import backends
from vlcp_dist.ops.kmeans import check_clusters, summarize
from vlcp_dist.ops.lof import inlier_mask, scores, usable_neighbors
from vlcp_dist.ops.text import Words, count_words, text_prototypes
from vlcp_dist.stages.base import Run, Stage, class_shards, device

_MARKER = re.compile(r"ipc=(?P<ipcs>[0-9_]+)/(?P<group>.+)\.json")


def units(run: Run) -> list[Unit]:
    """Of each group of classes the units that were made for some of these IPCs, and one for the IPCs that are left.

    A unit's name says its IPCs: `ipc=10_20/n01440764`. So one visit to a class serves all IPCs asked for at once, and
    an IPC asked for later adds a unit for that one alone.
    """
    cfg, sizes = run.cfg.prototypes, run.index.class_sizes
    class_ids = list(sizes)
    made = _made(run)
    result = []
    for start in range(0, len(class_ids), cfg.classes_per_unit):
        classes = class_ids[start : start + cfg.classes_per_unit]
        group = classes[0] if cfg.classes_per_unit == 1 else f"{start // cfg.classes_per_unit:04d}"
        left, known = set(run.cfg.ipc), sorted(ipc for ipcs in made.get(group, []) for ipc in ipcs)
        for ipcs in [*made.get(group, []), tuple(sorted(left.difference(known)))]:
            if left.intersection(ipcs):
                left -= set(ipcs)
                others = [ipc for ipc in known if ipc not in ipcs]
                result.append(
                    Unit(
                        f"ipc={'_'.join(map(str, ipcs))}/{group}",
                        size=sum(sizes[class_id] for class_id in classes),
                        payload={"ipcs": list(ipcs), "classes": classes, "known": others},
                    )
                )
    return result


def _made(run: Run) -> dict[str, list[tuple[int, ...]]]:
    """For each group of classes the sets of IPCs that have a marker."""
    made: dict[str, list[tuple[int, ...]]] = {}
    for name in sorted(storage.listing(run.folders["prototypes"].path / "done")):
        if match := _MARKER.fullmatch(name):
            made.setdefault(match["group"], []).append(tuple(map(int, match["ipcs"].split("_"))))
    return made


@dataclass
class ClassData:
    """A class as it was read. `latents` is fp16 (n, c*h*w) on the device, of those of its images that can be used."""

    class_id: str
    shape: tuple[int, ...]
    keys: list[str]
    descriptions: list[str]
    latents: torch.Tensor
    failed: list[Failure]
    known: dict[int, dict[str, Any]]  # what earlier units left for other IPCs, by IPC


@dataclass
class Inliers:
    """What all IPCs of a class share; `points` is in the backend's form. All in the order of `words.keys`."""

    data: ClassData
    outliers: list[dict[str, Any]]
    latents: torch.Tensor
    points: Any
    words: Words
    lof: bool  # whether it was computed, rather than known from before


class Worker:
    def __init__(self, run: Run):
        self._run = run
        self._cfg = run.cfg.prototypes
        self._backend = backends.load(self._cfg.backend)

    def read(self, unit: Unit) -> list[ClassData]:
        return [self._read(class_id, unit.payload["known"]) for class_id in unit.payload["classes"]]

    def process(self, unit: Unit, read: list[ClassData]) -> Outcome:
        """For every IPC and class `ipc=<ipc>/<class>.safetensors`, `centers` fp32 (ipc, c, h, w), and a `.json`."""
        ipcs = unit.payload["ipcs"]
        classes = [self._inliers(data, max(ipcs)) for data in read]
        files: dict[str, bytes] = {}
        fallbacks = 0
        for ipc in ipcs:  # ascending: nested ones need the smaller first
            below = self._below(classes, ipc)
            found = self._cluster(classes, ipc, below)
            for inliers, labels in zip(classes, found, strict=True):
                table, centers = self._describe(inliers, labels, ipc)
                if below:
                    table["nested_in"] = max(i for i in inliers.data.known if i < ipc)
                inliers.data.known[ipc] = table
                name = f"ipc={ipc}/{inliers.data.class_id}"
                files[f"{name}.safetensors"] = save({"centers": centers})
                files[f"{name}.json"] = (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()
                fallbacks += sum(cluster["description"] is None for cluster in table["clusters"])
        info = {
            "outliers": sum(len(inliers.outliers) for inliers in classes),
            "lof": sum(inliers.lof for inliers in classes),
            "fallbacks": fallbacks,
        }
        return Outcome(files, unit.size, [failure for data in read for failure in data.failed], info)

    def _read(self, class_id: str, known: list[int]) -> ClassData:
        rows = self._run.index.of_class(class_id)
        pack, texts = self._run.pack(class_id), self._run.descriptions(class_shards(rows))
        # A copy: the map is read here, while the unit before is computed.
        latents = torch.from_numpy(np.array(pack.latents).reshape(len(pack.keys), -1)).to(device())
        finite = torch.isfinite(latents).all(dim=1).tolist()
        place = {key: i for i, key in enumerate(pack.keys)}
        failed = []
        for row in rows:
            if row.key not in place:
                failed.append(Failure(row.key, "it has no latent", row.ref))
            elif row.key not in texts:
                failed.append(Failure(row.key, "it has no description", row.ref))
            elif not finite[place[row.key]]:
                failed.append(Failure(row.key, "its latent holds NaN or infinity", row.ref))
        bad = {failure.key for failure in failed}
        keys = [key for key in pack.keys if key not in bad]
        if not keys:
            raise ValueError(
                f"class {class_id}: none of its {len(rows)} images can be used; the first, {failed[0].key}: "
                f"{failed[0].reason}. Mend the images or leave the class out of data.classes"
            )
        if bad:
            latents = latents[torch.tensor([place[key] for key in keys], device=latents.device)]
        tables = {ipc: table for ipc in known if (table := self._table(ipc, class_id))}
        return ClassData(class_id, pack.latents.shape[1:], keys, [texts[k] for k in keys], latents, failed, tables)

    def _table(self, ipc: int, class_id: str) -> dict[str, Any] | None:
        content = storage.fetch([self._run.folders["prototypes"].path / f"ipc={ipc}/{class_id}.json"], missing=b"")[0]
        table: dict[str, Any] | None = json.loads(content) if content else None
        return table

    def _inliers(self, data: ClassData, most: int) -> Inliers:
        """The class without its outliers: those that an earlier unit found, else those of LOF."""
        points = self._backend.prepare(data.latents)
        lof = not data.known and self._cfg.contamination > 0
        outliers = [] if lof or not data.known else next(iter(data.known.values()))["outliers"]
        if lof:
            k = usable_neighbors(len(data.keys), self._cfg.n_neighbors)
            factors = scores(*self._backend.neighbors(points, k))
            found = (~inlier_mask(factors, self._cfg.contamination)).nonzero().flatten().tolist()
            outliers = [{"key": data.keys[i], "score": float(factors[i])} for i in found]
        dropped = {outlier["key"] for outlier in outliers}
        kept = [i for i, key in enumerate(data.keys) if key not in dropped]
        if len(kept) < most:
            raise ValueError(
                f"class {data.class_id} has {len(kept)} usable images after outlier removal, fewer than ipc {most}; "
                f"ask for a smaller ipc or leave the class out of data.classes"
            )
        check_clusters(len(kept), most, self._cfg.n_init, self._cfg.max_iter)
        rows = torch.tensor(kept, device=data.latents.device)
        words = count_words([data.keys[i] for i in kept], [data.descriptions[i] for i in kept])
        return Inliers(data, outliers, data.latents[rows], self._backend.subset(points, rows), words, lof)

    def _below(self, classes: list[Inliers], ipc: int) -> list[torch.Tensor] | None:
        """With `nested`, of every class the labels at the largest smaller IPC; None if any has none."""
        if not self._cfg.nested or any(min(inliers.data.known, default=ipc) >= ipc for inliers in classes):
            return None
        labels = []
        for inliers in classes:
            clusters = inliers.data.known[max(i for i in inliers.data.known if i < ipc)]["clusters"]
            of = {key: c for c, cluster in enumerate(clusters) for key in cluster["members"]}
            labels.append(torch.tensor([of[key] for key in inliers.words.keys], device=inliers.latents.device))
        return labels

    def _cluster(self, classes: list[Inliers], ipc: int, below: list[torch.Tensor] | None) -> list[torch.Tensor]:
        settings: dict[str, Any] = {"n_init": self._cfg.n_init, "max_iter": self._cfg.max_iter}
        if below:
            settings["within"] = below
        if self._cfg.algorithm != "lloyd":
            settings["algorithm"] = self._cfg.algorithm
        points = [inliers.points for inliers in classes]
        labels: list[torch.Tensor] = self._backend.cluster(points, ipc, seed=self._run.cfg.seed, **settings)
        return labels

    def _describe(self, inliers: Inliers, labels: torch.Tensor, ipc: int) -> tuple[dict[str, Any], torch.Tensor]:
        """The table that explains a class's clusters, and their centres fp32 (ipc, c, h, w)."""
        data, cfg, words = inliers.data, self._cfg, inliers.words
        clusters = summarize(inliers.latents, labels.to(inliers.latents.device), ipc)
        numbers = clusters.labels.cpu().numpy()
        class_name = self._run.index.names[data.class_id]
        text = text_prototypes(
            words, numbers, class_name, n_clusters=ipc, beta=cfg.beta, k=cfg.k, matching=cfg.matching
        )
        nearest = clusters.nearest.tolist()
        table = {
            "class_id": data.class_id,
            "class_name": class_name,
            "images": len(data.keys),
            "inertia": clusters.inertia,
            "outliers": inliers.outliers,
            "nonrepresentative": text.nonrepresentative,
            "clusters": [
                {
                    **asdict(cluster),
                    "nearest": words.keys[nearest[c]],
                    "members": [words.keys[i] for i in np.flatnonzero(numbers == c).tolist()],
                }
                for c, cluster in enumerate(text.clusters)
            ],
        }
        return table, clusters.centers.reshape(ipc, *data.shape).cpu().contiguous()


STAGE = Stage(
    "prototypes",
    upstream=("index", "caption", "pack"),
    content=lambda cfg: content(cfg.prototypes),
    units=units,
    worker=Worker,
    version=2,
)
