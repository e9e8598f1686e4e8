"""Norms by layer: what comes out of it, its gradient, its update and its weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from train.layout.optim import holders
from train.model.decoder import Decoder
from train.record import metrics

# Shapes: P parameters, L layers.


class LayerNorms(Callback):
    """Logs ``layers/LAYER/...`` every so many batches; every rank has one, since gradients are sharded.

    Norms are L2, of the whole unsharded layer, in float64 over its parameters. The gradient is the one that
    the optimizer gets: clipped, averaged over ranks. The activation is the residual stream after the layer in
    the batch's first microbatch, its root mean square on rank 0, of a pipeline on its first ranks. For the
    update, a copy of the layers' shards lies in host memory during the step.

    Args:
        decoder: the model to watch, sharded where it is.
        interval_batches: batches between measurements.
        sees_layers: whether activations can be seen: not where the whole decoder is compiled as one graph.
    """

    def __init__(self, decoder: Decoder, interval_batches: int, *, sees_layers: bool = True) -> None:
        self.blocks, self.pipeline = list(decoder.transformer.blocks), decoder.pipeline
        self.interval, self.sees_layers = interval_batches, sees_layers
        parameters = [(place, p) for place, block in enumerate(self.blocks) for p in block.parameters()]
        self.layer_of = [place for place, _ in parameters]
        self.parameters: list[nn.Parameter] = [p for _, p in parameters]
        self._hooks: list[RemovableHandle] = []
        self._activations: dict[int, Tensor] = {}
        self._before: list[Tensor] = []
        self._squares: dict[str, Tensor] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begins to watch the layers' outputs in a batch that is due."""
        if (state.timestamp.batch.value + 1) % self.interval or not self.sees_layers:
            return
        self._activations.clear()
        for place, block in enumerate(self.blocks):
            self._hooks.append(block.register_forward_hook(self._noting(place)))

    def before_backward(self, state: State, logger: Logger) -> None:
        """Ends watching after the first microbatch's forward pass; recomputation would come again."""
        self._unhook()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Measures gradients and copies the weights; of a skipped update there is nothing to measure."""
        self._before.clear()
        if (state.timestamp.batch.value + 1) % self.interval or all(p.grad is None for p in self.parameters):
            return
        zero = torch.zeros((), device=self.parameters[0].device)
        gradients = [zero if p.grad is None else _local(p.grad).norm() for p in self.parameters]
        self._squares = {metrics.LAYER_GRADIENT: self._squared(gradients)}
        # Detached copies in host memory: on a GPU there may be no room.
        self._before = [_local(p.detach()).to("cpu", copy=True) for p in self.parameters]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Measures the update, and logs."""
        if not self._before:
            return
        pairs = list(zip(self.parameters, self._before, strict=True))
        with torch.no_grad():
            weights = [_local(p).norm() for p, _ in pairs]
            updates = [(_local(p) - before.to(p.device)).norm() for p, before in pairs]
        self._before = []
        squares = {
            **self._squares,
            metrics.LAYER_UPDATE: self._squared(updates),
            metrics.LAYER_WEIGHTS: self._squared(weights),
        }
        together = torch.stack(list(squares.values()))
        if any(isinstance(p, DTensor) for p in self.parameters):
            dist.all_reduce(together)
        figures = {
            metrics.of_layer(key, layer): math.sqrt(square)
            for key, of_layers in zip(squares, together.tolist(), strict=True)
            for layer, square in enumerate(of_layers)
        }
        for layer, rms in self._seen_activations().items():
            figures[metrics.of_layer(metrics.LAYER_ACTIVATION, layer)] = rms
        logger.log_metrics(figures)

    def close(self, state: State, logger: Logger) -> None:
        """Removes the hooks of a batch that was not finished."""
        self._unhook()

    def _seen_activations(self) -> dict[int, float]:
        """The root mean squares of this rank's layers, and of the other stages' of its pipeline."""
        seen, self._activations = self._activations, {}
        if self.pipeline is None or not self.sees_layers:
            return {layer: rms.item() for layer, rms in seen.items()}
        every_L = torch.zeros(len(self.blocks), device=self.parameters[0].device)
        for layer, rms in seen.items():
            every_L[layer] = rms
        dist.all_reduce(every_L, group=self.pipeline.group)
        return dict(enumerate(every_L.tolist()))

    def _squared(self, norms: list[Tensor]) -> Tensor:
        """This rank's share of the layers' squared norms, [L] float64; the sum over ranks is the whole."""
        squares_P = torch.stack(norms).double().square()
        world = dist.get_world_size() if any(isinstance(p, DTensor) for p in self.parameters) else 1
        stage = world if self.pipeline is None else world // self.pipeline.stages
        shared = torch.tensor([holders(p, stage) for p in self.parameters], dtype=torch.float64)
        place = torch.tensor(self.layer_of, device=squares_P.device)
        zeros_L = squares_P.new_zeros(len(self.blocks))
        return zeros_L.index_add(0, place, squares_P / shared.to(squares_P.device))

    def _noting(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            if layer in self._activations:  # of a later microbatch in a pipeline, or computed again
                return
            x_BSD = outputs[0].detach()
            norm = torch.linalg.vector_norm(x_BSD, dtype=torch.float32)
            self._activations[layer] = norm / math.sqrt(x_BSD.numel())

        return note

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
