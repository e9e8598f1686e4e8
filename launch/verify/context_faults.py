"""Known faults of context parallelism, for :mod:`launch.verify.faults`."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from train.model import attention, decoder
from train.model.attention import AttentionPlan
from train.model.context import Context
from train.model.decoder import DecoderOutput
from train.model.loss import IGNORE
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch

_plan = decoder.plan_attention
_decode = LanguageModel._decode
_loss = LanguageModel.loss
_gather = Context.gather


def lose_border_targets() -> AbstractContextManager[Any]:
    """Ignores the last target of every chunk."""

    def decode(self: LanguageModel, batch: Batch, choices_only: bool = False) -> DecoderOutput:
        assert self.context is not None
        targets_BS = batch["targets"].clone()
        targets_BS.unflatten(1, (2 * self.context.ranks, -1))[..., -1] = IGNORE
        return _decode(self, batch | {"targets": targets_BS}, choices_only)

    return mock.patch.object(LanguageModel, "_decode", decode)


def count_from_zero() -> AbstractContextManager[Any]:
    """Rotates a rank's tokens as if they were the first of their sequences."""

    def plan(model: Any, batch: int, length: int, **keywords: Any) -> AttentionPlan:
        right = _plan(model, batch, length, **keywords)
        if right.cos_SR is None:
            return right
        tables = attention._rotations(model, torch.arange(length))
        return right._replace(cos_SR=tables[0].to(right.cos_SR), sin_SR=tables[1].to(right.cos_SR))

    return mock.patch.object(decoder, "plan_attention", plan)


def average_keys() -> AbstractContextManager[Any]:
    """Divides the gradients of gathered keys and values by the ranks that have gathered them."""

    def gather(self: Context, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        whole = _gather(self, k, v)
        for x in whole:
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient / self.ranks)
        return whole

    return mock.patch.object(Context, "gather", gather)


def shift_keys() -> AbstractContextManager[Any]:
    """Attends to each place's keys by the place before it."""

    def gather(self: Context, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        whole_k, whole_v = _gather(self, k, v)
        return whole_k.roll(1, dims=1), whole_v

    return mock.patch.object(Context, "gather", gather)


def divide_by_whole() -> AbstractContextManager[Any]:
    """Divides the summed losses by the positions of whole sequences."""

    def loss(self: LanguageModel, outputs: DecoderOutput, batch: Batch, *_: Any) -> dict[str, Tensor]:
        assert self.context is not None
        return _loss(self, outputs._replace(loss_sum=outputs.loss_sum / self.context.ranks), batch)

    return mock.patch.object(LanguageModel, "loss", loss)


@contextlib.contextmanager
def swap_documents() -> Iterator[None]:
    """Takes the documents of the early chunk for those of the late one, and the reverse."""

    def other_part(self: Context, x_BS: Tensor) -> Tensor:
        chunks = x_BS.chunk(2 * self.ranks, dim=1)
        return torch.cat([chunks[-1 - self.rank], chunks[self.rank]], dim=1)

    def plan(*args: Any, **keywords: Any) -> AttentionPlan:
        with mock.patch.object(Context, "part", other_part):
            return _plan(*args, **keywords)

    with mock.patch.object(decoder, "plan_attention", plan):
        yield
