"""Dispatch by device: runs a CPU version of a function on a CPU, and the plain version elsewhere."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def with_cpu_version(
    cpu_version: Function, *, plain_if_compiled: bool = True
) -> Callable[[Function], Function]:
    """Decorates a function of tensors so that ``cpu_version`` runs if its first argument is on a CPU.

    Both take the same arguments and agree up to rounding. The decorated function keeps the plain version,
    which all other devices run, as its attribute ``plain``.

    Args:
        cpu_version: what runs on a CPU.
        plain_if_compiled: run the plain version where torch.compile traces, which fuses passes itself and
            would break the graph at writes into views. False for what cannot run on a CPU at all.
    """

    def decorate(plain: Function) -> Function:
        @functools.wraps(plain)
        def by_device(x: Tensor, *args: Any, **keywords: Any) -> Any:
            traced = plain_if_compiled and torch.compiler.is_compiling()
            function = cpu_version if x.device.type == "cpu" and not traced else plain
            return function(x, *args, **keywords)

        by_device.plain = plain  # type: ignore[attr-defined]
        return cast(Function, by_device)

    return decorate
