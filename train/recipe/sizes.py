"""Sizes of a recipe in closed form: parameters, their placement, FLOPs, batches. Needs no torch.

The shapes are those of the decoder (names and layouts of Hugging Face's DBRX); tests compare them with the
real modules. Legend: D d_model, L n_layers, H n_heads, KV n_kv_heads, R width of a head, F ffn_hidden_size,
E experts, K top_k, V vocab_size, S sequence tokens.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from train.recipe.curriculum import Curriculum, plan_stages
from train.recipe.phases import batch_sequences, in_phase, microbatch_sequences, phases_of
from train.recipe.pipeline import ModelPart, cut, even_layers
from train.recipe.schema import (
    Balance,
    ExpertPrecision,
    Ffn,
    Model,
    Parallelism,
    QkNormOver,
    Recipe,
    Recompute,
    Training,
)

LOSS_CHUNK_TOKENS = {"cuda": 4096, "cpu": 1024}
"""Default of training.loss_chunk_tokens by device. Each chunk passes over the output projection's gradient,
which costs a GPU more than logits of four times the tokens do."""


TILE = {ExpertPrecision.fp8: 128, ExpertPrecision.mxfp8: 32}
"""Elements that share a scale, by `training.expert_precision`; widths of experts are multiples of it."""

EXCHANGED_TILE = 128
"""The same of tokens that are sent in fp8: `parallelism.exchange_precision`."""


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole (unsharded) model."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """True for a matrix that stacks all experts of a layer, E blocks of rows."""
        return ".experts." in self.name


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add counted as two."""

    weights: int
    """Matrix products with weights."""
    attention: int
    """Attention scores and their products with the values, which involve no weights."""

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.weights + self.attention


def head_width(model: Model) -> int:
    """Returns R, the width of an attention head's queries and keys."""
    if model.latent:
        return model.latent.nope_width + model.latent.rope_width
    return model.head_width or model.d_model // model.n_heads


def rotated_width(model: Model) -> int:
    """Returns the elements of a head that RoPE rotates."""
    return model.latent.rope_width if model.latent else int(head_width(model) * model.rope_share)


def query_width(model: Model) -> int:
    """Returns H x R, the width of all queries."""
    return model.n_heads * head_width(model)


def attended_width(model: Model) -> int:
    """Returns the width of what all heads return: H x R, or H times the width of a latent head's values."""
    return model.n_heads * (model.latent.v_width if model.latent else head_width(model))


def key_width(model: Model) -> int:
    """Returns KV x R, the width of all keys, and of all values."""
    return model.n_kv_heads * head_width(model)


def gathered_width(model: Model) -> int:
    """Returns the elements of a token that ranks gather for attention where they share sequences: keys and
    values, or what latent attention makes them of.
    """
    if model.latent is not None:
        return model.latent.kv_rank + model.latent.rope_width
    return 2 * key_width(model)


def qk_norm_widths(model: Model) -> tuple[int, int]:
    """Returns the elements that are normalised together, of queries and of keys."""
    if model.qk_norm_over is QkNormOver.each_head:
        return head_width(model), head_width(model)
    return query_width(model), key_width(model)


def attention_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight of a layer's attention, by module, in the module's order."""
    D, latent, queries = model.d_model, model.latent, query_width(model)
    out = {"out_proj": (D, attended_width(model))}
    if latent is None:
        norms = {}
        if model.qk_norm:
            norms = {f"{part}_norm": (w,) for part, w in zip("qk", qk_norm_widths(model), strict=True)}
        return {"Wqkv": (queries + 2 * key_width(model), D), **norms, **out}
    C, heads = latent.kv_rank, model.n_heads * (latent.nope_width + latent.v_width)
    of_keys = {"kv_a_proj": (C + latent.rope_width, D), "kv_a_norm": (C,), "kv_b_proj": (heads, C)}
    if latent.q_rank is None:
        return {"q_proj": (queries, D), **of_keys, **out}
    Q = latent.q_rank
    return {"q_a_proj": (Q, D), "q_a_norm": (Q,), "q_b_proj": (queries, Q), **of_keys, **out}


def expert_width(model: Model) -> int:
    """Returns the hidden size of an expert."""
    return (model.moe and model.moe.expert_hidden_size) or model.ffn_hidden_size


MTP = "transformer.mtp"
"""The name of the module of multi-token prediction: a layer and what joins it to the others."""


def layers(model: Model) -> int:
    """Returns the number of layers in training; that of multi-token prediction is the last, number L."""
    return model.n_layers + model.mtp


def layer_name(model: Model, layer: int) -> str:
    """Returns the name of a layer's module."""
    return MTP if layer == model.n_layers else f"transformer.blocks.{layer}"


def is_in_layer(weight: str) -> bool:
    """Returns whether a weight, by its name, is in a layer; if not, it is an embedding or the last norm."""
    return weight.startswith(("transformer.blocks.", f"{MTP}."))


def has_experts(model: Model, layer: int) -> bool:
    """Returns whether a layer, counted from 0, has experts; if not, it is dense.

    The layer of multi-token prediction is like the last one.
    """
    moe, layer = model.moe, min(layer, model.n_layers - 1)
    return moe is not None and layer >= moe.dense_layers and (layer + 1) % moe.every_n_layers == 0


def expert_layers(model: Model) -> int:
    """Returns the number of layers with experts in training."""
    return sum(has_experts(model, layer) for layer in range(layers(model)))


@dataclass(frozen=True)
class Alike:
    """Layers of a model that are all alike."""

    model: Model
    """A model all of whose layers are like these: with experts, or dense."""
    layers: tuple[int, ...]
    """Their numbers, ascending."""


@functools.lru_cache
def alike_layers(model: Model) -> tuple[Alike, ...]:
    """Returns a model's layers by what they are made of, those of the first layer first.

    The layer of multi-token prediction is among them, without what joins it to the others.
    """
    experts = tuple(layer for layer in range(layers(model)) if has_experts(model, layer))
    dense = tuple(sorted({*range(layers(model))} - {*experts}))
    moe = model.moe and replace(model.moe, dense_layers=0, every_n_layers=1)
    like = replace(model, mtp=False)
    found = [Alike(replace(like, moe=moe), experts), Alike(replace(like, moe=None), dense)]
    return tuple(sorted((alike for alike in found if alike.layers), key=lambda alike: alike.layers))


def recomputed(training: Training, layers: int) -> list[Recompute]:
    """Returns what each of a model's layers computes again in the backward pass."""
    first = layers if training.recompute_layers is None else training.recompute_layers
    return [training.recompute if layer < first else training.recompute_rest for layer in range(layers)]


def layer_weights(model: Model, layer: int) -> Iterator[Weight]:
    """Yields the parameters of one decoder layer, in the module's order."""
    D, F = model.d_model, model.ffn_hidden_size
    prefix = layer_name(model, layer)
    yield Weight(f"{prefix}.norm_attn_norm.norm_1.weight", (D,))
    for module, shape in attention_shapes(model).items():
        yield Weight(f"{prefix}.norm_attn_norm.attn.{module}.weight", shape)
        if module == "Wqkv" and model.qkv_bias:
            yield Weight(f"{prefix}.norm_attn_norm.attn.Wqkv.bias", shape[:1])
    yield Weight(f"{prefix}.norm_attn_norm.norm_2.weight", (D,))
    if model.moe and has_experts(model, layer):
        E = model.moe.experts
        yield Weight(f"{prefix}.ffn.router.layer.weight", (E, D))
        for matrix in ("w1", "v1", "w2"):
            yield Weight(f"{prefix}.ffn.experts.mlp.{matrix}", (E * expert_width(model), D))
        if shared := model.moe.shared_hidden_size:
            for matrix in ("w1", "v1"):
                yield Weight(f"{prefix}.ffn.shared.{matrix}.weight", (shared, D))
            yield Weight(f"{prefix}.ffn.shared.w2.weight", (D, shared))
            if model.moe.shared_gate:
                yield Weight(f"{prefix}.ffn.shared_gate.weight", (1, D))
    else:
        for matrix in ("w1", "v1") if model.ffn is Ffn.glu else ("w1",):
            yield Weight(f"{prefix}.ffn.{matrix}.weight", (F, D))
        yield Weight(f"{prefix}.ffn.w2.weight", (D, F))


def joining_weights(model: Model) -> Iterator[Weight]:
    """Yields the parameters of multi-token prediction besides those of its layer; none without it."""
    if model.mtp:
        D = model.d_model
        yield Weight(f"{MTP}.enorm.weight", (D,))
        yield Weight(f"{MTP}.hnorm.weight", (D,))
        yield Weight(f"{MTP}.eh_proj.weight", (D, 2 * D))
        yield Weight(f"{MTP}.norm.weight", (D,))


@functools.lru_cache(maxsize=16)  # the plan's search asks for them thousands of times
def weights(model: Model) -> tuple[Weight, ...]:
    """Returns every parameter once: no biases but those of ``qkv_bias``, no parameters for RoPE or ALiBi.

    The per-expert-choice bias of ``balance: bias`` is a buffer, not a parameter. A tied output
    projection is the embedding itself and not listed again.
    """
    D, V = model.d_model, model.vocab_size
    found = [Weight("transformer.wte.weight", (V, D))]
    for layer in range(model.n_layers):
        found += layer_weights(model, layer)
    found.append(Weight("transformer.norm_f.weight", (D,)))
    if model.mtp:
        found += (*layer_weights(model, model.n_layers), *joining_weights(model))
    if not model.tie_embeddings:
        found.append(Weight("lm_head.weight", (V, D)))
    return tuple(found)


def biases(model: Model) -> Iterator[Weight]:
    """Yields the buffers that are exported and imported besides the weights: biases on experts' selection."""
    if model.moe is None or model.moe.balance is Balance.loss:
        return
    for layer in range(layers(model)):
        if has_experts(model, layer):
            yield Weight(f"{layer_name(model, layer)}.ffn.router.expert_bias", (model.moe.experts,))


def parts(model: Model, layout: Parallelism) -> tuple[ModelPart, ...]:
    """Returns the parts that the stages of a pipeline cut a model into, in the order of its layers.

    By themselves they are as even as they can be. A layer counts as the FLOPs of its products with weights, K
    of E experts among them, and the output projection with the last, as does the layer of multi-token
    prediction with its projections. The embedding is looked up, and counts nothing.
    """
    if layout.pipeline_layers:
        return cut(layout.pipeline_layers)
    costs = [_active_in_layer(model, layer) for layer in range(model.n_layers)]
    costs[-1] += model.vocab_size * model.d_model
    if model.mtp:
        joining = sum(weight.elements for weight in joining_weights(model))
        costs[-1] += _active_in_layer(model, model.n_layers) + joining + model.vocab_size * model.d_model
    return cut(even_layers(tuple(costs), layout.pipeline * layout.pipeline_chunks))


def stage_parts(model: Model, layout: Parallelism, stage: int) -> tuple[ModelPart, ...]:
    """Returns a stage's parts of the model, one for each chunk; without a pipeline, the whole."""
    return parts(model, layout)[stage :: layout.pipeline]


def is_in_parts(model: Model, weight: str, held: Sequence[ModelPart]) -> bool:
    """Returns whether a weight, by its name, is in one of these parts of a model."""
    if weight.startswith("transformer.blocks."):
        return any(int(weight.split(".")[2]) in part.layers for part in held)
    if weight.startswith("transformer.wte."):
        return has_embedding(model, held)
    return held[-1].is_last


def has_embedding(model: Model, held: Sequence[ModelPart]) -> bool:
    """Returns whether these parts of a model read its embedding: the first, and the last of some models."""
    return held[0].is_first or (held[-1].is_last and embeds_twice(model))


def embeds_twice(model: Model) -> bool:
    """Returns whether the last layer's part of a model reads the embedding too: as the output projection, or
    for multi-token prediction.
    """
    return model.tie_embeddings or model.mtp


@functools.lru_cache(maxsize=1024)
def _active_in_layer(model: Model, layer: int) -> int:
    """Returns the weights of a layer that a token is multiplied with."""
    moe = model.moe
    return sum(
        weight.elements * moe.top_k // moe.experts if weight.is_expert and moe else weight.elements
        for weight in layer_weights(model, layer)
    )


REDUCTIONS_IN_FLIGHT = 2
"""FSDP2 units whose gradients are summed over ranks at a time, each from a buffer of its own."""


@dataclass(frozen=True)
class WeightPlacement:
    """The sharding of a weight, and the FSDP2 unit that it belongs to."""

    unit: str
    """The module that FSDP2 gathers and reduces as a unit."""
    split_over: int
    """Ranks over which whole experts are split first, or the outputs of a product that ranks share; or 1."""
    rows_over: int
    """Ranks over which the rows are then sharded."""
    columns_over: int = 1
    """Ranks over which the columns are split."""
    is_replicated: bool = False
    """Held whole by every rank: in no unit, neither gathered nor reduced with others."""

    def rows_at_most(self, weight: Weight) -> int:
        """Returns the rows of the fullest rank, to which FSDP2 pads all others when it gathers."""
        return -(-weight.shape[0] // self.split_over // self.rows_over)

    def rows(self, weight: Weight, index: int) -> int:
        """Returns the rows of the rank with number ``index`` among those that share the rows.

        Like ``torch.chunk``: every rank takes the rounded-up share until nothing is left.
        """
        whole, share = weight.shape[0] // self.split_over, self.rows_at_most(weight)
        return min(share, max(0, whole - index * share))

    def row_elements(self, weight: Weight) -> int:
        """Returns the elements of a row that a rank holds."""
        return weight.elements // weight.shape[0] // self.columns_over


def readers(layout: Parallelism, world_size: int) -> int:
    """Returns the number of groups of ranks that each read their own sequences: as many as ranks, unless
    `context` or `tensor` shares them, or the stages of a pipeline work on them.
    """
    return world_size // layout.on_each_sequence


def reader_of(layout: Parallelism, world_size: int, rank: int) -> int:
    """Returns the number of the group that a rank reads its sequences with."""
    replica, _, place = place_of(layout, world_size, rank)
    return (replica * stage_ranks(layout, world_size) + place) // layout.sharing


def stage_ranks(layout: Parallelism, world_size: int) -> int:
    """Returns the ranks of a replica's stage, among which the weights of its layers are sharded."""
    return world_size // (layout.replicate * layout.pipeline)


def place_of(layout: Parallelism, world_size: int, rank: int) -> tuple[int, int, int]:
    """Returns a rank's replica, its stage in that, and its place in the stage."""
    stage, place = divmod(rank, stage_ranks(layout, world_size))
    return *divmod(stage, layout.pipeline), place


def shard_degree(layout: Parallelism, world_size: int) -> int:
    """Returns the size of the mesh's `shard` dimension: what `replicate`, `pipeline` and `expert` leave."""
    return world_size // (layout.replicate * layout.pipeline * layout.expert)


def placement(weight: Weight, layout: Parallelism, world_size: int) -> WeightPlacement:
    """Returns the placement of a weight by :mod:`train.layout.mesh`.

    Experts are split over `expert`, then their rows over `shard`. Routers are replicated. Everything else is
    sharded over `shard` and `expert` together; but where groups of `tensor` ranks share layers' dense
    weights, these are split over a group first, by rows or by columns, and the rest of a layer is replicated.
    The FSDP2 units are a layer's experts, the rest of the layer, with what joins it to the others, and
    everything outside the layers. `replicate` holds copies.
    """
    shard = shard_degree(layout, world_size)
    if weight.is_expert:
        return WeightPlacement(weight.name.rpartition(".mlp.")[0], layout.expert, shard)
    if ".router." in weight.name:
        return WeightPlacement("", 1, 1, is_replicated=True)
    parts, tensor = weight.name.split("."), layout.tensor
    unit = ".".join(parts[: 2 if weight.name.startswith(MTP) else 3]) if is_in_layer(weight.name) else ""
    if tensor > 1 and is_in_layer(weight.name):
        rest = shard * layout.expert // tensor
        if is_split_by_rows(weight.name):
            return WeightPlacement(unit, tensor, rest)
        if is_split_by_columns(weight.name):
            return WeightPlacement(unit, 1, rest, columns_over=tensor)
        return WeightPlacement("", 1, 1, is_replicated=True)
    return WeightPlacement(unit, 1, shard * layout.expert)


def is_split_by_rows(name: str) -> bool:
    """Returns whether a weight's product is split by its outputs, where ranks share dense weights."""
    return name.endswith((".attn.Wqkv.weight", ".w1.weight", ".v1.weight"))


def is_split_by_columns(name: str) -> bool:
    """Returns whether a weight's product is split by its inputs, where ranks share dense weights."""
    return name.endswith((".attn.out_proj.weight", ".w2.weight"))


@functools.lru_cache(maxsize=64)  # the plan's search asks for each layout with many microbatches
def rank_weights(model: Model, layout: Parallelism, world_size: int, rank: int) -> Mapping[str, int]:
    """Returns the number of elements of every weight on one rank, by name; those of its stage of a pipeline.

    In the order of ranks, `expert` varies fastest, then `shard`, `pipeline`, and `replicate`.
    """
    _, stage, dense_index = place_of(layout, world_size, rank)
    own = stage_parts(model, layout, stage)
    held = {}
    for weight in weights(model):
        if not is_in_parts(model, weight.name, own):
            continue
        place = placement(weight, layout, world_size)
        index = dense_index // layout.expert if weight.is_expert else dense_index % place.rows_over
        if max(place.split_over, place.columns_over) > 1 and not weight.is_expert:
            index = dense_index // layout.tensor
        held[weight.name] = place.rows(weight, index) * place.row_elements(weight)
    return held


def total_parameters(model: Model) -> int:
    """Returns the number of parameters of the whole model, those of multi-token prediction included.

    V D (2 if untied) + D + L (2 D + (2 H + 2 KV) R D + FFN), where FFN is E D + 3 E F D with
    experts, 3 F D for a dense GLU and 2 F D for a two-matrix MLP. A shared expert adds 3 F D with its own F,
    and D for its gate, ``qkv_bias`` L (H + 2 KV) R. Multi-token prediction adds a layer and 2 D^2 + 3 D.
    Latent attention has, in place of (2 H + 2 KV) R D, D q + q H R + D (c + r) + c H (n + v) + H v D, of
    ranks q and c and widths n, r, v (R = n + r), and q + c of its norms.
    """
    outside = [w for w in weights(replace(model, n_layers=1)) if not is_in_layer(w.name)]
    joining = sum(w.elements for w in (*outside, *joining_weights(model)))
    in_layers = (
        len(alike.layers) * sum(w.elements for w in layer_weights(alike.model, 0))
        for alike in alike_layers(model)
    )
    return joining + sum(in_layers)


def active_parameters(model: Model, *, input_embedding: bool = False) -> int:
    """Returns the active parameters per token: K of the E experts, and all that is not one of them.

    Those of multi-token prediction, which only training uses, do not count.

    Args:
        model: the decoder.
        input_embedding: count the input embedding too. By default it does not count, being a look-up
            without FLOPs (Kaplan et al. 2020, section 2.1). The output projection always counts; with tied
            embeddings it is the same matrix, so everything counts.
    """
    model = replace(model, mtp=False)
    look_up = 0 if input_embedding or model.tie_embeddings else model.vocab_size * model.d_model
    return total_parameters(model) - _idle_parameters(model) - look_up


def _idle_parameters(model: Model) -> int:
    """Returns the parameters of the experts that a token does not use."""
    if model.moe is None:
        return 0
    per_expert = 3 * expert_width(model) * model.d_model
    return expert_layers(model) * (model.moe.experts - model.moe.top_k) * per_expert


def flops_per_token_forward(model: Model, sequence_tokens: int, *, causal: bool = False) -> Flops:
    """Returns the FLOPs of one token's forward pass.

    Weights: 2 x active parameters without the input embedding. Attention: 4 L H R S, scores and values
    against S positions (Kaplan et al. 2020, table 1; PaLM, Chowdhery et al. 2022, appendix B), or
    2 L H (R + v) S if values are v wide.

    Args:
        model: the decoder.
        sequence_tokens: S, the length of a sequence.
        causal: count only the positions up to the token's own, half of S on average (what a kernel
            that skips masked blocks computes). By default all S count, as in PaLM's utilisation.
    """
    attention = 2 * model.n_layers * (query_width(model) + attended_width(model)) * sequence_tokens
    return Flops(2 * active_parameters(model), attention // 2 if causal else attention)


def flops_per_token_training(model: Model, sequence_tokens: int, *, causal: bool = False) -> Flops:
    """Returns the FLOPs of one token's forward and backward pass: three times the forward pass.

    Weights: 6 x active parameters; attention: 12 L H R S (half of it if ``causal``), or 6 L H (R + v) S.
    Sources: see :func:`flops_per_token_forward`. Recomputed activations do not count as model FLOPs.
    Multi-token prediction counts as one more layer, what joins it to the others, and the output projection
    once more.
    """
    forward = flops_per_token_forward(model, sequence_tokens, causal=causal)
    of_weights, of_attention = forward.weights, forward.attention
    if model.mtp:
        main = replace(model, mtp=False)
        held = total_parameters(model) - total_parameters(main)
        active = held - (_idle_parameters(model) - _idle_parameters(main))
        of_weights += 2 * (active + model.vocab_size * model.d_model)
        of_attention += of_attention // model.n_layers
    return Flops(3 * of_weights, 3 * of_attention)


def tokens_per_batch(recipe: Recipe) -> int:
    """Returns the tokens per optimizer step, over all ranks; a phase may have another batch size."""
    return recipe.training.global_batch_sequences * recipe.data.sequence_tokens


def microbatch_tokens(recipe: Recipe) -> int:
    """Returns the tokens of a rank's microbatch; of sequences that ranks share, its part."""
    whole = recipe.training.microbatch_sequences * recipe.data.sequence_tokens
    return whole // recipe.parallelism.sharing


def batches(recipe: Recipe) -> int:
    """Returns the optimizer steps of the run: the tokens of each phase, rounded up to whole batches."""
    return plan_stages(recipe).batches


def trained_tokens(recipe: Recipe) -> int:
    """Returns the tokens that the run trains on, in whole batches."""
    return plan_stages(recipe).tokens


def microbatches_per_rank(recipe: Recipe, world_size: int) -> int:
    """Returns the forward and backward passes of each rank per optimizer step.

    The recipe must have passed :func:`train.recipe.rules.validate` for this number of ranks.
    """
    over = readers(recipe.parallelism, world_size)
    per_rank, left = divmod(recipe.training.global_batch_sequences, over)
    assert left == 0, f"{recipe.training.global_batch_sequences} sequences over {over} ranks"
    count, left = divmod(per_rank, recipe.training.microbatch_sequences)
    assert left == 0, f"{per_rank} sequences in microbatches of {recipe.training.microbatch_sequences}"
    return count


def training_flops(recipe: Recipe, *, causal: bool = False) -> Flops:
    """Returns the FLOPs of the whole run: :func:`flops_per_token_training` x tokens, stage by stage."""
    weights = attention = 0
    curriculum = plan_stages(recipe)
    for stage in curriculum.stages:
        length = stage.sequence_samples * curriculum.sample_tokens
        token = flops_per_token_training(recipe.model, length, causal=causal)
        tokens = (stage.end_sample - stage.first_sample) * curriculum.sample_tokens
        weights, attention = weights + token.weights * tokens, attention + token.attention * tokens
    return Flops(weights, attention)


def batch_flops_per_token(model: Model, curriculum: Curriculum, batch: int) -> int:
    """Returns the training FLOPs per token of a batch, with its phase's sequence length."""
    length = curriculum.stage_of(batch).sequence_samples * curriculum.sample_tokens
    return flops_per_token_training(model, length).total


def most_microbatches(recipe: Recipe, world_size: int) -> int:
    """Returns the forward and backward passes per rank and step, in the phase that has the most."""
    return max(
        batch_sequences(recipe, phase)
        // readers(in_phase(recipe, phase).parallelism, world_size)
        // microbatch_sequences(recipe, phase)
        for phase in phases_of(recipe)
    )
