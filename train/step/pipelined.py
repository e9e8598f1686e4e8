"""A batch through a pipeline: every stage's forward and backward passes, in the order of the schedule.

Composer runs one microbatch's forward and backward pass after the other. A pipeline has several in flight,
so Composer is given a batch as one microbatch: its forward pass does the work of all, and its backward pass,
of a number that nothing depends on, none.
"""

# ruff: noqa: N815  (shape suffixes)

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.layout.mesh import reduce_gradients
from train.model.decoder import DecoderOutput
from train.model.pipeline import BACKWARD, FORWARD, Pipeline, Receipt
from train.recipe.pipeline import Pass, passes
from train.recipe.schema import Parallelism
from train.step.microbatch import Batch, MicrobatchModel, split

See = Callable[[Batch, DecoderOutput, Tensor], None]


class Kept(NamedTuple):
    """Tensors that a forward pass leaves for its backward pass."""

    arrived_BSD: Tensor | None
    outputs: DecoderOutput
    loss: Tensor
    """The part's share of the batch's loss."""


class PipelinedBatch:
    """The passes of a batch on one stage.

    Args:
        model: the parts of the model that this rank has.
        layout: the recipe's.
        see: called with each microbatch, what it left on this rank, and its mean cross-entropy in nats per
            token, times the number of stages on the last of them and 0 on the others: so that the mean over
            ranks is that over sequences.
    """

    def __init__(self, model: MicrobatchModel, layout: Parallelism, see: See) -> None:
        assert model.decoder.pipeline is not None
        self.model, self.layout, self.see = model, layout, see
        self.pipeline: Pipeline = model.decoder.pipeline
        self.parts = model.decoder.parts
        self.microbatch_sequences = 1
        self.runs = model.decoder.transformer.runs

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Runs a batch in microbatches of ``microbatch_sequences``, for the gradients of their mean loss.

        Returns:
            The losses, whose means over all ranks are the batch's.
        """
        batches = split(batch, self.microbatch_sequences)
        order = passes(self.pipeline.stages, len(self.parts), len(batches), self.pipeline.stage)
        flying: dict[tuple[int, int], Kept] = {}
        done: dict[int, list[DecoderOutput]] = {}
        losses: dict[str, Tensor] = {}
        left = [len(batches)] * len(self.parts)
        coming = self._begin(order[0], batches)
        for place, each in enumerate(order):
            arrived_BSD = None if coming is None else coming.wait()
            # Received while this pass computes.
            coming = self._begin(order[place + 1], batches) if place + 1 < len(order) else None
            part, key = batches[each.microbatch], (each.chunk, each.microbatch)
            if each.is_forward:
                found, flying[key] = self._forward(part, each.chunk, arrived_BSD, len(batches))
                for name, loss in found.items():
                    losses[name] = losses.get(name, 0) + loss
                outputs = done.setdefault(each.microbatch, [])
                outputs.append(_without_gradients(flying[key].outputs))
                if len(outputs) == len(self.parts):
                    language = found["language"] * self.pipeline.stages
                    self.see(part, self.model.together(done.pop(each.microbatch), part), language)
                continue
            left[each.chunk] -= 1
            self._backward(part, each.chunk, flying.pop(key), arrived_BSD, is_last=not left[each.chunk])
        self.pipeline.finish()
        return {name: loss / len(batches) * self.pipeline.stages for name, loss in losses.items()}

    def _begin(self, each: Pass, batches: Sequence[Batch]) -> Receipt | None:
        """Begins to receive what a pass needs from another stage."""
        part = self.parts[each.chunk]
        if part.is_first if each.is_forward else part.is_last:
            return None
        direction = FORWARD if each.is_forward else BACKWARD
        return self.model.receive(self.pipeline, batches[each.microbatch], direction)

    def _forward(
        self, batch: Batch, chunk: int, arrived_BSD: Tensor | None, microbatches: int
    ) -> tuple[dict[str, Tensor], Kept]:
        """Runs a part; returns its losses, without gradients, and what its backward pass needs."""
        if arrived_BSD is not None:
            arrived_BSD.requires_grad_()
        outputs = self.model.run_part(batch, chunk, arrived_BSD)
        if outputs.hidden_BSD is not None:
            self.model.send(self.pipeline, outputs)
        losses = self.model.loss(outputs, batch, chunk=chunk)
        found = {name: loss.detach() for name, loss in losses.items()}
        return found, Kept(arrived_BSD, outputs, losses["total"] / microbatches)

    def _backward(
        self, batch: Batch, chunk: int, kept: Kept, gradient_BSD: Tensor | None, *, is_last: bool
    ) -> None:
        """Runs a part backwards from its own loss and from the gradient of what it returned."""
        arrived_BSD, outputs, loss = kept
        self.model.prepare(batch)
        run = self.runs[chunk] if len(self.runs) > 1 else None
        reduce_gradients(self.model.decoder, self.layout, after_this_pass=is_last, run=run)
        ends = [(outputs.hidden_BSD, gradient_BSD)] if outputs.hidden_BSD is not None else []
        if loss.requires_grad:
            ends.append((loss, None))
        torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])
        if arrived_BSD is not None:
            assert arrived_BSD.grad is not None
            self.pipeline.send(arrived_BSD.grad, BACKWARD)


def _without_gradients(outputs: DecoderOutput) -> DecoderOutput:
    """Returns the outputs of a pass without their graph and without its activations, which were sent."""
    detached = [each.detach() if isinstance(each, Tensor) else each for each in outputs]
    return DecoderOutput._make(detached)._replace(hidden_BSD=None)
