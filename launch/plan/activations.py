"""Activation memory: what is kept for the backward pass, and what that pass and the loss need besides.

A list of the tensors that autograd saves in :mod:`train.model.decoder`, derived from the code and tested
against what it really saves on a CPU. Needs no torch.

Legend: B sequences, S tokens of each, T = B x S, D d_model, H query heads, Q width of all queries, G of all
keys, F ffn_hidden_size, E experts, K top_k, V vocab_size, C loss_chunk_tokens, L layers.
"""

from dataclasses import dataclass, replace

from train.recipe import sizes
from train.recipe.schema import Balance, BalanceScope, Ffn, Model, Norm, Position, Recompute

FP32 = 4
BF16 = 2
INT64 = 8


@dataclass(frozen=True)
class Numerics:
    """Bytes per element of the tensors whose precision depends on the device and on autocast."""

    stream: int
    """The residual stream between layers."""
    norm_input: int
    """The input that a norm saves: the stream itself, or autocast's fp32 copy of it."""
    compute: int
    """Inputs and outputs of matrix products and of attention."""
    copies_weights: bool = False
    """Autocast keeps a bf16 copy of each fp32 matrix until the backward pass is done."""
    on_gpu: bool = False
    """No bias keeps documents apart, flash attention takes grouped heads, and the loss is one kernel."""


CPU_FP32 = Numerics(FP32, FP32, FP32)
CPU_BF16 = Numerics(FP32, FP32, BF16, copies_weights=True)
"""Autocast on a CPU with unsharded fp32 weights: the stream stays fp32."""
GPU_BF16 = Numerics(BF16, BF16, BF16, on_gpu=True)
"""FSDP2 casts a layer's inputs and the weights of its norms to bf16."""
ONE_GPU_BF16 = Numerics(FP32, FP32, BF16, copies_weights=True, on_gpu=True)
"""Autocast on a GPU that holds the whole model in fp32."""


@dataclass(frozen=True)
class Microbatch:
    """Shape of one forward and backward pass of a rank."""

    sequences: int
    sequence_tokens: int
    masked: bool = True
    """Documents are masked from each other, so attention gets a mask."""
    imbalance: float = 1.0
    """Rows of this rank's experts relative to the mean; 1 if each rank has all experts."""
    exchanged: bool = False
    """Experts' rows come from several ranks."""
    context: int = 1
    """Ranks that share each sequence, and gather keys and values."""
    tensor: int = 1
    """Ranks that share each sequence, and split heads and hidden units."""
    crossings: float = 0.0
    """Nodes that a token crosses to, of an exchange once per node; 0: tokens go straight to their experts."""
    nodes: int = 1
    """Nodes of an expert group in such an exchange."""

    @property
    def tokens(self) -> int:
        """T, tokens of the microbatch that are this rank's."""
        return self.sequences * self.sequence_tokens // (self.context * self.tensor)

    def key_tokens(self, numerics: "Numerics") -> int:
        """Tokens whose keys and values attention keeps: of whole sequences; on a GPU, of each of a rank's two
        chunks, those up to its end.
        """
        if self.context == 1:
            return self.tokens
        return self.tokens * self.context + (self.tokens // 2 if numerics.on_gpu else 0)


def norm_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> int:
    """Bytes that one norm saves: its input and statistics; for RMSNorm, which is one kernel only on a GPU,
    elsewhere also its normalised output.
    """
    D = model.d_model
    if model.norm is Norm.rmsnorm:
        normalised = 0 if numerics.on_gpu else D * FP32
        return batch.tokens * (D * numerics.norm_input + normalised + FP32)
    return batch.tokens * (D * numerics.norm_input + 2 * FP32)


def attention_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> dict[str, int]:
    """Bytes that the attention half of one layer saves."""
    if model.latent is not None:
        return _latent_attention_bytes(model, batch, numerics)
    T, D, c = batch.tokens, model.d_model, numerics.compute
    Q, G = sizes.query_width(model), sizes.key_width(model)
    saved = {"norm 1": norm_bytes(model, batch, numerics), "Wqkv input": T * D * c}
    if model.qk_norm:
        normalised = 0 if numerics.on_gpu else (Q + G) * FP32
        sums = sum(width // each for width, each in zip((Q, G), sizes.qk_norm_widths(model), strict=True))
        saved["QK norm"] = T * ((Q + 2 * G) * c + normalised + sums * FP32)
    if model.clip_qkv is not None:
        saved["before clipping"] = T * (Q + 2 * G) * c
    saved["queries"] = T * Q * c
    # Only a GPU's kernels read grouped keys and values as they are, and with a bias none does.
    grouped = numerics.on_gpu and model.position is Position.rope
    saved["keys and values"] = 2 * batch.key_tokens(numerics) * (G if grouped else Q) * c
    saved["attention output"] = T * (Q * c + model.n_heads * FP32)
    return saved


def _latent_attention_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> dict[str, int]:
    """Bytes that the attention half of a layer with latent attention saves: values are as wide as keys.

    Where ranks share sequences, a rank keeps the narrow vectors of all tokens too, of which it makes heads.
    """
    T, c, keys = batch.tokens, numerics.compute, batch.key_tokens(numerics)
    gathered = keys * sizes.gathered_width(model) * c if batch.context > 1 else 0
    Q, attended = sizes.query_width(model), sizes.attended_width(model)
    narrow = [size for (size, *columns) in sizes.attention_shapes(model).values() if not columns]
    normalised = 0 if numerics.on_gpu else sum(narrow) * FP32
    return {
        "norm 1": norm_bytes(model, batch, numerics),
        "Wqkv input": T * model.d_model * c,
        "narrow vectors": T * narrow_width(model) * c + gathered,
        "norms of narrow vectors": T * (sum(narrow) * c + normalised + len(narrow) * FP32),
        "queries": T * Q * c,
        "keys and values": 2 * keys * Q * c,
        # The values' padding is cut off for the output projection.
        "attention output": T * ((Q + (attended if attended < Q else 0)) * c + model.n_heads * FP32),
    }


def narrow_width(model: Model) -> int:
    """Elements of latent attention's narrow vectors of a token, and of the key that all heads share."""
    assert model.latent is not None
    return (model.latent.q_rank or 0) + model.latent.kv_rank + model.latent.rope_width


def ffn_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> dict[str, int]:
    """Bytes that the second norm and feed-forward of one layer save."""
    T, D, F, c = batch.tokens, model.d_model, model.ffn_hidden_size, numerics.compute
    saved = {"norm 2": norm_bytes(model, batch, numerics)}
    if model.moe is None:
        saved["w1 input"] = T * D * c
        saved["hidden"] = T * F * c * (4 if model.ffn is Ffn.glu else 2)
        return saved
    E, K, F = model.moe.experts, model.moe.top_k, sizes.expert_width(model)
    rows = round(T * K * batch.imbalance)
    saved["router"] = T * (D * FP32 + 2 * E * FP32 + K * (3 * FP32 + 2 * INT64))
    saved["routed rows"] = rows * D * c
    saved["gates and ups"] = 2 * rows * F * c
    saved["expert outputs"] = T * K * D * c
    if batch.crossings:
        # Of a copy its place and row; of a row, for each place a copy and whether there is one; K labels.
        copies, places = batch.crossings + K, batch.nodes + batch.crossings * K
        saved["copies"] = round(T * (2 * INT64 * copies + (INT64 + 1) * places))
        saved["labels"] = round(T * batch.crossings * 2 * K * FP32)
    if model.moe.balance is not Balance.bias and model.moe.balance_scope is BalanceScope.sequence:
        saved["shares of sequences"] = T * E * FP32
    saved["shared expert"] = shared_expert_bytes(model, batch, numerics)
    return saved


def shared_expert_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> int:
    """Bytes that a layer's shared expert saves, besides its input, which is the experts' too."""
    moe = model.moe
    if moe is None or moe.shared_hidden_size is None:
        return 0
    gate = model.d_model + 1 if moe.shared_gate else 0
    return batch.tokens * (4 * moe.shared_hidden_size + gate) * numerics.compute


def layer_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> int:
    """Bytes that one layer saves."""
    halves = (attention_bytes(model, batch, numerics), ffn_bytes(model, batch, numerics))
    return sum(sum(half.values()) for half in halves)


def shared_bytes(model: Model, batch: Microbatch, numerics: Numerics) -> int:
    """Bytes that all layers share: attention's mask and RoPE's angles."""
    S, c = batch.sequence_tokens, numerics.compute
    own, masked = S // batch.context, batch.masked or batch.context > 1
    if model.position is Position.alibi:
        masks = batch.sequences if masked else 1
        return masks * model.n_heads * own * S * c
    rotations = own * sizes.rotated_width(model) * FP32
    return rotations + (batch.sequences * own * S * c if masked and not numerics.on_gpu else 0)


@dataclass(frozen=True)
class WeightCopies:
    """Bytes of a layer's bf16 copies of fp32 matrices under autocast; the router and the norms stay fp32."""

    dense: int
    """Of all but the experts: autocast itself keeps them until the loss is known."""
    attention: int
    layer: int


def weight_copies(model: Model, numerics: Numerics) -> WeightCopies:
    """Copies of unsharded weights; FSDP2 gathers bf16 and needs none."""
    if not numerics.copies_weights:
        return WeightCopies(0, 0, 0)
    found = [w for w in sizes.layer_weights(model, 0) if ".router." not in w.name]
    cast = [w for w in found if len(w.shape) > 1 or w.name.endswith(".bias")]
    dense = [w for w in cast if not w.is_expert]
    attention = [w for w in dense if ".attn." in w.name]
    return WeightCopies(
        *(sum(w.elements for w in some) * numerics.compute for some in (dense, attention, cast))
    )


@dataclass(frozen=True)
class LossBytes:
    """Memory of the chunked loss, which computes its gradients while it has the logits."""

    hidden_gradient: int
    """Gradient of the hidden states, and each token's loss, until the backward pass uses them."""
    weight_gradient: int
    """fp32 gradient of the output projection."""
    working: int
    """Chunks of logits, their gradient, and casts; freed once the loss is known."""
    losses: int = 1
    """Losses that are computed one after the other: with multi-token prediction two."""

    @property
    def kept(self) -> int:
        """Bytes between the forward and the backward pass."""
        return self.losses * (self.hidden_gradient + self.weight_gradient)

    @property
    def total(self) -> int:
        """Bytes while the last loss is computed."""
        return self.kept + self.working


def loss_bytes(model: Model, batch: Microbatch, numerics: Numerics, chunk_tokens: int) -> LossBytes:
    """Bytes of :func:`train.model.loss.chunked_cross_entropy`.

    A chunk's logits are overwritten by their gradient; softmax is in fp32, of a few rows at a time.
    """
    T, D, V, c = batch.tokens, model.d_model, model.vocab_size, numerics.compute
    C = min(chunk_tokens, T)
    working = C * (V + D) * c
    if numerics.stream != c:  # hidden states and weight are cast
        working += (T * D + V * D) * c
    if c != FP32 and not numerics.on_gpu:  # a GPU adds a product to the gradient as it computes it
        working += V * D * c
    hidden = T * D * numerics.stream + T * FP32
    return LossBytes(hidden, V * D * FP32, working, 1 + model.mtp)


def backward_bytes(
    model: Model,
    batch: Microbatch,
    numerics: Numerics,
    *,
    grade: Recompute = Recompute.nothing,
    own_gradients: int = 0,
    halves: int = 1,
) -> int:
    """Peak bytes of a layer's backward pass besides what the layer saved or made again.

    With experts: those of :func:`_experts_backward`. With a dense GLU or a shared expert: the gradients of
    gate and value. Always: the gradients of the residual stream and of the layer's output. The gradients of
    the layer's weights, ``own_gradients`` bytes, come with the weights; of ``halves`` that are computed in
    turn, experts have one at a time, and add their weights' gradients to the first one's. Where
    ranks share sequences, before that: the gradients of all keys and values, as attention makes them, as they
    are padded to whole sequences, sent and received. Where they split heads: the gradients of whole
    sequences' tokens, as they are computed, sent and received, and those of the heads.
    """
    T, D, F, c = batch.tokens, model.d_model, model.ffn_hidden_size, numerics.compute
    stream = T * D * (numerics.stream + c)
    if batch.context > 1:
        # Of latent attention, whose gathered vectors are few: the gradients of heads' keys and values.
        width = sizes.key_width(model) if model.latent is None else sizes.query_width(model) / 2
        keys = round(8 * batch.key_tokens(numerics) * width * c)
        shorter = replace(batch, sequence_tokens=batch.sequence_tokens // batch.context, context=1)
        own = backward_bytes(
            model, shorter, numerics, grade=grade, own_gradients=own_gradients, halves=halves
        )
        return max(stream + keys, own)
    if batch.tensor > 1:
        heads = T * (sizes.query_width(model) + 2 * sizes.key_width(model))
        of_group = (3 * batch.tensor * T * D + heads) * c
        parts = replace(batch, sequence_tokens=batch.sequence_tokens // batch.tensor, tensor=1)
        own = backward_bytes(model, parts, numerics, grade=grade, own_gradients=own_gradients, halves=halves)
        return max(stream + of_group, own)
    if model.moe is None:
        return stream + (2 if model.ffn is Ffn.glu else 1) * T * F * c
    experts = _experts_backward(model, batch, numerics, grade is Recompute.gates, own_gradients, halves)
    shared = model.moe.shared_hidden_size
    if not shared:
        return stream + experts
    # It comes first, and leaves the gradient of its input until the experts' is added, but no activations.
    left = T * D * c - shared_expert_bytes(model, batch, numerics)
    return stream + max(T * (2 * shared + D * model.moe.shared_gate) * c, left + experts)


def _experts_backward(
    model: Model, batch: Microbatch, numerics: Numerics, remakes: bool, own_gradients: int, halves: int
) -> int:
    """Peak bytes of the experts' backward pass, with gates if it makes them again.

    On a GPU the most are, in order (:mod:`train.model.experts`): with gates that are made again, those, two
    hidden rows of that size and the gradient of the last matrix; then the gradients of all matrices, two
    hidden rows and the gradient by gate; then one hidden row and the gradient by both. All the time there is
    the gradient of the experts' outputs, which themselves are gone by then.
    """
    assert model.moe is not None
    D, F, c = model.d_model, sizes.expert_width(model), numerics.compute
    outputs = batch.tokens * model.moe.top_k * D * c
    rows = round(batch.tokens * model.moe.top_k * batch.imbalance)
    if not numerics.on_gpu:  # it computes expert by expert
        return rows * D * c + outputs + 4 * rows // model.moe.experts * F * c
    row, hidden = rows * D * c, rows * F * c
    most = max(2 * hidden + row, hidden + 2 * row) // halves
    if remakes:
        most = max(4 * hidden // halves - own_gradients * 2 // 3, most)
    # Gradients that came from other ranks are counted with the exchange.
    arrived = 0 if batch.exchanged else row // halves
    return most + arrived - outputs // halves + (halves - 1) * own_gradients


def layer_gradient_elements(model: Model) -> tuple[int, int]:
    """Elements of a layer's weights, and of those whose gradients coexist with its activations.

    The latter are the weights of all experts, or the last matrix of a dense feed-forward.
    """
    found = list(sizes.layer_weights(model, 0))
    experts = sum(w.elements for w in found if w.is_expert or ".shared" in w.name)
    return sum(weight.elements for weight in found), experts or found[-1].elements
