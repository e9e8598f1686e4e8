"""MegaBlocks' low-level operations in plain PyTorch, on any device, in place of its compiled extensions.

MegaBlocks imports two compiled modules, ``megablocks_ops`` and ``grouped_gemm``, and asks for a GPU when
Triton is imported. :func:`install` provides those that are missing; an installed ``megablocks_ops`` is used
as it is, ``grouped_gemm`` never, since :mod:`train.model.experts` has the grouped products. On a GPU, gather
and scatter are MegaBlocks' own; on a CPU, which has no Triton, :mod:`train.cpu` replaces them. Everything
above these operations is MegaBlocks' code.

Shapes: R routed rows (sorted by expert), N rows, E experts.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from train.cpu import permutation
from train.cpu.dispatch import with_cpu_version
from train.cpu.triton_driver import give_triton_a_driver
from train.model.recompute import is_dropped, remade
from train.recipe.schema import Recompute


def install() -> None:
    """Makes ``import megablocks`` work on this machine. Repeated calls are cheap."""
    give_triton_a_driver()
    for name, build in (("megablocks_ops", _megablocks_ops), ("grouped_gemm", _grouped_gemm)):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = build()
    ops: Any = importlib.import_module("megablocks.ops")
    if not hasattr(ops.gather, "plain"):
        ops.gather = _dropping(ops.gather)
    kernels = importlib.import_module("megablocks.backend.kernels")
    # Tuned by time, its block would differ between processes, and with it the order of its sum.
    del kernels._padded_copy_wgrad.configs[:-1]
    for cpu_version in (permutation.gather, permutation.scatter, permutation.scatter_wgrad):
        original = getattr(kernels, cpu_version.__name__)
        if not hasattr(original, "plain"):
            decorate = with_cpu_version(cpu_version, plain_if_compiled=False)
            setattr(kernels, cpu_version.__name__, decorate(original))


def _dropping(gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a gather whose result a layer drops if it drops what is gathered, and so can make again.

    Rows that came from other ranks it keeps, and orders only once.
    """

    @functools.wraps(gather)
    def gather_again(x: Tensor, *places: Any) -> Tensor:
        rows: Tensor = (
            remade(Recompute.elementwise, gather, x, *places) if is_dropped(x) else gather(x, *places)
        )
        return rows

    gather_again.plain = gather  # type: ignore[attr-defined]
    return gather_again


@with_cpu_version(permutation.sort)
def sort(x_R: Tensor, _end_bit: int, sorted_R: Tensor, places_R: Tensor) -> None:
    """Sorts small non-negative integers, stable and ascending, into ``sorted_R`` and ``places_R``."""
    values_R, order_R = torch.sort(x_R, stable=True)
    sorted_R.copy_(values_R)
    places_R.copy_(order_R)


def histogram(x_R: Tensor, bins: int) -> Tensor:
    """Counts of 0 .. bins - 1 in ``x_R``, as int32; of two dimensions, in each row."""
    # Not torch.bincount, which makes the host wait for a GPU.
    counts = torch.zeros(*x_R.shape[:-1], int(bins), dtype=torch.int32, device=x_R.device)
    return counts.scatter_add_(-1, x_R.long(), torch.ones_like(x_R, dtype=torch.int32))


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum along ``dim``, each element included in its own sum."""
    out.copy_(torch.cumsum(x, dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum along ``dim``, each element excluded from its own sum."""
    out.copy_(torch.cumsum(x, dim) - x)


def replicate_forward(x_NE: Tensor, ends_E: Tensor, out_NR: Tensor) -> None:
    """Writes column e of ``x_NE`` to the columns ``ends_E[e - 1]`` up to ``ends_E[e]`` of ``out_NR``."""
    columns_R = torch.arange(out_NR.shape[1], device=out_NR.device, dtype=ends_E.dtype)
    out_NR.copy_(x_NE[:, torch.searchsorted(ends_E, columns_R, right=True)])


def replicate_backward(grad_NR: Tensor, ends_E: Tensor, out_NE: Tensor) -> None:
    """Sums, for each input column, the columns that :func:`replicate_forward` copied it to."""
    columns_R = torch.arange(grad_NR.shape[1], device=grad_NR.device, dtype=ends_E.dtype)
    out_NE.zero_().index_add_(1, torch.searchsorted(ends_E, columns_R, right=True), grad_NR)


def _megablocks_ops() -> ModuleType:
    module = ModuleType("megablocks_ops", "Plain PyTorch in place of MegaBlocks' CUDA extension.")
    for operation in (
        sort,
        histogram,
        inclusive_cumsum,
        exclusive_cumsum,
        replicate_forward,
        replicate_backward,
    ):
        setattr(module, operation.__name__, operation)
    return module


def _grouped_gemm() -> ModuleType:
    module = ModuleType("grouped_gemm", "Only imported: train.model.experts has the grouped products.")
    module.ops = module.backend = None  # type: ignore[attr-defined]
    return module
