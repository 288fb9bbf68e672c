"""A key-value cache of fixed places for sequences that come and go, in the terms of transformers' caches."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

WINDOW = 64  # tokens: the cache is read in multiples of so many, so that kernels see few shapes


class Places:
    """The first `n` of `slots` places hold sequences; a place's tokens begin at column 0, padding on the left included.

    Everything that a step of decoding needs is kept on the device, by place: the last token, its position (whatever
    dimensions the model gives positions), the column it goes to, where padding ends, all tokens so far and the seed.
    Columns that hold nothing are zero or old, never NaN, and masked.
    """

    def __init__(self, slots: int, room: int, layers: int, positions: torch.Tensor):
        """Room for `room` tokens a place; `positions` (..., b, length) are those of a prompt, for their shape."""
        self.slots, self.room, self.n = slots, _windows(room), 0
        self.device = positions.device

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        self.tokens, self.columns, self.starts, self.prompts, self.seeds = (zeros(slots) for _ in range(5))
        self.positions = zeros(*positions.shape[:-2], slots)
        self.history = zeros(slots, self.room)
        self.index = torch.arange(slots, device=self.device)
        self.window = WINDOW
        self._layers = [_Layer(self) for _ in range(layers)]
        self.cache = Cache(layers=list(self._layers))

    def add(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, seeds: list[int], cache: Any) -> None:
        """Take in prompts that have been run: tokens and mask (b, length), their positions and key-value cache."""
        count, length = ids.shape
        self.reserve(length)
        new = slice(self.n, self.n + count)
        self.columns[new] = self.prompts[new] = length
        self.starts[new] = (mask == 0).sum(1)
        self.positions[..., new] = positions[..., -1] + 1
        self.seeds[new] = torch.tensor(seeds, device=self.device)
        self.history[new, :length] = ids
        for layer, source in zip(self._layers, cache.layers, strict=True):
            layer.put(new, source.keys, source.values)
        self.n += count

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Put the sequences of some places into others and give up the last places that hold none then."""
        if sources:
            sent, to = (torch.tensor(places, device=self.device) for places in (sources, targets))
            for state in (self.tokens, self.columns, self.starts, self.prompts, self.seeds, self.history):
                state[to] = state[sent]
            self.positions[..., to] = self.positions[..., sent]
            for layer in self._layers:
                layer.move(sent, to)

    def chosen(self, tokens: torch.Tensor, first: int) -> None:
        """Note the next tokens of the places from `first` on."""
        places = self.index[first : self.n]
        self.tokens[places] = tokens
        self.history[places, self.columns[places]] = tokens

    def inputs(self, longest: int) -> dict[str, Any]:
        """What the model is given to move all sequences on by a token, of which the longest then has `longest`."""
        self.reserve(longest)
        self.window = min(_windows(longest), self.room)
        column = torch.arange(self.window, device=self.device)
        starts, columns = self.starts[: self.n, None], self.columns[: self.n, None]
        return {
            "input_ids": self.tokens[: self.n, None],
            "position_ids": self.positions[..., : self.n, None],
            "attention_mask": ((column >= starts) & (column <= columns)).long(),
            "cache": self.cache,
        }

    def advance(self) -> None:
        """After the model has run. Sequences that have ended stay where they are, at the last column at most."""
        self.columns[: self.n].add_(1).clamp_(max=self.room - 1)
        self.positions[..., : self.n].add_(1)

    def reserve(self, length: int) -> None:
        """Make room for so many tokens."""
        if length < self.room:
            return
        room = _windows(length + 1)
        for layer in self._layers:
            layer.grow(room)
        self.history = torch.nn.functional.pad(self.history, (0, room - self.room))
        self.room = room


class _Layer(DynamicLayer):
    """Keys and values of one layer, (slots, room, heads, dim); attention reads them as (n, heads, window, dim)."""

    def __init__(self, places: Places):
        super().__init__()
        self._places = places

    def put(self, new: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Prompts' keys and values, (b, heads, length, dim)."""
        if self.keys is None:
            self.keys, self.values = (
                torch.zeros(
                    self._places.slots, self._places.room, x.shape[1], x.shape[3], dtype=x.dtype, device=x.device
                )
                for x in (keys, values)
            )
            self.is_initialized = True
        self.keys[new, : keys.shape[2]] = keys.transpose(1, 2)
        self.values[new, : values.shape[2]] = values.transpose(1, 2)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]

    def grow(self, room: int) -> None:
        if self.keys is not None:
            more = room - self.keys.shape[1]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, 0, 0, more))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Store the states of one token a sequence, (n, heads, 1, dim), and return all of the window."""
        places = self._places
        at = places.index[: places.n], places.columns[: places.n]
        self.keys[at], self.values[at] = key_states[:, :, 0], value_states[:, :, 0]
        read = slice(places.n), slice(places.window)
        return self.keys[read].transpose(1, 2), self.values[read].transpose(1, 2)

    def get_seq_length(self) -> int:
        return self._places.window - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._places.window, 0


def _windows(length: int) -> int:
    return -(-length // WINDOW) * WINDOW
