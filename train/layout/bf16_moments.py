"""AdamW with moments in bf16, rounded stochastically: half the optimizer's memory.

DeepSeek-V3 keeps both moments in bf16 without a loss in quality (2024, arXiv 2412.19437, section 3.3).
Rounded to the nearest, a moment stands still once its change is below 2^-9 of it; rounded up or down by
chance, its expectation is exact (Gupta et al. 2015, arXiv 1502.02551). The chance is a hash of seed, step and
the element's place in the whole weight, so that every layout and a resumed run round alike.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.model.router_noise import mix

CHUNK = 2**22
"""Elements that are updated at a time, in fp32."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class PartOffset(NamedTuple):
    """Where a rank's part of a weight lies."""

    weight: int
    """Its number in the model."""
    first: int
    """Its first element in the whole weight."""


class Bf16MomentsAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) of fp32 weights, whose moments are kept in bf16.

    Args:
        groups: parameter groups.
        places: where this rank's part of each parameter lies.
        seed: of the rounding.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        places: dict[Tensor, PartOffset],
        seed: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.places, self.seed = places, seed
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; torch gives every moment its weight's precision."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].to(torch.bfloat16)

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if not state:
            # On the host, where reading it does not wait for a GPU.
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(p, dtype=torch.bfloat16) for name in MOMENTS}
        state["step"] += 1
        step = int(state["step"])
        place = self.places[p]
        key = mix(torch.full((), (self.seed * 1_000_003 + place.weight) ^ (step << 12), device=p.device))
        assert p.grad is not None
        flat = [_flat(tensor) for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
        for first in range(0, len(flat[0]), CHUNK):
            own, gradient, exp_avg, exp_avg_sq = (each[first : first + CHUNK] for each in flat)
            bits = _bits(place.first + first, len(own), key)
            _update_chunk(own, gradient, exp_avg, exp_avg_sq, bits, step, group)


def _update_chunk(
    p: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bits: Tensor,
    step: int,
    group: dict[str, Any],
) -> None:
    """AdamW of some elements: the weights move by the exact moments, of which the rounded are kept."""
    beta1, beta2 = group["betas"]
    first = exp_avg.float().lerp_(gradient, 1 - beta1)
    second = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    p.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))
    exp_avg.copy_(round_stochastically(first, bits & 0xFFFF))
    exp_avg_sq.copy_(round_stochastically(second, (bits >> 16) & 0xFFFF))


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 to one of the two nearest numbers of bf16, the nearer one more often; the mean is exact.

    Args:
        x: finite fp32 numbers.
        bits: equally distributed integers in [0, 2^16), int32.
    """
    # bf16 is the upper half of fp32: the lower half carries with the probability that it stands for.
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _bits(first: int, count: int, key: Tensor) -> Tensor:
    """32 random bits of each element, by its place in the whole weight."""
    places = torch.arange(first, first + count, device=key.device)
    return mix(mix(places) ^ mix(places >> 32) ^ key)


def _flat(tensor: Tensor) -> Tensor:
    """This rank's elements."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
