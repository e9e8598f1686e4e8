"""Upcycling: a dense model becomes a mixture of experts with the same loss.

Each expert is a copy of the dense feed-forward network (Komatsuzaki et al. 2023) or, with `--granularity G`,
one of G slices of its hidden units (He et al. 2024, "virtual groups"). The G slices of a copy share a router
row, so the top k = G x m experts are always m whole copies. Weights of the selected experts add up to 1 and
the slices' outputs are scaled by G, so the mixture's output equals the dense one's regardless of the router.
Training then differentiates the experts.

With `--shared S` the first S slices are not copied: they are the shared expert, for every token, and a copy
is the other G - S, which take the place of G above.

Shapes: D d_model, F dense hidden size, E experts, G granularity, P = G - S slices of a copy, N = E / P
copies; an expert has F / G hidden units. Expert e is slice S + e % P of copy e // P.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from train.hf.folders import OTHER_TOKENIZERS, READ_TOKENIZERS, SOURCE_FOLDER, tokenizer_folder_of
from train.hf.safetensors_io import TensorInfo
from train.hf.weights import Weights, open_weights
from train.hf.weights_folder import Written, write_weights_folder
from train.model.init import fill_rows
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Ffn, Model, Moe

ROUTER = "ffn.router.layer.weight"
EXPERTS = "ffn.experts.mlp."
SHARED = "ffn.shared."


def upcycle(
    source: Path, out: Path, moe: Moe, granularity: int = 1, seed: int = 17, shared: int = 0
) -> Written:
    """Streams the mixture's weights into a folder that recipes can start from.

    Args:
        source: a dense model: a run, a checkpoint, an imported folder or a Hugging Face folder.
        out: new, empty, or left unfinished by the same call.
        moe: experts and top-k; weights are always normalised to add up to 1.
        granularity: G, slices per dense feed-forward network.
        seed: seed of the router's initial rows.
        shared: slices that are the shared expert, fewer than G.

    Raises:
        UserError: if the numbers are incompatible, or the source is not a dense GLU model.
    """
    opened = open_weights(source)
    model = mixture_of(opened.model, replace(moe, normalize_weights_p=1), granularity, shared)
    weights = UpcycledWeights(opened.weights, model, granularity - shared, seed)
    origin = {"upcycled_from": str(opened.path), "granularity": granularity, "seed": seed, "shared": shared}
    folder = tokenizer_folder_of(source)
    files = (folder / name for name in (*READ_TOKENIZERS, *OTHER_TOKENIZERS))
    # The mixture's token ids mean what the source's do; a run that starts from it is held to that.
    kept = {f"{SOURCE_FOLDER}/{file.name}": file.read_bytes() for file in files if file.is_file()}
    return write_weights_folder(out, model, weights, origin | {"moe": asdict(moe)}, extra_files=kept)


def mixture_of(dense: Model, moe: Moe, granularity: int, shared: int = 0) -> Model:
    """Returns the mixture's architecture.

    Raises:
        UserError: if the numbers are incompatible, or the source is not a dense GLU model.
    """
    if dense.moe is not None or dense.ffn is not Ffn.glu:
        raise UserError("the source is already a mixture of experts, or its feed-forward is not a GLU")
    if shared >= granularity:
        raise UserError(f"{shared} shared slices leave none of granularity {granularity} to the experts")
    if dense.ffn_hidden_size % granularity:
        raise UserError(f"hidden size {dense.ffn_hidden_size} is not divisible by granularity {granularity}")
    slices = granularity - shared
    of_copy = f"granularity {granularity}" + (f" less {shared} shared slices" if shared else "")
    for name, number in (("experts", moe.experts), ("top-k", moe.top_k)):
        if number % slices:
            raise UserError(f"{name} {number} is not divisible by {of_copy}")
    if moe.top_k > moe.experts:
        raise UserError(f"top-k {moe.top_k} exceeds {moe.experts} experts")
    # Only training uses multi-token prediction; a run that starts from the mixture draws its own.
    width = dense.ffn_hidden_size // granularity
    moe = replace(moe, shared_hidden_size=shared * width or None)
    return replace(dense, moe=moe, mtp=False, ffn_hidden_size=width)


class UpcycledWeights:
    """The mixture's tensors, computed as they are read.

    Args:
        dense: the source.
        model: the mixture.
        slices: P, experts that are one copy of the source's hidden units, but for the shared expert's.
        seed: of the router.
    """

    def __init__(self, dense: Weights, model: Model, slices: int, seed: int) -> None:
        self._dense, self._model, self._slices, self._seed = dense, model, slices, seed
        assert model.moe is not None
        self._shared = model.moe.shared_hidden_size or 0
        self.tensors = {
            weight.name: TensorInfo(weight.name, dense.tensors[_source(weight.name)].dtype, weight.shape)
            for weight in sizes.weights(model)
        }

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows of a tensor of the mixture."""
        if name.endswith(ROUTER):
            return self._router(name)[first:last]
        if SHARED in name:
            dense = self._dense.read(_source(name))
            units = dense[:, : self._shared] if name.endswith("w2.weight") else dense[: self._shared]
            return units[first:last]
        if EXPERTS not in name:
            return self._dense.read(name, first, last)
        dense_FD = self._dense.read(_source(name))
        if name.endswith("w2"):
            dense_FD = dense_FD.t() * self._slices
        dense_FD = dense_FD[self._shared :]
        copies = self.tensors[name].shape[0] // dense_FD.shape[0]
        return dense_FD.repeat(copies, 1)[first:last]  # A copy's slices are its rows in their order.

    def _router(self, name: str) -> Tensor:
        """Draws N rows as for any router and repeats each for the slices of its copy."""
        info = self.tensors[name]
        copies = info.shape[0] // self._slices
        rows_ND = torch.empty(copies, *info.shape[1:])
        fill_rows(name, rows_ND, first_row=0, total_rows=copies, cfg=self._model, seed=self._seed)
        return rows_ND.repeat_interleave(self._slices, dim=0).to(info.dtype)


def _source(name: str) -> str:
    """Returns the dense tensor that gives a tensor of the mixture its values, or only its data type."""
    if name.endswith(ROUTER):
        return name.removesuffix(ROUTER) + "ffn.w1.weight"
    if EXPERTS in name:
        return name.replace(EXPERTS, "ffn.") + ".weight"
    return name.replace(SHARED, "ffn.")
