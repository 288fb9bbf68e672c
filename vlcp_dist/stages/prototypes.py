"""prototypes: per class and IPC, image prototypes (centres of the inliers) and text prototypes (Algorithm 2)."""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors.torch import save

from vlcp_dist.config import content
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.ops.kmeans import kmeans
from vlcp_dist.ops.lof import inlier_mask, local_outlier_factor
from vlcp_dist.ops.text import text_prototypes
from vlcp_dist.stages.base import Run, Stage, class_shards, device


def units(run: Run) -> list[Unit]:
    return [
        Unit(f"ipc={ipc}/{class_id}", size=size, payload={"ipc": ipc, "class_id": class_id})
        for class_id, size in run.index.class_sizes.items()
        for ipc in run.cfg.ipc
    ]


@dataclass(frozen=True)
class ClassData:
    """What all IPCs of a class share. `latents` is fp32 (n, c*h*w) of the inliers, in the order of `keys`."""

    class_id: str
    shape: tuple[int, ...]
    keys: list[str]
    descriptions: list[str]
    latents: torch.Tensor
    outliers: list[dict[str, float | str]]
    missing: list[Failure]


class Worker:
    def __init__(self, run: Run):
        self._run = run
        self._data: ClassData | None = None

    def read(self, unit: Unit) -> tuple[list[Row], list[Row], np.ndarray, list[str]]:
        """All rows of the class, those with latent and description, their latents fp16 (n, c, h, w), descriptions."""
        class_id = unit.payload["class_id"]
        rows = self._run.index.of_class(class_id)
        names = class_shards(rows)
        latents, descriptions = self._run.latents(names), self._run.descriptions(names)
        usable = [row for row in rows if row.key in latents and row.key in descriptions]
        if not usable:
            raise ValueError(f"class {class_id}: none of its {len(rows)} images has a latent and a description")
        return rows, usable, np.stack([latents[r.key] for r in usable]), [descriptions[r.key] for r in usable]

    def process(self, unit: Unit, read: tuple[list[Row], list[Row], np.ndarray, list[str]]) -> Outcome:
        """`ipc=<ipc>/<class>.safetensors` with `centers` fp32 (ipc, c, h, w), and a `.json` that explains them."""
        class_id, ipc = unit.payload["class_id"], unit.payload["ipc"]
        if self._data is None or self._data.class_id != class_id:
            self._data = self._prepare(class_id, *read)
        data, cfg = self._data, self._run.cfg.prototypes
        if len(data.keys) < ipc:
            raise ValueError(
                f"class {class_id} has {len(data.keys)} usable images after outlier removal, fewer than ipc {ipc}; "
                f"ask for a smaller ipc or leave the class out of data.classes"
            )
        clusters = kmeans(data.latents, ipc, seed=self._run.cfg.seed, n_init=cfg.n_init, max_iter=cfg.max_iter)
        labels = clusters.labels.cpu().numpy()
        text = text_prototypes(
            data.keys,
            data.descriptions,
            labels,
            self._run.index.names[class_id],
            n_clusters=ipc,
            beta=cfg.beta,
            k=cfg.k,
            matching=cfg.matching,
        )
        nearest = torch.cdist(clusters.centers, data.latents).argmin(1).tolist()
        members = [np.flatnonzero(labels == c) for c in range(ipc)]
        table = {
            "class_id": class_id,
            "class_name": self._run.index.names[class_id],
            "images": len(data.keys) + len(data.outliers),
            "inertia": clusters.inertia,
            "outliers": data.outliers,
            "nonrepresentative": sorted(text.nonrepresentative),
            "clusters": [
                {
                    **asdict(cluster),
                    "nearest": data.keys[nearest[c]],
                    "members": [data.keys[i] for i in members[c]],
                }
                for c, cluster in enumerate(text.clusters)
            ],
        }
        centers = clusters.centers.reshape(ipc, *data.shape).cpu().contiguous()
        return Outcome(
            {
                f"{unit.name}.safetensors": save({"centers": centers}),
                f"{unit.name}.json": (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode(),
            },
            unit.size,
            data.missing,
            {"outliers": len(data.outliers), "fallbacks": sum(c.fallback for c in text.clusters)},
        )

    def _prepare(
        self, class_id: str, rows: list[Row], usable: list[Row], latents: np.ndarray, descriptions: list[str]
    ) -> ClassData:
        x = torch.from_numpy(latents).float().flatten(1).to(device())
        cfg = self._run.cfg.prototypes
        if cfg.contamination > 0:
            scores = local_outlier_factor(x, cfg.n_neighbors)
            inliers = inlier_mask(scores, cfg.contamination)
        else:
            scores, inliers = torch.ones(len(usable)), torch.ones(len(usable), dtype=torch.bool)
        kept = inliers.nonzero().flatten().tolist()
        dropped = (~inliers).nonzero().flatten().tolist()
        return ClassData(
            class_id,
            shape=latents.shape[1:],
            keys=[usable[i].key for i in kept],
            descriptions=[descriptions[i] for i in kept],
            latents=x[inliers.to(x.device)],
            outliers=[{"key": usable[i].key, "score": float(scores[i])} for i in dropped],
            missing=_missing(rows, usable),
        )


def _missing(rows: list[Row], usable: list[Row]) -> list[Failure]:
    have = {row.key for row in usable}
    return [Failure(row.key, "no latent or no description", row.ref) for row in rows if row.key not in have]


STAGE = Stage(
    "prototypes",
    upstream=("index", "caption", "encode"),
    content=lambda cfg: content(cfg.prototypes),
    units=units,
    worker=Worker,
)
