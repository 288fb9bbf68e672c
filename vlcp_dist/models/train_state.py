"""What a training must keep: weights, their moving average and the optimizer's moments, whole for any process count.

ZeRO's own checkpoints hold one part per process and load into as many processes only. Here parts are put together
when they are saved and shared out when they are loaded, so a training goes on with fewer workers, or another strategy.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str], Tensor]


class Ema:
    """The moving average of parameters, of which every process keeps its share (each `world`-th).

    The decay grows with the steps, (1 + t) / (10 + t), up to `decay`, and is 0 at the first: as diffusers' EMAModel.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, *, rank: int, world: int):
        self._decay, self._rank, self._world = decay, rank, world
        self._parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self._parameters[rank::world]]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, the first being 0."""
        decay = min(self._decay, (1 + step) / (10 + step)) if step else 0.0
        mine = [p.detach() for p in self._parameters[self._rank :: self._world]]
        torch._foreach_lerp_(self.shadow, mine, 1.0 - decay)

    def whole(self) -> Iterator[Tensor]:
        """The average of every parameter in turn, in every process. All must ask together."""
        for i, parameter in enumerate(self._parameters):
            owner, position = i % self._world, i // self._world
            value = self.shadow[position] if owner == self._rank else torch.empty_like(parameter)
            if self._world > 1:
                dist.broadcast(value, src=owner)
            yield value

    @torch.no_grad()
    def load(self, values: Sequence[str], read: Read) -> None:
        for shadow, name in zip(self.shadow, values[self._rank :: self._world], strict=True):
            shadow.copy_(read(name))


def optimizer_state(named: Sequence[tuple[str, nn.Parameter]], optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """The moments of every parameter in turn. All processes must ask together."""
    for name, parameter in named:
        for moment in MOMENTS:
            if is_partitioned(optimizer):
                from deepspeed.utils import safe_get_full_optimizer_state

                yield f"{moment}.{name}", safe_get_full_optimizer_state(parameter, moment)
            else:
                yield f"{moment}.{name}", optimizer.state[parameter][moment]


@torch.no_grad()
def load_weights(named: Sequence[tuple[str, nn.Parameter]], optimizer: Any, read: Read) -> None:
    """Give the parameters, and ZeRO's own copies of them, the values that `read` has for their names."""
    for name, parameter in named:
        value = read(name).to(parameter.device)
        parameter.copy_(value)
        if is_partitioned(optimizer):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)


@torch.no_grad()
def load_optimizer(named: Sequence[tuple[str, nn.Parameter]], optimizer: Any, step: int, read: Read) -> None:
    """Set the optimizer to where it was after `step` steps."""
    if is_partitioned(optimizer):
        _load_partitions(named, optimizer, step, read)
        return
    for name, parameter in named:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),  # where the fused kernel wants it
            # As the weights lie in memory (channels last or not): the fused kernel goes by that alone.
            **{moment: torch.empty_like(parameter).copy_(read(f"{moment}.{name}")) for moment in MOMENTS},
        }


def _load_partitions(named: Sequence[tuple[str, nn.Parameter]], optimizer: Any, step: int, read: Read) -> None:
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    inner = optimizer.optimizer
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        # The state appears at the first step: it is made here as that step would.
        inner.state[flat] = {
            "step": torch.tensor(float(step), device=flat.device),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
        lazy_init_hp_params_optimizer_state(group, flat, inner.state)
    for name, parameter in named:
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, read(f"{moment}.{name}").to(parameter.device), moment)


def is_partitioned(optimizer: Any) -> bool:
    """Whether it is DeepSpeed's ZeRO, around another optimizer."""
    return hasattr(optimizer, "single_partition_of_fp32_groups")


def check_shapes(named: Sequence[tuple[str, nn.Parameter]], stored: dict[str, list[int]], where: str) -> None:
    """Refuse the weights of another network.

    Raises:
        ValueError: a parameter is missing or has another shape; the message names it with both.
    """
    model = {name: list(parameter.shape) for name, parameter in named}
    for name in sorted(model.keys() | stored.keys()):
        if model.get(name) != stored.get(name):
            raise ValueError(
                f"{where} is of another U-Net: {name} is {stored.get(name, 'not there')} in it and "
                f"{model.get(name, 'not there')} in this model; delete it to start again, or give the model it is of"
            )
