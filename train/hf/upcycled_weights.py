"""A dense model's weights read as those of the mixture that it becomes; see :mod:`train.hf.upcycle`.

Shapes: D d_model, F dense hidden size, E experts, G granularity, N = E / G copies; an expert has F / G
hidden units. Expert e is slice e % G of copy e // G.
"""

import torch
from torch import Tensor

from train.hf.safetensors_io import TensorInfo
from train.hf.weights import Weights
from train.model.init import fill_rows
from train.recipe import sizes
from train.recipe.schema import Model

ROUTER = "ffn.router.layer.weight"
EXPERTS = "ffn.experts.mlp."


class UpcycledWeights:
    """The mixture's tensors, made as they are read."""

    def __init__(self, dense: Weights, before: Model, after: Model, granularity: int, seed: int) -> None:
        self._dense, self._granularity, self._seed = dense, granularity, seed
        self._before, self._after = before, after
        self.tensors = {
            weight.name: TensorInfo(weight.name, dense.tensors[_source(weight.name)].dtype, weight.shape)
            for weight in sizes.weights(after)
        }

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor of the mixture."""
        last = self.tensors[name].shape[0] if last is None else last
        if name.endswith(ROUTER):
            return self._router(name)[first:last]
        if EXPERTS not in name:
            return self._dense.read(name, first, last)
        hidden = self._after.ffn_hidden_size
        parts = []
        while first < last:
            expert, row = divmod(first, hidden)
            count = min(hidden - row, last - first)
            start = expert % self._granularity * hidden + row
            parts.append(self._hidden_units(name, start, start + count))
            first += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _hidden_units(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a dense matrix by hidden unit: w1 and v1 as they are, w2 transposed and scaled."""
        source = _source(name)
        if not name.endswith("w2"):
            return self._dense.read(source, first, last)
        return self._dense.read(source).t()[first:last] * self._granularity

    def _router(self, name: str) -> Tensor:
        """N rows drawn as for any router, each repeated for the slices of its copy."""
        info = self.tensors[name]
        copies = info.shape[0] // self._granularity
        rows_ND = torch.empty(copies, *info.shape[1:])
        fill_rows(name, rows_ND, first_row=0, total_rows=copies, cfg=self._after, seed=self._seed)
        return rows_ND.repeat_interleave(self._granularity, dim=0).to(info.dtype)


def _source(name: str) -> str:
    """The dense tensor that a tensor of the mixture is made of, or takes its type from."""
    if name.endswith(ROUTER):
        return name.removesuffix(ROUTER) + "ffn.w1.weight"
    if EXPERTS in name:
        return name.replace(EXPERTS, "ffn.") + ".weight"
    return name
