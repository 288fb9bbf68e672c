"""caption: a description of every training image, in one tar for each shard."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vlcp_dist.config import content
from vlcp_dist.data import shards
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure, Outcome, Unit
from vlcp_dist.data.prefetch import Ahead
from vlcp_dist.errors import InputError
from vlcp_dist.models import weights
from vlcp_dist.models.captioner import LLAVA, load_captioner
from vlcp_dist.ops.captions import names_class, repeats_phrase
from vlcp_dist.ops.text import clean_description
from vlcp_dist.schema import Config
from vlcp_dist.stages.base import Encoded, Run, Stage, device, dtype

AHEAD = 48  # images decoded and not yet described: three times what is taken at once
NOTICES = {
    "empty": "empty descriptions",
    "repeating": "descriptions that end in a phrase said again and again",
    "unnamed": "descriptions without the name of their class",
}


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
            attention=cfg.attention,
            device=device(),
            dtype=dtype(cfg.dtype),
            seed=run.cfg.seed,
        )

    def read(self, unit: Unit) -> list[tuple[Row, Encoded]]:
        return self._run.read(self._run.index.shard(unit.name))

    def process(self, unit: Unit, data: list[tuple[Row, Encoded]]) -> Outcome:
        """`<shard>.tar` with `key.txt` (cleaned description) and `key.json` (as generated, tokens, finish reason).

        The seconds that each description took are in the marker, in the tar's order: files depend on no clock.
        """
        rows: list[Row] = []
        failed: list[Failure] = []
        threads = self._run.cfg.engine.placement("caption").cpus_per_worker
        with Ahead(self._prepare, data, threads=threads, most=AHEAD, initializer=_one_thread) as prepared:
            captions = self._captioner.describe(_usable(prepared, rows, failed))
        samples: list[tuple[str, dict[str, bytes]]] = []
        counts = Counter[str](dict.fromkeys(NOTICES, 0))
        seconds = []
        for row, caption in zip(rows, captions, strict=True):
            text = clean_description(caption.text)
            if not text:
                failed.append(Failure(row.key, "empty description", row.ref))
                counts["empty"] += 1
                continue
            counts[f"finished_{caption.finish_reason}"] += 1
            counts["tokens"] += caption.tokens
            counts["repeating"] += repeats_phrase(text)
            counts["unnamed"] += not names_class(text, self._run.index.names[row.class_id])
            seconds.append(round(caption.seconds, 3))
            facts = {"raw": caption.text, "tokens": caption.tokens, "finish_reason": caption.finish_reason}
            samples.append((row.key, {"json": json.dumps(facts, ensure_ascii=False).encode(), "txt": text.encode()}))
        info = {**counts, "dtype": dtype(self._run.cfg.caption.dtype), "seconds_each": seconds}
        files = {f"{unit.name}.tar": shards.pack(samples)}
        return Outcome(files, unit.size, failed, info, wait_seconds=prepared.waited)

    def _prepare(self, item: tuple[Row, Encoded]) -> tuple[Row, Any]:
        """What the captioner makes of an image in advance, or the failure."""
        rows, images, failed = self._run.decode([item])
        if failed:
            return item[0], failed[0]
        return rows[0], self._captioner.prepare(images[0], self._run.index.names[rows[0].class_id])


def _usable(prepared: Iterable[tuple[Row, Any]], rows: list[Row], failed: list[Failure]) -> Iterator[Any]:
    for row, made in prepared:
        if isinstance(made, Failure):
            failed.append(made)
        else:
            rows.append(row)
            yield made


def _one_thread() -> None:
    """Images are many: threads of torch within the threads that prepare them would only be in each other's way."""
    torch.set_num_threads(1)


def check(cfg: Config) -> None:
    if cfg.caption.captioner == "llava":
        try:
            weights.find_weights(cfg.caption.model, cfg.caption.revision, default=LLAVA)
        except FileNotFoundError as error:
            raise InputError(f"caption: {error}") from None


STAGE = Stage(
    "caption",
    upstream=("index",),
    content=lambda cfg: content(cfg.caption),
    units=units,
    worker=Worker,
    check=check,
    notices=NOTICES,
    reads_images=True,
    version=2,
)
