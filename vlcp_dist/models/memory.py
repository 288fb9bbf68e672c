"""What a captioner needs of a GPU's memory, in plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# CUDA's context, kernels' workspaces and what an allocator cannot hand out again.
OVERHEAD = 1.5 * 2**30


@dataclass(frozen=True)
class Need:
    """The shape of a decoder and what it is asked for, in elements and tokens.

    `tokens` is the longest sequence (prompt, image tokens and answer); `prefill` the prompts that are run together.
    """

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    tokens: int
    prefill: int
    dtype: str
    batch_size: int

    @property
    def weights(self) -> int:
        return self.parameters * BYTES[self.dtype]

    @property
    def sequence(self) -> int:
        """Keys and values of one sequence: 2 x layers x kv_heads x head_dim x tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.tokens * BYTES[self.dtype]

    @property
    def working(self) -> int:
        """A layer's activations while prompts are run, and their keys and values before they are in their places.

        Residual, normed input, queries and output (4 x hidden) and the gated MLP's three tensors are alive at once.
        """
        together = min(self.prefill, self.batch_size)
        activations = together * self.tokens * (4 * self.hidden + 3 * self.intermediate) * BYTES[self.dtype]
        return activations + together * self.sequence

    @property
    def total(self) -> int:
        """Bytes: weights + batch_size x sequence + working + overhead."""
        return int(self.weights + self.batch_size * self.sequence + self.working + OVERHEAD)


def largest_batch(need: Need, available: int) -> int:
    """The largest batch, up to the one asked for, with which all fits into `available` bytes; 0 if not even one."""
    low, high = 0, need.batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if replace(need, batch_size=middle).total <= available:
            low = middle
        else:
            high = middle - 1
    return low


def too_small(need: Need, available: int, gpu: str) -> str:
    """What to say when not even one sequence fits: the numbers, and settings that would fit."""
    one = replace(need, batch_size=1)
    text = (
        f"{gpu} has {_gib(available)} free, and captioning one image at a time needs {_gib(one.total)}: weights "
        f"{_gib(one.weights)} in {need.dtype}, {_gib(one.sequence)} for a sequence of {need.tokens} tokens, "
        f"{_gib(one.working)} while its prompt is run, {_gib(int(OVERHEAD))} for CUDA."
    )
    ways = []
    half = replace(need, dtype="bfloat16")
    if need.dtype == "float32" and (batch := largest_batch(half, available)):
        ways.append(
            f"caption.dtype=bfloat16 with caption.batch_size={batch} needs {_gib(replace(half, batch_size=batch).total)}"
        )
    ways.append(f"a GPU with {_gib(one.total)} free or more, the whole of it for one worker (engine.gpus_per_worker=1)")
    ways.append("a caption.model with fewer parameters")
    return text + " What would fit: " + "; ".join(ways)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
