"""Norms that read and write the precision of their input, also under autocast on a GPU.

Shapes: D model.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.cpu import norms as cpu_norms
from train.cpu.dispatch import with_cpu_version
from train.recipe.schema import Model, Norm


class LayerNorm(nn.LayerNorm):
    """torch's, without casts of its input and output on a GPU.

    ``casts_weight``: the weight, which is whole and fp32 on every rank, is cast to the input's precision, as
    FSDP2 casts those that it gathers.
    """

    casts_weight = False

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised input."""
        weight = self.weight.to(input.dtype) if self.casts_weight else self.weight
        with _norm_casts(input, weight):
            return layer_norm(input, weight, self.eps)


class RmsNorm(nn.RMSNorm):
    """torch's, without casts of its input and output on a GPU; ``casts_weight`` as of :class:`LayerNorm`."""

    casts_weight = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised input."""
        if self.casts_weight:
            weight = self.weight.to(x.dtype)
            with _norm_casts(x, weight):
                return functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        with _norm_casts(x, self.weight):
            return super().forward(x)


@with_cpu_version(cpu_norms.layer_norm)
def layer_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns x, whose last dimension is D, normalised in the precision of x, without bias."""
    return functional.layer_norm(x, weight_D.shape, weight_D, None, eps)


def make_norm(model: Model, device: torch.device | str | None) -> nn.Module:
    """Builds the recipe's normalisation over D, without bias."""
    if model.norm is Norm.rmsnorm:
        return RmsNorm(model.d_model, eps=model.norm_eps, device=device)
    return LayerNorm(model.d_model, eps=model.norm_eps, bias=False, device=device)


def _norm_casts(x: Tensor, weight: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which a norm reads and writes the precision of its input and weight.

    A kernel of a GPU computes a norm in fp32 whatever it reads. Autocast would cast its bf16 input to fp32
    first, and keep that, and the next product would cast the output back: five times the bytes.
    """
    if x.is_cuda and x.dtype == weight.dtype:
        return torch.autocast("cuda", enabled=False)
    return nullcontext()
