"""Recomputation by grade (:class:`train.recipe.schema.Recompute`): bytes that a layer keeps and makes again
in its backward pass, and the work of that. Needs no torch.

Derived from what :mod:`train.model.recompute` drops, and tested against what a step allocates.
Legend: T tokens, D d_model, Q width of all queries, G of all keys, F ffn_hidden_size, K top_k, E experts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from launch.plan.activations import (
    FP32,
    Microbatch,
    Numerics,
    attention_bytes,
    backward_bytes,
    ffn_bytes,
    layer_bytes,
    norm_bytes,
    shared_bytes,
    weight_copies,
)
from launch.plan.step_time import (
    BF16,
    Split,
    Work,
    expert_product,
    layer_work,
    matrix_product,
    projections,
    turning_elements,
)
from train.recipe import sizes
from train.recipe.schema import Ffn, Model, Position, Recompute

INPUTS_ON_DEVICE = 2
"""Of a model whose inputs wait in host memory, see :mod:`train.model.offload`."""


def kept_in_layer(model: Model, batch: Microbatch, numerics: Numerics, grade: Recompute) -> int:
    """Bytes that a layer keeps between its passes."""
    stream = batch.tokens * model.d_model * numerics.stream
    if grade is Recompute.layer:
        return stream
    if grade is Recompute.nothing:
        return layer_bytes(model, batch, numerics)
    kept = sum(_kept_in_attention(model, batch, numerics, grade).values()) + stream
    if grade is Recompute.ffn:
        return kept
    return kept + sum(_kept_in_ffn(model, batch, numerics, grade).values())


def kept_bytes(
    model: Model, batch: Microbatch, numerics: Numerics, grades: Sequence[Recompute], *, offload: bool = False
) -> int:
    """Bytes that the first layers, of these grades, keep until the backward pass, and that all share."""
    layers = Counter(zip(layer_models(model), grades, strict=False))
    kept = sum(count * kept_in_layer(like, batch, numerics, grade) for (like, grade), count in layers.items())
    if offload:
        away = max(0, offloaded_layers(model, grades) - INPUTS_ON_DEVICE)
        kept -= away * batch.tokens * model.d_model * numerics.stream
    if model.mtp and len(grades) == sizes.layers(model):
        kept += _kept_in_joining(model, batch, numerics, grades[-1])
    return kept + shared_bytes(model, batch, numerics)


def offloaded_layers(model: Model, grades: Sequence[Recompute]) -> int:
    """Layers whose inputs leave the device if inputs do; that of multi-token prediction stays."""
    return sum(grade is Recompute.layer for grade in grades[: model.n_layers])


def _kept_in_joining(model: Model, batch: Microbatch, numerics: Numerics, grade: Recompute) -> int:
    """Bytes that multi-token prediction keeps besides those of its layer."""
    given = 2 * batch.tokens * model.d_model * numerics.stream  # hidden states and embeddings
    if grade is Recompute.layer:
        return given // 2  # instead of the residual stream
    product = 2 * model.d_model**2 * numerics.compute if numerics.copies_weights else 0
    norm = norm_bytes(model, batch, numerics)
    if grade is Recompute.nothing:
        return 3 * norm + 2 * batch.tokens * model.d_model * numerics.compute + product
    return given + norm + product


def made_in_layer(model: Model, batch: Microbatch, numerics: Numerics, grade: Recompute) -> int:
    """Bytes that a layer's backward pass has made again at its peak, besides what the layer has kept."""
    ffn = ffn_bytes(model, batch, numerics)
    normed = batch.tokens * model.d_model * numerics.compute
    if grade is Recompute.nothing:
        return 0
    if grade is Recompute.layer:
        return layer_bytes(model, batch, numerics)
    if grade is Recompute.ffn:
        return normed + sum(ffn.values()) - ffn["norm 2"]
    kept = _kept_in_ffn(model, batch, numerics, grade)
    if model.moe is None:
        return normed + ffn["hidden"] - kept["hidden"]
    # On a GPU the experts' gates are gone before their backward pass needs the most.
    gates = 0 if numerics.on_gpu else (ffn["gates and ups"] - kept["gates and ups"]) // model.moe.experts
    return normed + ffn["routed rows"] - kept["routed rows"] + gates


def _made_in_joining(model: Model, batch: Microbatch, numerics: Numerics, grade: Recompute) -> int:
    """Bytes that multi-token prediction makes again besides those of its layer."""
    if grade is Recompute.layer:
        return _kept_in_joining(model, batch, numerics, Recompute.nothing)
    return 0 if grade is Recompute.nothing else 2 * batch.tokens * model.d_model * numerics.compute


class InBackward(NamedTuple):
    """The backward pass of a layer."""

    layer: int
    """Its index."""
    like: Model
    """A model whose layers are all as this one."""
    kept: int
    """Bytes that this layer and those before it have kept."""
    working: int
    """Bytes that it needs at its peak besides."""


def working_bytes(
    model: Model,
    batch: Microbatch,
    numerics: Numerics,
    grade: Recompute,
    *,
    own_gradients: int = 0,
    halves: int = 1,
) -> int:
    """Bytes of a layer's backward pass besides what layers have kept: made again, and gradients.

    With latent attention, whose heads may be several times as wide as the stream, its half of the layer may
    need the most: the gradients of queries, keys, values and output, when what the other half kept is gone.
    """
    of_ffn = made_in_layer(model, batch, numerics, grade) + backward_bytes(
        model, batch, numerics, grade=grade, own_gradients=own_gradients, halves=halves
    )
    if model.latent is None:
        return of_ffn
    attention = sum(attention_bytes(model, batch, numerics).values())
    kept = kept_in_layer(model, batch, numerics, grade)
    heads = 2 * (batch.tokens + batch.key_tokens(numerics)) * sizes.query_width(model) * numerics.compute
    stream = batch.tokens * model.d_model * (numerics.stream + numerics.compute)
    return max(of_ffn, attention - kept + heads + stream)


def backward_passes(
    model: Model,
    batch: Microbatch,
    numerics: Numerics,
    grades: Sequence[Recompute],
    *,
    own_gradients: Callable[[Model], int],
    halves: int = 1,
    offload: bool = False,
) -> list[InBackward]:
    """The layers whose backward pass may need the most: the last two, the last of each grade, the first of
    each kind. Of ``halves`` that are computed in turn, experts have one at a time; ``own_gradients`` are the
    bytes of the gradients of a layer's weights; with ``offload`` inputs wait in host memory.
    """
    found, models = [], layer_models(model)
    firsts = [alike.layers[0] for alike in sizes.alike_layers(model)]
    for layer, (like, grade) in enumerate(zip(models, grades, strict=True)):
        if layer in firsts or layer >= len(grades) - 2 or grade is not grades[layer + 1]:
            kept = kept_bytes(model, batch, numerics, grades[: layer + 1], offload=offload)
            own = own_gradients(like)
            working = working_bytes(like, batch, numerics, grade, own_gradients=own, halves=halves)
            if layer == model.n_layers:
                working += _made_in_joining(model, batch, numerics, grade)
            found.append(InBackward(layer, like, kept, working))
    return found


def layer_models(model: Model) -> list[Model]:
    """Returns for each layer a model whose layers are all as it."""
    by_layer = {layer: alike.model for alike in sizes.alike_layers(model) for layer in alike.layers}
    return [by_layer[layer] for layer in range(sizes.layers(model))]


def copies_kept(model: Model, numerics: Numerics, grades: Sequence[Recompute]) -> int:
    """Bytes of autocast's copies of weights that layers keep until their backward pass."""
    models = layer_models(model)
    return sum(_copies_in(like, numerics, grade) for like, grade in zip(models, grades, strict=False))


def copies_at_loss(model: Model, numerics: Numerics, grades: Sequence[Recompute]) -> int:
    """Bytes of autocast's copies of weights when the loss is computed: those kept, and its own cache."""
    return sum(
        max(weight_copies(like, numerics).dense, _copies_in(like, numerics, grade))
        for like, grade in zip(layer_models(model), grades, strict=True)
    )


def work_again(model: Model, tokens: int, sequence_tokens: int, split: Split, grade: Recompute) -> Work:
    """Work of a layer's recomputation for T tokens of one GPU.

    Passes over memory are those of :func:`launch.plan.step_time.layer_work`: two norms (2 D each), QK norm,
    clipping and rotation, the router's copy in fp32 (3 D), gathered rows (2 D).
    """
    if grade is Recompute.nothing:
        return Work()
    whole = layer_work(model, tokens, sequence_tokens, split)
    if grade is Recompute.layer:
        return whole
    T, D, F = tokens, model.d_model, sizes.expert_width(model)
    turned = T * turning_elements(model)
    of_attention = projections(model, tokens, context=split.context)
    of_heads = [
        of_attention.pop(module) for module in ("q_proj", "q_b_proj", "kv_b_proj") if module in of_attention
    ]
    if grade is Recompute.ffn:
        kept = sum(of_attention.values(), Work())
        kept += Work(attention_flops=2 * T * sequence_tokens * sizes.query_width(model))
        # The sums of the residual stream, and rotation where it keeps its results.
        kept += Work(memory_bytes=BF16 * (8 * T * D + (0 if turns(model) else turned)))
        return whole + kept.times(-1)
    if model.moe is None:
        passes: float = T * F * (3 if model.ffn is Ffn.glu else 2)
        gates = matrix_product(T, D, F).times(2 if model.ffn is Ffn.glu else 1)
    else:
        rows = T * model.moe.top_k * split.imbalance
        experts = model.moe.experts / split.expert
        passes = 3 * T * D + (0 if split.expert > 1 else rows * 2 * D)
        gates = expert_product(rows / experts, D, F, split).times(2 * experts)
    cheap = Work(memory_bytes=BF16 * (4 * T * D + (turned if turns(model) else 0) + passes))
    return cheap + sum(of_heads, gates) if grade is Recompute.gates else cheap


def turns(model: Model) -> bool:
    """Returns whether queries, keys and values are made again from their projections, which are kept then."""
    return model.clip_qkv is not None or model.qk_norm or model.latent is not None


def _copies_in(model: Model, numerics: Numerics, grade: Recompute) -> int:
    copies = weight_copies(model, numerics)
    each = {
        Recompute.nothing: copies.layer,
        Recompute.elementwise: copies.dense,
        Recompute.gates: copies.dense if model.moe else copies.attention,
        Recompute.ffn: copies.attention,
        Recompute.layer: 0,
    }
    return each[grade]


def _kept_in_attention(
    model: Model, batch: Microbatch, numerics: Numerics, grade: Recompute
) -> dict[str, int]:
    """Of what :func:`attention_bytes` names: what a layer of any grade between the outermost keeps."""
    kept = dict(attention_bytes(model, batch, numerics))
    # Of the norms only their inputs stay, which are the residual stream.
    kept |= {"norm 1": batch.tokens * model.d_model * numerics.stream, "Wqkv input": 0}
    if not turns(model):
        return kept
    projected = batch.tokens * (sizes.query_width(model) + 2 * sizes.key_width(model))
    names = ["before clipping", "QK norm", "queries"]
    names += [] if _repeats_heads(model, numerics) else ["keys and values"]
    if model.latent is not None:
        names = ["norms of narrow vectors", "queries", "keys and values"]
        of_keys, _ = sizes.attention_shapes(model)["kv_b_proj"]
        projected = batch.tokens * sizes.query_width(model) + batch.key_tokens(numerics) * of_keys
        projected *= not grade.includes(Recompute.gates)
    return kept | dict.fromkeys(names, 0) | {"projections": projected * numerics.compute}


def _kept_in_ffn(model: Model, batch: Microbatch, numerics: Numerics, grade: Recompute) -> dict[str, int]:
    """Of what :func:`ffn_bytes` names, but the norm: what a layer of `elementwise` or `gates` keeps."""
    kept = dict(ffn_bytes(model, batch, numerics))
    del kept["norm 2"]
    if model.moe is None:
        # Of a GLU's four the two that products wrote, of GELU's two one.
        return {"w1 input": 0, "hidden": 0 if grade is Recompute.gates else kept["hidden"] // 2}
    kept["router"] -= batch.tokens * model.d_model * FP32
    if not batch.exchanged:
        kept["routed rows"] = 0
    if grade is Recompute.gates:
        kept["gates and ups"] = 0
    return kept


def _repeats_heads(model: Model, numerics: Numerics) -> bool:
    """Returns whether attention keeps keys and values as they are repeated for every query head."""
    is_grouped = model.n_kv_heads < model.n_heads
    return is_grouped and not (numerics.on_gpu and model.position is Position.rope)
