"""Known faults of pipelines, for :mod:`launch.verify.faults`."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn

from train.layout import optim, qk_clip
from train.model.pipeline import BACKWARD, Pipeline, Receipt
from train.step import step
from train.step.microbatch import MicrobatchModel
from train.step.pipelined import PipelinedBatch

_average = optim.average_replicated_gradients
_backward = PipelinedBatch._backward
_clip = optim.clip_gradients
_over_ranks = qk_clip.over_ranks
_receive = Pipeline.receive
_send = Pipeline.send
_reduce = dist.all_reduce
_update = step.update_bias


def keep_bias() -> AbstractContextManager[Any]:
    """Leaves the balancing bias of the stages after the first as it is."""

    def update(*given: Any) -> None:
        if dist.get_rank() == 0:
            _update(*given)

    return mock.patch.object(step, "update_bias", update)


def send_gradient_twice() -> AbstractContextManager[Any]:
    """Sends the gradient of every second microbatch twice, and that of the next never."""
    sent: list[Tensor] = []

    def send(self: Pipeline, x_BSD: Tensor, direction: int) -> None:
        if direction == BACKWARD:
            sent.append(x_BSD)
            x_BSD = sent[len(sent) // 2 * 2 - 2] if len(sent) > 1 else x_BSD
        _send(self, x_BSD, direction)

    return mock.patch.object(Pipeline, "send", send)


def take_earlier_activation() -> AbstractContextManager[Any]:
    """Gives each microbatch's second stage the activation that the microbatch before it has sent."""
    received: list[Receipt] = []

    def receive(self: Pipeline, shape: Sequence[int], like: Tensor, direction: int) -> Receipt:
        receipt = _receive(self, shape, like, direction)
        if direction == BACKWARD:
            return receipt
        received.append(receipt)
        earlier = received[-2] if len(received) > 1 else receipt
        return Receipt(receipt.work, earlier.x_BSD.detach())

    return mock.patch.object(Pipeline, "receive", receive)


def lose_norm_of_stage() -> AbstractContextManager[Any]:
    """Clips by the norm of all stages but the last."""

    def clip(*given: Any) -> Tensor:
        def reduce(square: Tensor, *given: Any) -> None:
            if dist.get_rank() == dist.get_world_size() - 1:
                square.zero_()
            _reduce(square, *given)

        with mock.patch.object(dist, "all_reduce", reduce):
            return _clip(*given)

    return mock.patch.object(step, "clip_gradients", clip)


def average_over_stages() -> AbstractContextManager[Any]:
    """Averages routers' gradients over all ranks, of whatever stage."""

    def average(parameters: Iterable[nn.Parameter], _: object = None) -> None:
        _average(parameters)

    return mock.patch.object(step, "average_replicated_gradients", average)


def keep_embeddings_apart() -> AbstractContextManager[Any]:
    """Leaves both stages that have the embedding with the gradient of their own part of the model."""
    return mock.patch.object(step, "sum_over_ends", lambda *_: None)


def count_embedding_twice() -> AbstractContextManager[Any]:
    """Counts the embedding of both stages that have it in the global norm."""

    def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, stages: int, _: object) -> Tensor:
        return _clip(parameters, max_norm, stages)

    return mock.patch.object(step, "clip_gradients", clip)


def clip_by_every_stage() -> AbstractContextManager[Any]:
    """Clips heads by their largest logits in any layer, as if a stage's first were every stage's."""

    def over_ranks(largest_LH: Tensor) -> Tensor:
        return _over_ranks(largest_LH).amax(dim=0, keepdim=True).expand_as(largest_LH)

    return mock.patch.object(qk_clip, "over_ranks", over_ranks)


def recompute_with_newest() -> AbstractContextManager[Any]:
    """Recomputes layers with the sequences of the microbatch that last went forward."""

    def backward(self: PipelinedBatch, *given: Any, **named: Any) -> None:
        with mock.patch.object(MicrobatchModel, "prepare", lambda *_: None):
            _backward(self, *given, **named)

    return mock.patch.object(PipelinedBatch, "_backward", backward)
