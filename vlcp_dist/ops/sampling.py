"""Sampling in which every draw is a function of its own seed: what is drawn beside it does not matter."""

import torch


def gumbel_noise(seeds: torch.Tensor, steps: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 (n, vocabulary): a function of a seed, a step and a token, all int64.

    The argmax of scores / temperature + noise is distributed as the softmax of scores / temperature. A batch drawn from
    one generator would make a sequence depend on the others. The bits are SplitMix64's.
    """
    token = torch.arange(vocabulary, device=seeds.device)
    key = _mix(_mix(seeds) + steps)[:, None] + token * _signed(0x9E3779B97F4A7C15)
    uniform = ((_mix(key) >> 11 & (1 << 53) - 1).double() + 0.5) / 2**53
    return -(-uniform.log()).log().float()


class GumbelNoise:
    """For `generate`: makes the argmax of its scores the same sample as a Decoder's."""

    def __init__(self, temperature: float, seeds: list[int]):
        self._temperature = temperature
        self._seeds = torch.tensor(seeds)
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
        steps = torch.full_like(self._seeds, input_ids.shape[1] - self._prompt).to(scores.device)
        return scores / self._temperature + gumbel_noise(self._seeds.to(scores.device), steps, scores.shape[1])


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer; shifts of torch's signed integers carry the sign, so it is masked out."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
