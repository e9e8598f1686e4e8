"""Known faults of tensor parallelism, for :mod:`launch.verify.faults`."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from train.layout import optim
from train.model import tensor_parallel
from train.model.moe import MoE, MoEAux
from train.model.router import Router
from train.model.tensor_parallel import TensorGroup
from train.step import step

_average = optim.average_replicated_gradients
_sum = TensorGroup.sum_to_parts
_backward = tensor_parallel._Columns.backward
_decide = Router.forward
_mix = MoE.forward


def keep_own_norms() -> AbstractContextManager[Any]:
    """Leaves each rank the norms' gradients of its own tokens."""

    def average(parameters: Iterable[nn.Parameter], _: object = None) -> None:
        _average(p for p in parameters if p.ndim > 1)

    return mock.patch.object(step, "average_replicated_gradients", average)


def add_own_sums_twice() -> AbstractContextManager[Any]:
    """Adds a rank's own partial sums to what all ranks have added up, as if they were a bias of each."""

    def sums(self: TensorGroup, x_BSD: Tensor) -> Tensor:
        return _sum(self, x_BSD) + self.part(x_BSD)

    return mock.patch.object(TensorGroup, "sum_to_parts", sums)


def keep_own_input_gradients() -> AbstractContextManager[Any]:
    """Leaves each rank what its share of a product gives for the gradient of its tokens."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with mock.patch.object(TensorGroup, "sum_to_parts", TensorGroup.part):
            return _backward(ctx, *grads)

    return mock.patch.object(tensor_parallel._Columns, "backward", staticmethod(backward))


def sum_norms(ranks: int) -> AbstractContextManager[Any]:
    """Sums norms' gradients over a group of ranks, where the mean over all is due."""

    def average(parameters: Iterable[nn.Parameter], _: object = None) -> None:
        whole = list(parameters)
        _average(whole)
        for parameter in whole:
            if parameter.ndim == 1 and parameter.grad is not None:
                parameter.grad *= ranks

    return mock.patch.object(step, "average_replicated_gradients", average)


def sum_routers(ranks: int) -> AbstractContextManager[Any]:
    """Multiplies the gradients of routers by the ranks of a group."""
    seen: set[Router] = set()

    def decide(self: Router, *inputs: Any) -> Any:
        if self.layer.weight.requires_grad and self not in seen:
            seen.add(self)
            self.layer.weight.register_hook(lambda gradient: gradient * ranks)
        return _decide(self, *inputs)

    return mock.patch.object(Router, "forward", decide)


def dispatch_twice() -> AbstractContextManager[Any]:
    """Sends each token to its experts once for every rank of a group of two, which add up what returns."""

    def mix(self: MoE, x_BSD: Tensor) -> tuple[Tensor, MoEAux]:
        out_BSD, aux = _mix(self, torch.cat([x_BSD, x_BSD], dim=1))
        return torch.stack(out_BSD.chunk(2, dim=1)).sum(dim=0), aux

    return mock.patch.object(MoE, "forward", mix)


def keep_heads() -> AbstractContextManager[Any]:
    """Attends with the heads that a rank has computed, of whatever kind they are."""

    def exchange(_: TensorGroup, qkv_BSMR: Tensor, __: Sequence[int]) -> Tensor:
        return qkv_BSMR

    return mock.patch.object(TensorGroup, "exchange_heads", exchange)
