"""Flipped bits on one rank, as a faulty chip, memory or link makes them: for the check `--corruption`.

A stuck fault has a place: the same bit of the same element is wrong each time that it is used. A loose one
has none: each use flips a bit of another element.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from train.model.decoder import Block
from train.step.digests import INTEGERS

LOWEST_BIT, HIGHEST_BIT = 16, 30
"""Of fp32: from a 128th of a value up to its exponent's highest bit. Lower bits are mostly rounded away."""
COLLECTIVES = tuple(
    next(name for name in names if hasattr(dist, name))
    for names in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
        ("all_to_all_single",),
    )
)
"""Those that training waits for most; the first two have a newer name from torch 2.13 on."""
OUTPUT = ("output", "output_tensor")
"""Names of the tensor that they fill."""


@dataclass
class BitFlip:
    """Flips bits of tensors, on the rank that has it."""

    seed: int
    is_stuck: bool = False
    """The same bit of the same element is wrong each time; False: drawn for each use."""
    stays: bool = False
    """The tensor keeps what was flipped, so that a stuck bit is set and not flipped back by the next use."""
    most: int | None = None
    """Uses that are wrong; None: all."""
    is_on: bool = False
    """False: nothing is wrong yet."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.uses = 0
        self._place: tuple[int, int, int] | None = None

    def __call__(self, tensor: Tensor) -> None:
        """Flips a bit of an fp32 tensor in place, or sets the one that is stuck."""
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if not local.numel() or local.dtype is not torch.float32 or not local.is_contiguous():
            return
        if not self.is_on or (self.most is not None and self.uses >= self.most):
            return
        self.uses += 1
        bits = local.view(-1).view(INTEGERS[4])
        if not self.is_stuck or self._place is None:
            element, bit = self.random.randrange(len(bits)), self.random.randint(LOWEST_BIT, HIGHEST_BIT)
            self._place = element, bit, 1 - (int(bits[element]) >> bit & 1)
        element, bit, value = self._place
        is_wrong = int(bits[element]) >> bit & 1 == value
        if not (self.stays and is_wrong):
            bits[element] ^= 1 << bit


class Beginning(Callback):
    """Switches a fault on. Of one at rest, it flips the bit of a weight itself, after the update.

    Args:
        flip: of this rank.
        batch: the first with a wrong bit, from 1.
        at_rest: whether the fault is one of memory. Must follow the training step.
    """

    def __init__(self, flip: BitFlip, batch: int, *, at_rest: bool) -> None:
        self.flip, self.batch, self.at_rest = flip, batch, at_rest

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Switches it on."""
        self.flip.is_on = state.timestamp.batch.value + 1 >= self.batch

    def batch_end(self, state: State, logger: Logger) -> None:
        """Flips a bit at rest, once."""
        if self.at_rest and state.timestamp.batch.value == self.batch:
            weights = [weight for weight in state.model.parameters() if weight.ndim > 1]
            self.flip(weights[self.flip.seed % len(weights)])


def flip_gathered_weight(decoder: nn.Module, flip: BitFlip) -> None:
    """Flips a bit of a weight as a rank's products read it."""
    unit = _unit(decoder, flip.seed)

    def hook(module: nn.Module, _inputs: Any) -> None:
        with torch.no_grad():
            flip(next(p for p in module.parameters() if p.ndim > 1))

    unit.register_forward_pre_hook(hook)


def flip_activation(decoder: nn.Module, flip: BitFlip) -> None:
    """Flips a bit of what a layer returns."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        changed = first.clone()
        flip(changed)
        return (changed, *rest) if rest else changed

    # Of the last layer, tokens without a target are read by nothing.
    next(module for module in decoder.modules() if isinstance(module, Block)).register_forward_hook(hook)


def flip_gradient(decoder: nn.Module, flip: BitFlip) -> None:
    """Flips a bit of a weight's gradient, before it is summed over ranks."""
    hooked = set[int]()

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        flip(changed)
        return changed

    def hook(module: nn.Module, _inputs: Any) -> None:
        weight = next(p for p in module.parameters() if p.ndim > 1)
        if weight.requires_grad and id(weight) not in hooked:
            hooked.add(id(weight))
            weight.register_hook(change)

    _unit(decoder, flip.seed).register_forward_pre_hook(hook)


@contextlib.contextmanager
def flip_received(flip: BitFlip, *, exchanges: bool) -> Iterator[None]:
    """Flips a bit of what a rank receives in one kind of collective.

    Args:
        flip: of this rank.
        exchanges: whether ranks exchange tokens; if not, only weights and gradients are received.
    """
    names = COLLECTIVES if exchanges else COLLECTIVES[:2]
    name = names[flip.seed % len(names)]
    original = getattr(dist, name)

    def received(*args: Any, **kwargs: Any) -> Any:
        work = original(*args, **kwargs)
        if flip.is_on:
            if work is not None:
                work.wait()
            flip(args[0] if args else next(kwargs[key] for key in OUTPUT if key in kwargs))
        return work

    with mock.patch.object(dist, name, received):
        yield


def _unit(decoder: nn.Module, seed: int) -> nn.Module:
    """One of the layers' units whose weights are gathered together; of embeddings, some are not read."""
    layers = [module for module in decoder.modules() if isinstance(module, Block)]
    units = [module for layer in layers for module in layer.modules() if isinstance(module, FSDPModule)]
    return (units or layers)[seed % len(units or layers)]
