"""Quantities of a step that the parity gate compares: weights, gradients, moments and settings, by parameter.

Tensors are gathered from their shards, or copied and compared row by row where a collective would be needed.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from composer.core import State
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from train.model.init import own_part
from train.step.language_model import LanguageModel

Named = dict[str, nn.Parameter]
"""Parameters that are trained, by name."""


def settings_of(optimizer: Optimizer, parameters: Named) -> dict[str, str]:
    """Everything about an update that is no tensor of weights, in words that are equal only if it is.

    Of each parameter: its precision, the options of its group, among them learning rate and decay; and of
    its state the precision of each moment and every scalar, such as the number of steps.
    """
    options = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        found[f"{name}: precision"] = str(parameter.dtype)
        for option, value in options.get(parameter, {}).items():
            if isinstance(value, int | float | str | tuple | list) and option != "params":
                found[f"{name}: {option}"] = repr(value)
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.ndim:
                found[f"{name}: precision of {key}"] = str(value.dtype)
            else:
                found[f"{name}: {key}"] = repr(float(value)) if isinstance(value, Tensor) else repr(value)
    return found


def moments_of(optimizer: Optimizer, parameters: Named) -> Iterator[tuple[str, Tensor]]:
    """Yields the optimizer's tensors of each parameter's shape, named by parameter and key."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield f"{name}: {key}", value


def trained(decoder: nn.Module) -> Named:
    """A decoder's parameters that are not frozen."""
    return {name: p for name, p in decoder.named_parameters() if p.requires_grad}


def decoder_of(state: State) -> nn.Module:
    """The decoder that Composer trains."""
    assert isinstance(state.model, LanguageModel)
    return state.model.decoder


def step_of(state: State) -> int:
    """Steps that are complete."""
    return state.timestamp.batch.value


@torch.no_grad()
def set_rows(tensors: Iterable[tuple[str, Tensor]], whole: dict[str, Tensor]) -> None:
    """Copies this rank's parts of full tensors into its own."""
    for name, tensor in tensors:
        local, row, column = own_part(tensor)
        local.copy_(whole[name][row : row + len(local)][..., column : column + local.shape[-1]])


def gradients_of(parameters: Named) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter's gradient, as it is sharded."""
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        yield name, parameter.grad


def weights_of(state: State) -> list[tuple[str, Tensor]]:
    """Parameters, and the routers' expert bias, which is a buffer."""
    decoder = decoder_of(state)
    biases = ((name, buffer) for name, buffer in decoder.named_buffers() if "expert_bias" in name)
    return [*decoder.named_parameters(), *biases]


def whole_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor, all-gathered from its shards, one at a time."""
    for name, tensor in tensors:
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def copies_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies tensors that the next step changes."""
    return {name: tensor.clone() for name, tensor in tensors}


def rms(tensors: dict[str, Tensor]) -> float:
    """Root of the mean square over all elements."""
    square = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    return math.sqrt(square / (sum(tensor.numel() for tensor in tensors.values()) or 1))


def kind_of(moment: str) -> str:
    """The key of a moment's name, `exp_avg` for example."""
    return moment.rpartition(": ")[2]
