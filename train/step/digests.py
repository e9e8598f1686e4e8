"""Digests of bits: weighted sums of tensors read as integers, modulo 2^64.

Integers add up to the same sum in any order, so a digest depends neither on threads nor on kernels. Each
element has an odd weight of its own, so that any one changed element shows, and one that changes elsewhere
by as much gives another digest. It is read as a table, whose rows and columns are weighted and not its
elements: that needs no copy of the tensor.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of as many bytes."""
ROWS, COLUMNS = 0x2545F4914F6CDD1D, 0x1B03738712FAD5C9
"""Odd numbers without a pattern, by which places are multiplied."""


def digest(tensor: Tensor) -> Tensor:
    """The digest of this rank's part of a tensor, int64 scalar, on its device."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    bits = local.contiguous().view(-1).view(INTEGERS[local.element_size()])
    columns = max(1, math.isqrt(len(bits)))
    rows = len(bits) // columns
    table = bits[: rows * columns].view(rows, columns)
    places = torch.arange(max(rows + 1, columns), device=bits.device)
    # Odd plus even: an odd weight for every element.
    of_rows, of_columns = ROWS * (2 * places + 1), COLUMNS * (2 * places)
    last = bits[rows * columns :]
    sums = table.sum(dim=1, dtype=torch.int64), table.sum(dim=0, dtype=torch.int64)
    return (
        (sums[0] * of_rows[:rows]).sum()
        + (sums[1] * of_columns[:columns]).sum()
        + (last * (of_rows[rows] + of_columns[: len(last)])).sum()
    )


def digest_all(tensors: Iterable[Tensor]) -> Tensor:
    """The digest of several tensors in their order, int64 scalar; 0 of none."""
    found = [digest(tensor) for tensor in tensors]
    if not found:
        return torch.zeros((), dtype=torch.int64)
    # Odd factors keep a change of one digest a change of the sum, also modulo 2^64.
    factors = torch.arange(1, 2 * len(found), 2, device=found[0].device)
    return (torch.stack([each.to(found[0].device) for each in found]) * factors).sum()


def state_digest(model: nn.Module, optimizer: Optimizer) -> Tensor:
    """The digest of all that training carries from step to step on this rank: weights, buffers, moments."""
    weights = [*model.parameters(), *model.buffers()]
    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    moments = [each for state in states for each in state.values() if isinstance(each, Tensor)]
    return digest_all([*weights, *moments])


class LocalGradients:
    """The digest of this rank's own gradients, before they are summed over ranks.

    FSDP2 sums a unit's gradients as soon as it has them, so each is seen by a hook of its gathered weight.

    Args:
        model: the model, sharded or not.
    """

    def __init__(self, model: nn.Module) -> None:
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._units = list[tuple[int, nn.Module]](enumerate(sharded or [model]))
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, Tensor] = {}
        self._sum: Tensor | None = None

    def listen(self) -> None:
        """Starts a new digest, of the passes from here on."""
        self.take()
        for number, unit in self._units:
            hook = functools.partial(self._hook_weights, number)
            self._handles.append(unit.register_forward_pre_hook(hook))

    def stop(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()

    def take(self) -> Tensor:
        """Stops, and returns the digest since :meth:`listen`, int64 scalar; 0 if no gradient was seen."""
        self.stop()
        found, self._sum = self._sum, None
        return torch.zeros((), dtype=torch.int64) if found is None else found

    def _hook_weights(self, number: int, unit: nn.Module, _inputs: Any) -> None:
        for place, weight in enumerate(_own_weights(unit)):
            if weight.requires_grad and id(weight) not in self._hooked:
                self._hooked[id(weight)] = weight  # A tensor that is kept gives its id to no other.
                factor = 2 * (10_000 * number + place) + 1
                self._handles.append(weight.register_hook(functools.partial(self._add, factor)))

    def _add(self, factor: int, gradient: Tensor) -> None:
        part = digest(gradient) * factor
        self._sum = part if self._sum is None else self._sum + part


def _own_weights(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that a unit gathers, and those in it that every rank holds whole."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_weights(child)
