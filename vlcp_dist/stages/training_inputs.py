"""The inputs of fine-tuning: which samples there are, and what stands for their texts, computed once into the store."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vlcp_dist.data import training_set
from vlcp_dist.data.index import Row
from vlcp_dist.data.manifest import Failure
from vlcp_dist.data.training_set import Place, TrainingSet
from vlcp_dist.errors import InputError
from vlcp_dist.models.texts import TextEncoder, embedding_bytes, load_tokenizer, tokenize
from vlcp_dist.stages.base import Run

COLUMNS = ("shard", "position", "offset", "size", "flipped")
SHOWN = 10  # missing samples that an error lists
EMBED_BATCH = 64


def is_built(run: Run) -> bool:
    return (run.folders["finetune"].path / training_set.SAMPLES).exists()


def load(run: Run) -> TrainingSet:
    """The inputs as `build` left them; `facts` has `failed` and `text` (embeddings or tokens)."""
    return TrainingSet(run.folders["finetune"].path, run.folders["encode"].path)


def build(run: Run, load_text_encoder: Callable[[], TextEncoder], progress: Callable[[int, int], None]) -> None:
    """Write the inputs of this run into the finetune folder. One process does it, the others wait.

    Raises:
        InputError: more samples than `max_failed_samples` have no latent or no description, or none has both.
    """
    model, revision = run.diffusion_model, run.cfg.diffusion.revision
    tokenizer = load_tokenizer(model, revision=revision)
    table: list[np.ndarray] = []
    tokens = [tokenize(tokenizer, [""])]
    failed: list[Failure] = []
    shards = list(run.index.shards)
    for number, shard in enumerate(shards):
        latents = training_set.places(run.folders["encode"].path / f"{shard}.tar")
        descriptions = run.descriptions([shard])
        samples, texts = [], []
        for position, row in enumerate(run.index.shard(shard)):
            why = _missing(row, latents, descriptions)
            if why:
                failed.append(Failure(row.key, why, row.ref))
            else:
                samples.append((number, position, *latents[row.key]))
                texts.append(descriptions[row.key])
        table.append(np.array(samples, np.int64).reshape(-1, len(COLUMNS)))
        tokens.append(tokenize(tokenizer, texts))
        progress(number + 1, len(shards))
    columns = dict(zip(COLUMNS, np.concatenate(table).T, strict=True))
    _check(failed, len(columns["shard"]), run.cfg.max_failed_samples)
    distinct, rows = _distinct(np.concatenate(tokens))
    fits = len(distinct) * embedding_bytes(model, revision=revision) <= run.cfg.finetune.text_cache_gib * 2**30
    facts = {"failed": [asdict(failure) for failure in failed], "text": "embeddings" if fits else "tokens"}
    with tempfile.TemporaryDirectory(prefix="vlcp-inputs-") as scratch:
        file = Path(scratch) / training_set.TEXT
        if fits:
            _embed(distinct, load_text_encoder(), file)
        else:
            np.save(file, distinct, allow_pickle=False)
        training_set.write(run.folders["finetune"].path, shards, {**columns, "text": rows[1:]}, file, facts)


def _missing(row: Row, latents: dict[str, Place], descriptions: dict[str, str]) -> str | None:
    if row.key not in descriptions:
        return "no description" if row.key in latents else "no latent and no description"
    return None if row.key in latents else "no latent"


def _check(failed: list[Failure], usable: int, limit: int) -> None:
    if usable and len(failed) <= limit:
        return
    listed = "\n".join(f"  {failure.key} ({failure.source}): {failure.reason}" for failure in failed[:SHOWN])
    more = f"\n  and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    raise InputError(
        f"finetune: {len(failed)} of {usable + len(failed)} training images cannot be used, max_failed_samples is "
        f"{limit}:\n{listed}{more}\nMend them, or raise max_failed_samples, and run again."
    )


def _distinct(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of (n, length), that of row 0 first, and for every row which one it is."""
    distinct, rows = np.unique(tokens, axis=0, return_inverse=True)
    first = rows[0]
    distinct[[0, first]] = distinct[[first, 0]]
    swapped = np.arange(len(distinct))
    swapped[[0, first]] = first, 0
    return distinct, swapped[rows]


def _embed(tokens: np.ndarray, encode: TextEncoder, file: Path) -> None:
    """The embeddings of the distinct texts as a `.npy` (m, length, width) fp16, never all in memory."""
    shape = (*tokens.shape, encode.width)
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(tokens), EMBED_BATCH):
        array[start : start + EMBED_BATCH] = encode(tokens[start : start + EMBED_BATCH]).cpu().numpy()
    array.flush()
