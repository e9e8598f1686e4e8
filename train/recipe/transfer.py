"""Transfer of rates from a small model: scales of initial weights and of learning rates, weight by weight.

Maximal-update parametrization (Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, table 3) for width,
with residual branches divided by the depth (Dey et al. 2025, CompleteP, arXiv 2505.01618, table 1, alpha =
1), for mixtures whose output is a mean over a token's experts (Jiang et al. 2026, arXiv 2601.20205), and for
Muon by the spectral condition (Yang, Simon and Bernstein 2023, arXiv 2310.17813, condition 1).

No activation is multiplied by anything: each published multiplier is part of its weight's initial scale and
rate. Adam, Lion and Muon do not see the size of a gradient, so a weight W that is multiplied by a is, with
eps / a, the weight a W of a times the initial scale and the rate, and of 1 / a times the decay. So the
model's function does not depend on these keys, and exports, generation and the planner know nothing of them.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from train.recipe import sizes
from train.recipe.errors import Violation
from train.recipe.schema import Model, Recipe, Score, TransferBase
from train.recipe.topology import Topology


class Scales(NamedTuple):
    """A weight's settings, as multiples of the recipe's."""

    std: float = 1.0
    """Of the initial values' standard deviation."""
    rate: float = 1.0
    """Of the learning rate; the decay per step stays, so the weight decay is divided by it."""
    eps: float = 1.0
    """Of AdamW's eps, which follows the size of the gradient."""


class _Ratios(NamedTuple):
    """Sizes of a model as multiples of its base's."""

    width: float
    depth: float
    attended: float
    """Of all heads together."""
    active: float
    """Experts per token."""


def transfer_base_of(model: Model) -> TransferBase:
    """Returns the sizes of a model, for others to be scaled from."""
    return TransferBase(
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        hidden_size=sizes.expert_width(model) if model.moe else model.ffn_hidden_size,
        top_k=model.moe.top_k if model.moe else 1,
    )


def transfer_scales(model: Model, name: str, *, orthogonal: bool = False) -> Scales:
    """Returns a weight's scales: 1 without `model.transfer_base`, and if the model has the base's sizes.

    Args:
        model: the recipe's model.
        name: the weight's name, with or without a prefix.
        orthogonal: Muon updates it.
    """
    base = model.transfer_base
    if base is None:
        return Scales()
    ratios = _Ratios(
        width=model.d_model / base.d_model,
        depth=model.n_layers / base.n_layers,
        attended=model.n_heads / base.n_heads,
        active=(model.moe.top_k if model.moe else 1) / base.top_k,
    )
    dotted = f".{name}"
    if ".wte." in dotted or dotted.endswith((".norm_f.weight", ".mtp.norm.weight")):
        return Scales(eps=1 / ratios.width)
    if ".lm_head." in dotted:
        return Scales(std=1 / ratios.width, rate=1 / ratios.width)
    if ".router." in dotted or ".shared_gate." in dotted:  # to a fixed number of outputs, as the logits are
        active = ratios.active if ".router." in dotted else 1.0
        return Scales(1 / ratios.width, 1 / ratios.width, 1 / (active * ratios.depth))
    if dotted.endswith(".Wqkv.bias"):  # added to activations that keep their size, as norms multiply them
        return Scales(eps=1 / (ratios.attended * ratios.depth))
    if "norm" in dotted.rsplit(".", 2)[-2]:
        return Scales(eps=1 / (ratios.width * ratios.depth))
    return _hidden(model, dotted, ratios, orthogonal)


def _hidden(model: Model, dotted: str, ratios: _Ratios, orthogonal: bool) -> Scales:
    """The scales of a matrix between two widths that grow."""
    base = model.transfer_base
    assert base is not None
    width, depth, active = ratios.width, ratios.depth, 1.0
    inner, sides = width, (model.d_model, base.d_model)
    if dotted.endswith((".Wqkv.weight", ".out_proj.weight")):
        inner, sides = ratios.attended, (sizes.query_width(model), base.n_heads * sizes.head_width(model))
    elif ".experts." in dotted or (model.moe is None and ".ffn." in dotted):
        hidden = sizes.expert_width(model) if model.moe is not None else model.ffn_hidden_size
        inner, sides, active = hidden / base.hidden_size, (hidden, base.hidden_size), ratios.active
    # Muon's update has the norm of the longer side's root (Liu et al. 2025); the condition is sqrt(out / in).
    longer = max(model.d_model, sides[0]) / max(base.d_model, sides[1])
    if dotted.endswith((".out_proj.weight", ".w2.weight", ".mlp.w2")):
        # Published as a branch divided by the depth; the initial scale already has a root of it.
        rate = math.sqrt(width / inner / longer) if orthogonal else 1 / inner
        return Scales(math.sqrt(width / depth) / inner, rate / depth, 1 / (active * width))
    rate = math.sqrt(inner / width / longer) if orthogonal else 1 / width
    in_branch = 1.0 if ".eh_proj." in dotted else depth
    return Scales(1 / math.sqrt(width), rate, 1 / (inner * in_branch * active))


def check_transfer(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    """Yields violations of what the published rules rest on."""
    model, key = recipe.model, "model.transfer_base"
    base, moe = model.transfer_base, model.moe
    if base is None:
        return
    if model.latent is not None:
        yield Violation(key, "has no rule for the ranks of model.latent", "remove either")
    elif base.n_heads * sizes.head_width(model) != base.d_model and model.head_width is None:
        what = f"has heads of {base.d_model} / {base.n_heads}, the model heads of {sizes.head_width(model)}"
        yield Violation(f"{key}.n_heads", what, "grow the number of heads with the width, not their width")
    if model.tie_embeddings:
        what = "needs a rate for the embedding and another for the output projection"
        yield Violation(key, what, "set model.tie_embeddings=false")
    if moe is not None and (moe.normalize_weights_p, moe.score) not in _MEANS:
        what = "needs weights of a token's experts that add up to the same for any number of them"
        yield Violation(key, what, "set model.moe.normalize_weights_p=1")


_MEANS = ((1.0, Score.softmax), (1.0, Score.sigmoid), (None, Score.softmax))
