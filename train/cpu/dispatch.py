"""Dispatch by device: runs a CPU version of a function on a CPU, and the plain version elsewhere."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def with_cpu_version(cpu_version: Function) -> Callable[[Function], Function]:
    """Decorates a function of tensors so that ``cpu_version`` runs if its first argument is on a CPU.

    Both take the same arguments and agree up to rounding. The decorated function keeps the plain version,
    which all other devices run, as its attribute ``plain``.
    """

    def decorate(plain: Function) -> Function:
        @functools.wraps(plain)
        def by_device(x: Tensor, *args: Any, **keywords: Any) -> Any:
            function = cpu_version if x.device.type == "cpu" else plain
            return function(x, *args, **keywords)

        by_device.plain = plain  # type: ignore[attr-defined]
        return cast(Function, by_device)

    return decorate
