"""caption: a description of every training image, in one tar for each shard."""

import json
from collections import Counter

from vlcp_dist.config import content
from vlcp_dist.data import shards
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.models.captioner import Caption, load_captioner
from vlcp_dist.ops.text import clean_description
from vlcp_dist.stages.base import Encoded, Run, Stage, device, dtype


def units(run: Run) -> list[Unit]:
    return [Unit(name, size=size) for name, size in run.index.shards.items()]


class Worker:
    def __init__(self, run: Run):
        cfg = run.cfg.caption
        self._run = run
        self._captioner = load_captioner(
            cfg.captioner,
            model=cfg.model,
            revision=cfg.revision,
            prompt=cfg.prompt,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            batch_size=cfg.batch_size,
            device=device(),
            dtype=dtype(cfg.dtype),
            seed=run.cfg.seed,
        )

    def read(self, unit: Unit) -> list[tuple[Row, Encoded]]:
        return self._run.read(self._run.index.shard(unit.name))

    def process(self, unit: Unit, data: list[tuple[Row, Encoded]]) -> Outcome:
        """`<shard>.tar` with `key.txt` (cleaned description) and `key.json` (as generated, tokens, finish reason)."""
        size = self._run.cfg.caption.batch_size
        samples: list[tuple[str, dict[str, bytes]]] = []
        failed: list[Failure] = []
        counts = Counter[str]()
        for start in range(0, len(data), size):
            for row, caption in self._describe(data[start : start + size], failed):
                text = clean_description(caption.text)
                if not text:
                    failed.append(Failure(row.key, "empty description", row.ref))
                    continue
                counts[f"finished_{caption.finish_reason}"] += 1
                counts["tokens"] += caption.tokens
                facts = {"raw": caption.text, "tokens": caption.tokens, "finish_reason": caption.finish_reason}
                samples.append(
                    (row.key, {"json": json.dumps(facts, ensure_ascii=False).encode(), "txt": text.encode()})
                )
        info = {**counts, "dtype": dtype(self._run.cfg.caption.dtype)}
        return Outcome({f"{unit.name}.tar": shards.pack(samples)}, unit.size, failed, info)

    def _describe(self, encoded: list[tuple[Row, Encoded]], failed: list[Failure]) -> list[tuple[Row, Caption]]:
        rows, images, bad = self._run.decode(encoded)
        failed += bad
        names = [self._run.index.names[row.class_id] for row in rows]
        return list(zip(rows, self._captioner.describe(images, names), strict=True))


STAGE = Stage(
    "caption",
    upstream=("index",),
    content=lambda cfg: content(cfg.caption),
    units=units,
    worker=Worker,
    reads_images=True,
)
