"""Faults that a rank has from within, for fault injection: what it computes, how fast, and what it reads."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.health.stragglers import HeartbeatCallback
from train.recipe.topology import Topology
from train.step.digests import INTEGERS
from train.step.step import TrainingStep

SLOW_SECONDS = 0.3
"""Delay of the slow rank in each step; several times a step of the tiny recipe."""
BIT = 22
"""Of fp32: half of a value or a third of it, which any sum shows."""


@contextlib.contextmanager
def _slow(_after: int) -> Iterator[None]:
    """Makes every step take longer."""
    move = HeartbeatCallback.before_forward

    def slowly(self: HeartbeatCallback, state: State, logger: Logger) -> None:
        time.sleep(SLOW_SECONDS)
        move(self, state, logger)

    with mock.patch.object(HeartbeatCallback, "before_forward", slowly):
        yield


def _not_a_number(gradient: Tensor) -> None:
    gradient.view(-1)[0] = torch.nan


def _flip(gradient: Tensor) -> None:
    bits = gradient.view(-1).view(INTEGERS[4])
    bits[int(gradient.abs().argmax())] ^= 1 << BIT


@contextlib.contextmanager
def _in_a_gradient(after: int, change: Callable[[Tensor], None]) -> Iterator[None]:
    """Changes a gradient of this rank, once, before it is summed over ranks where it is, else after."""
    judge = TrainingStep.after_train_batch

    def changed(self: TrainingStep, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == after:
            gradient = next(p.grad for p in state.model.parameters() if p.grad is not None)
            change(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
        judge(self, state, logger)

    with mock.patch.object(TrainingStep, "after_train_batch", changed):
        yield


@contextlib.contextmanager
def _reading_again(after: int) -> Iterator[None]:
    """Trains once on the sequences of the batch before."""
    begin, last = TrainingStep.batch_start, dict[str, Any]()

    def again(self: TrainingStep, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == after and last:
            state.batch = last["batch"]
        last["batch"] = state.batch
        begin(self, state, logger)

    with mock.patch.object(TrainingStep, "batch_start", again):
        yield


DISTURBANCES: dict[str, Callable[[int], contextlib.AbstractContextManager[None]]] = {
    "slow rank": _slow,
    "NaN": lambda after: _in_a_gradient(after, _not_a_number),
    "flipped bit": lambda after: _in_a_gradient(after, _flip),
    "wrong data": _reading_again,
}
"""By kind of fault; those that happen once do so in the batch after so many."""


def disturbed(
    work: Callable[[Topology], None], kind: str, rank: int, after: int
) -> Callable[[Topology], None]:
    """The work of a rank, disturbed if it is the one that the fault is of."""

    def disturbed_work(topology: Topology) -> None:
        is_struck = topology.rank == rank and kind in DISTURBANCES
        with DISTURBANCES[kind](after) if is_struck else contextlib.nullcontext():
            work(topology)

    return disturbed_work
