"""Generation in which a sequence that has ended makes room for the next one, instead of holding its batch.

The continuous batching of transformers takes token ids and no images, so the loop is here: prompts are run in small
groups (prefill) and written into free places of one cache, and a step of decoding moves all places on by a token.
At the lengths that captions have, this is 1.2 to 1.3 times as fast as batches of `generate` on a CPU. Giving places up
without refilling them does as well there, where a step takes as long as it has rows; on a GPU it hardly does, and only
full places keep it busy (`python -m benchmarks caption` measures both).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlcp_dist.models.places import Places
from vlcp_dist.ops.sampling import GumbelNoise, gumbel_noise

PREFILL = 16  # prompts that are run together at most: enough to be bound by arithmetic
FIRST_ROOM = 256  # tokens of an answer that have room from the start; there is more once an answer gets that long
# What a model may be given beside the tokens at a step of decoding for it to go into places: nothing of one sequence.
AT_A_STEP = {
    "input_ids", "position_ids", "attention_mask", "cache", "use_cache", "logits_to_keep", "token_type_ids",
    "mm_token_type_ids", "image_grid_thw", "batch_num_images",
}  # fmt: skip

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Request:
    """A sequence to be generated: the model's inputs, with a batch of 1, its most tokens, and its seed."""

    inputs: Inputs
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The tokens generated (end token excluded), why there are no more, and the seconds from its prefill to its end."""

    tokens: list[int]
    finish_reason: Literal["end", "length"]
    seconds: float


@dataclass(eq=False)
class _Row:
    place: int  # in the results
    request: Request
    began: float
    length: int = 0  # tokens in the cache, padding on the left included
    processors: Any = ()  # of transformers: what the model's own generation settings do to scores
    tokens: list[int] = field(default_factory=list)
    answer: Answer | None = None


class Decoder:
    """Greedy at temperature 0, else sampled with `gumbel_noise`. Keeps its cache from call to call.

    A model that keeps other state than the keys and values of full attention (sliding windows, cross-attention, an
    encoder) is run by transformers' `generate` in batches, and that is said once.
    """

    def __init__(self, model: Any, *, pad_token_id: int, temperature: float, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._temperature = temperature
        self._places: Places | None = None
        self._rows: list[_Row] = []
        if why := _other_state(model):
            self._use_generate(why)
        else:
            self.in_places = True

    @torch.inference_mode()
    def run(self, requests: Iterator[Request]) -> list[Answer]:
        """One answer per request, in their order. CUDA out of memory halves the batch for good and goes on.

        Raises:
            torch.OutOfMemoryError: even one sequence does not fit.
        """
        answers: dict[int, Answer] = {}
        todo = (_Row(place, request, 0.0) for place, request in enumerate(requests))
        again: deque[_Row] = deque()
        self._rows.clear()
        while True:
            new = self._admit(again, todo)
            try:
                if new:
                    self._begin(new)
                elif self._rows:
                    self._step()
                else:
                    return [answers[place] for place in range(len(answers))]
                short_of_memory = False
            except torch.OutOfMemoryError:
                short_of_memory = True
                new = [row for row in (*self._rows, *new) if not row.answer]
                if len(new) == 1:
                    raise
            if short_of_memory:  # outside the handler: there the exception still holds the tensors
                again.extendleft(_Row(row.place, row.request, 0.0) for row in reversed(new))
                self._shrink(len(new))
            answers |= {row.place: row.answer for row in self._rows if row.answer}

    def _admit(self, again: deque[_Row], todo: Iterator[_Row]) -> list[_Row]:
        """Clear places whose sequence has ended, and take what goes into free ones once it is worth a prefill."""
        refill = max(1, min(PREFILL, self.batch_size // 8))
        ended = sum(row.answer is not None for row in self._rows)
        if ended >= min(refill, len(self._rows)):
            self._clear()
        free = self.batch_size - len(self._rows)
        if self._rows and free < refill:
            return []
        most = min(free, PREFILL) if self.in_places else free
        return [*(again.popleft() for _ in range(min(most, len(again)))), *islice(todo, most - min(most, len(again)))]

    def _begin(self, rows: list[_Row]) -> None:
        """Run the prompts and choose their first tokens."""
        began = time.perf_counter()
        for row in rows:
            row.began = began
        inputs = collate([row.request.inputs for row in rows], self._pad_token_id, self.model)
        most = max(row.request.max_new_tokens for row in rows)
        if self.in_places:
            prompt = self._generate(inputs, most, custom_generate=_prefill)
            if isinstance(prompt, str):
                self._use_generate(prompt)
        if not self.in_places:
            self._generate_whole(inputs, most, rows)
            return
        ids, mask, positions, cache, processors, logits = prompt
        if self._places is None:
            room = ids.shape[1] + min(most, FIRST_ROOM)
            self._places = Places(self.batch_size, room, len(cache.layers), positions)
        self._places.n = len(self._rows)
        self._places.add(ids, mask, positions, [row.request.seed for row in rows], cache)
        for row in rows:
            row.length, row.processors = ids.shape[1], processors
        self._rows += rows
        self._choose(logits, first=len(self._rows) - len(rows))

    def _step(self) -> None:
        """Move every sequence on by a token."""
        assert self._places is not None
        longest = max(row.length for row in self._rows if not row.answer) + 1
        inputs = self._places.inputs(longest)
        logits = self.model(**inputs, use_cache=True, return_dict=True).logits
        self._places.advance()
        for row in self._rows:
            row.length += 1
        self._choose(logits, first=0)

    def _choose(self, logits: torch.Tensor, first: int) -> None:
        places, rows = self._places, self._rows[first:]
        assert places is not None
        scores = logits[:, -1].float()
        for group in _alike(rows):
            at = places.index[group]
            scores[at] = rows[group[0]].processors(places.history[at + first, : rows[group[0]].length], scores[at])
        if self._temperature:
            own = slice(first, places.n)
            steps = places.columns[own] - places.prompts[own]
            scores = scores / self._temperature + gumbel_noise(places.seeds[own], steps, scores.shape[1])
        tokens = scores.argmax(-1)
        places.chosen(tokens, first)
        ends = end_tokens(self.model)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row.answer:
                continue
            if token not in ends:
                row.tokens.append(token)
            if token in ends or len(row.tokens) == row.request.max_new_tokens:
                reason: Literal["end", "length"] = "end" if token in ends else "length"
                row.answer = Answer(row.tokens, reason, time.perf_counter() - row.began)

    def _clear(self) -> None:
        """Close up: sequences of the last places go to where others have ended."""
        live = sum(row.answer is None for row in self._rows)
        targets = [i for i, row in enumerate(self._rows[:live]) if row.answer]
        sources = [i for i, row in enumerate(self._rows) if i >= live and not row.answer]
        if self._places is not None:
            self._places.move(sources, targets)
            self._places.n = live
        for source, target in zip(sources, targets, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[live:]

    def _shrink(self, count: int) -> None:
        print(f"caption: out of CUDA memory at batch {count}, going on at {count // 2}", file=sys.stderr)
        self.batch_size = count // 2
        self._rows = [row for row in self._rows if row.answer]
        self._places = None
        torch.cuda.empty_cache()

    def _use_generate(self, why: str) -> None:
        self.in_places = False
        print(f"caption: batches wait for their longest answer: {why}", file=sys.stderr)

    def _generate_whole(self, inputs: Inputs, most: int, rows: list[_Row]) -> None:
        noise = []
        if self._temperature:
            noise = [GumbelNoise(self._temperature, [row.request.seed for row in rows])]
        ids = self._generate(inputs, most, logits_processor=noise)
        prompt = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        ends = end_tokens(self.model)
        for row, generated in zip(rows, ids[:, prompt:].tolist(), strict=True):
            tokens = generated[: row.request.max_new_tokens]
            length = next((i for i, token in enumerate(tokens) if token in ends), None)
            reason: Literal["end", "length"] = "length" if length is None else "end"
            row.answer = Answer(tokens[:length], reason, time.perf_counter() - row.began)
        self._rows += rows

    def _generate(self, inputs: Inputs, max_new_tokens: int, **how: Any) -> Any:
        """transformers' `generate`, without the model's own sampling: that, too, is an argmax here."""
        return self.model.generate(
            **inputs,
            **how,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._pad_token_id,
        )


def collate(samples: list[Inputs], pad_token_id: int, model: Any) -> Inputs:
    """Samples' inputs as one batch on the model's device, in its dtype where they are floats.

    What has the tokens' shape (1, length) is padded on the left, tokens with `pad_token_id` and the rest with 0; all
    else is joined along its first dimension, and filled up with zeros to a common size in the others.
    """
    batch = {}
    text = {name for name, value in samples[0].items() if value.shape == samples[0]["input_ids"].shape}
    for name in samples[0]:
        parts = [sample[name].to(model.device, non_blocking=True) for sample in samples]
        sizes = [max(dim) for dim in zip(*(part.shape[1:] for part in parts), strict=True)]
        fill = pad_token_id if name == "input_ids" else 0
        padded = [_pad(part, sizes, fill, left=name in text) for part in parts]
        joined = torch.cat(padded)
        batch[name] = joined.to(model.dtype) if joined.is_floating_point() else joined
    return batch


def end_tokens(model: Any) -> set[int]:
    """The tokens after which the model has no more to say; none if its settings name none."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _prefill(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **inputs: Any,
) -> Any:
    """In place of `generate`'s own loop: run the prompts once, and say what decoding goes on from.

    A text instead says that this model's decoding needs more than that.
    """
    out = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs), return_dict=True)
    step = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
    if more := sorted(name for name, value in step.items() if value is not None and name not in AT_A_STEP):
        return f"{type(model).__name__} needs {', '.join(more)} at every step"
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if positions is None or any(type(layer) is not DynamicLayer for layer in out.cache.layers):
        return f"{type(model).__name__} keeps its positions or its cache in another way"
    mask = torch.ones_like(input_ids) if mask is None else mask
    return input_ids, mask, positions, out.cache, logits_processor, out.logits


def _other_state(model: Any) -> str | None:
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder"
    other = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}
    return f"{type(model).__name__} keeps a {other.pop()}" if other else None


def _alike(rows: list[_Row]) -> Iterator[list[int]]:
    """Rows whose scores the model's settings change, in groups of one length and one set of processors."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        if row.processors and not row.answer:
            groups.setdefault((id(row.processors), row.length), []).append(i)
    yield from groups.values()


def _pad(part: torch.Tensor, sizes: list[int], fill: int, *, left: bool) -> torch.Tensor:
    padding: list[int] = []
    for have, want in zip(reversed(part.shape[1:]), reversed(sizes), strict=True):
        padding += [want - have, 0] if left else [0, want - have]
    return torch.nn.functional.pad(part, padding, value=fill) if any(padding) else part
