"""Faults of the update, for the parity gate to find: gradients, clipping, moments, decay, learning rate.

Each is a context in which a rank's process trains incorrectly, or a change that makes one of its optimizer;
:data:`launch.verify.faults.FAULTS` names them.
They are small: rounded gradients hide them in bf16 unless the update itself is compared.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from train import run
from train.layout import mesh
from train.layout.optim import average_replicated_gradients, clip_gradients
from train.step import step

SMALLER = 0.995
"""Factor of a gradient that is half a percent too small: less than bf16 rounds a single element by."""
CLIP_EPS = 1e-6


@contextlib.contextmanager
def with_optimizer(change: Callable[[nn.Module, Optimizer], None]) -> Iterator[None]:
    """Applies a change to a model's optimizer after it is built."""
    original = run.build_optimizer

    def build(model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer = original(model, *args, **kwargs)
        change(model, optimizer)
        return optimizer

    with mock.patch.object(run, "build_optimizer", build):
        yield


def reduce_in_bf16() -> AbstractContextManager[Any]:
    """Sums gradients over ranks in bf16, though the recipe asks for fp32."""
    policy = mesh.MixedPrecisionPolicy
    return mock.patch.object(
        mesh, "MixedPrecisionPolicy", lambda **given: policy(**given | {"reduce_dtype": torch.bfloat16})
    )


@contextlib.contextmanager
def scale_gradients(suffix: str, factor: float) -> Iterator[None]:
    """Scales the gradients of the parameters whose names end so."""
    found: list[nn.Parameter] = []

    def find(model: nn.Module, _: Optimizer) -> None:
        found.extend(p for name, p in model.named_parameters() if name.endswith(suffix))

    def average(parameters: Iterable[nn.Parameter], _: object = None) -> None:
        average_replicated_gradients(parameters)
        for parameter in found:
            assert parameter.grad is not None
            _own(parameter.grad).mul_(factor)

    with with_optimizer(find), mock.patch.object(step, "average_replicated_gradients", average):
        yield


def clip_by_own_norm() -> AbstractContextManager[Any]:
    """Clips by the norm of a rank's own shards, and reports the right one."""

    def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, *_: object) -> Tensor:
        held = list(parameters)
        norm = clip_gradients(held, None)
        shards = [_own(p.grad) for p in held if p.grad is not None]
        own = torch.stack(torch._foreach_norm(shards)).norm().item()
        assert max_norm is not None
        torch._foreach_mul_(shards, min(1.0, max_norm / (own + CLIP_EPS)))
        return norm

    return mock.patch.object(step, "clip_gradients", clip)


def round_moments(_: nn.Module, optimizer: Optimizer) -> None:
    """Keeps first moments in bf16."""

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            _round(state["exp_avg"])

    optimizer.register_step_post_hook(after_step)


def round_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """Keeps weights in bf16, without fp32 masters."""

    def after_step(*_: Any) -> None:
        for parameter in model.parameters():
            _round(parameter.data)

    optimizer.register_step_post_hook(after_step)


def decay_norms(_: nn.Module, optimizer: Optimizer) -> None:
    """Decays every parameter, norms too."""
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["weight_decay"] = decay


def decay_norms_unseen(model: nn.Module, optimizer: Optimizer) -> None:
    """The same by itself, so that no option of the optimizer says so."""

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        factor = 1 - groups[0]["lr"] * max(group["weight_decay"] for group in groups)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                _own(parameter.data).mul_(factor)

    optimizer.register_step_post_hook(after_step)


def lose_expert_rates(model: nn.Module, optimizer: Optimizer) -> None:
    """Trains experts with the recipe's own learning rate."""
    experts = {parameter for name, parameter in model.named_parameters() if ".experts." in name}
    for group in optimizer.param_groups:
        if not experts.isdisjoint(group["params"]):
            group["lr_scale"] = 1.0


def rate_of_one_rank() -> AbstractContextManager[Any]:
    """Halves the learning rate of every rank but the first."""
    original = step.learning_rate
    return mock.patch.object(
        step, "learning_rate", lambda *about: original(*about) * (0.5 if dist.get_rank() else 1.0)
    )


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _round(tensor: Tensor) -> None:
    own = _own(tensor)
    own.copy_(own.bfloat16())
