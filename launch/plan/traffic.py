"""Traffic between ranks in one step, by collective and link.

Bytes are those that :mod:`train.layout.mesh` really moves: FSDP2 pads every weight to equal shards, gathers
bf16 and reduces what the recipe says; replicas and routers' gradients are averaged once a step. Tested
against collectives counted in real gloo runs. Not counted: collectives of a few bytes (the gradient norm,
token counts).

Legend: T tokens of a rank's microbatch, K experts per token, D d_model, L layers, n ranks of a group.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from launch.plan.hardware import Gpu
from launch.plan.nodes import nodes_of_group, nodes_per_token
from train.recipe import sizes
from train.recipe.schema import (
    Balance,
    BalanceScope,
    ExchangePrecision,
    Model,
    Moe,
    Parallelism,
    Recompute,
    ReducePrecision,
    Reduction,
)

FP32 = 4
INT32 = 4
OUTSIDE = "embeddings"
"""The name of the unit of what is outside the layers."""
ROUTERS = "routers"
"""The routers of all layers, and what else is replicated, whose gradients are summed after the last backward
pass."""
EXPERTS, LAYERS = "experts", "layers"
AHEAD = "multi-token prediction"
"""The name of the units of its layer."""
KEYS, KEYS_BACK = "keys and values", "gradients of keys, values"
SHARES = "experts' shares of sequences"
"""Keys and values, their gradients, and sums over ranks that share sequences."""
GATHERED, SUMMED, HEADS = "tokens of sequences", "sums of products", "heads"
"""Gathers, sums and exchanges of ranks that share dense weights."""
SENT = "activations and gradients"
"""Sends of a pipeline's stages to the next one and to the one before."""
ENDS = "the shared embedding"
"""The sum over a pipeline's first and last stage of the gradients of an embedding that both have."""
DENSE_LAYERS = "dense layers"
"""The name of the units of a mixture's layers without experts."""


class CollectiveKind(str, Enum):
    """Kind of collective."""

    all_gather = "all-gather"
    reduce_scatter = "reduce-scatter"
    all_reduce = "all-reduce"
    all_to_all = "all-to-all"
    send = "send"


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that one GPU sends, by link."""

    nvlink: float
    network: float


@dataclass(frozen=True)
class Collective:
    """A collective of a step, with its size and number of calls."""

    what: str
    kind: CollectiveKind
    payload_bytes: float
    """The full tensor: the output of an all-gather, the input of a reduce-scatter or all-reduce, what a send
    sends; for an all-to-all, what each rank holds for all ranks, including itself."""
    ranks: int
    """n, the size of the group."""
    stride: int
    """Distance between consecutive ranks of the group: 1 if they are neighbours."""
    calls: int
    """Calls per rank and microbatch, or step."""
    ahead: int = 0
    """Of these calls, those in the forward pass; the others are in the backward pass."""
    is_once_a_step: bool = False
    """Called per step, whatever the number of microbatches: in or after the last backward pass."""

    @property
    def is_outside_layers(self) -> bool:
        """True if no layer's arithmetic is there to hide it."""
        return self.what in (OUTSIDE, ROUTERS)

    def calls_in_step(self, microbatches: int) -> int:
        """Calls of one rank in a step."""
        return self.calls * (1 if self.is_once_a_step else microbatches)

    def sent_bytes(self) -> float:
        """Bytes that one rank sends per call with ring algorithms (Patarasuk and Yuan 2009)."""
        if self.kind is CollectiveKind.send:
            return self.payload_bytes
        rounds = 2 if self.kind is CollectiveKind.all_reduce else 1
        return rounds * self.payload_bytes * (self.ranks - 1) / self.ranks

    def members_per_node(self, gpus_per_node: int) -> int:
        """Ranks of the group that share a node."""
        return max(1, min(self.ranks, gpus_per_node // self.stride))

    def link_bytes(self, gpus_per_node: int) -> LinkBytes:
        """Bytes that one GPU sends per call, by link.

        A ring leaves each node once; parallel rings take turns over the members' network cards.
        An all-to-all sends an equal share to every rank.
        """
        members, sent = self.members_per_node(gpus_per_node), self.sent_bytes()
        if members == self.ranks:
            return LinkBytes(sent, 0.0)
        if self.kind is CollectiveKind.all_to_all:
            share = self.payload_bytes / self.ranks
            return LinkBytes(share * (members - 1), share * (self.ranks - members))
        return LinkBytes(sent * (members - 1) / members, sent / members)

    def seconds(self, gpu: Gpu) -> float:
        """Time of one call at the links' full rates: the slower link, plus a hop for each round of a ring."""
        if self.ranks == 1:
            return 0.0
        members, links = self.members_per_node(gpu.gpus_per_node), self.link_bytes(gpu.gpus_per_node)
        one_node = members == self.ranks
        if self.kind is CollectiveKind.all_to_all:
            transfer = max(links.nvlink / gpu.nvlink_bandwidth, links.network / gpu.network_bandwidth)
            return transfer + (gpu.nvlink_hop_seconds if one_node else gpu.network_hop_seconds)
        # Every byte passes every link of the ring, so the slowest kind of link determines the rate.
        rate = gpu.nvlink_bandwidth
        hop = gpu.nvlink_hop_seconds
        if not one_node:
            rate = min(gpu.nvlink_bandwidth if members > 1 else rate, members * gpu.network_bandwidth)
            hop = ((members - 1) * gpu.nvlink_hop_seconds + gpu.network_hop_seconds) / members
        rounds = (2 if self.kind is CollectiveKind.all_reduce else 1) * (self.ranks - 1)
        return self.sent_bytes() / rate + rounds * hop


def collectives(
    model: Model,
    layout: Parallelism,
    world_size: int,
    *,
    tokens: int,
    compute_bytes: int,
    grades: Sequence[Recompute],
    crossings: float | None = None,
) -> list[Collective]:
    """All collectives of one rank: those of a microbatch's forward and backward pass, and those of a step.

    Args:
        model: the recipe's model.
        layout: degrees of the mesh; interleaved only if the microbatch has halves.
        world_size: ranks.
        tokens: T, tokens of a microbatch that are one rank's.
        compute_bytes: bytes per element in which weights and activations are sent; 2 for bf16.
        grades: what each layer computes again in the backward pass.
        crossings: nodes that a token crosses to; None: as many as with even routing.
    """
    found = []
    routers = sum(
        weight.elements * len(alike.layers)
        for alike in sizes.alike_layers(model)
        for weight in sizes.layer_weights(alike.model, 0)
        if sizes.placement(weight, layout, world_size).is_replicated
    )
    routers += sum(
        weight.elements
        for weight in (sizes.joining_weights(model) if model.mtp else ())
        if sizes.placement(weight, layout, world_size).is_replicated
    )
    if routers:
        averaged = (CollectiveKind.all_reduce, routers * FP32, world_size, 1, 1)
        found.append(Collective(ROUTERS, *averaged, is_once_a_step=True))
    for unit in _units(model, layout, world_size):
        gathers = _gathers(unit, sizes.layers(model) - layout.gathered_layers)
        found += _sharding_collectives(unit, layout, world_size, gathers, compute_bytes)
    if layout.context > 1:
        size = tokens * layout.context * sizes.gathered_width(model) * compute_bytes
        group, again = (layout.context, 1), sum(grade is Recompute.layer for grade in grades)
        layers = sizes.layers(model)
        found.append(Collective(KEYS, CollectiveKind.all_gather, size, *group, layers + again, layers))
        found.append(Collective(KEYS_BACK, CollectiveKind.all_to_all, size, *group, layers))
    if layout.tensor > 1:
        found += _of_shared_weights(model, layout, tokens * compute_bytes, grades)
    if layout.sharing > 1 and model.moe and model.moe.balance is not Balance.bias:
        found += _shares_of_sequences(model, layout, tokens, grades)
    if model.moe and layout.expert > 1:
        crossings = nodes_per_token(model.moe, layout) if crossings is None else crossings
        found += _exchanges(model, model.moe, layout, tokens, compute_bytes, grades, crossings)
    return found


def _exchanges(
    model: Model,
    moe: Moe,
    layout: Parallelism,
    tokens: int,
    compute_bytes: int,
    grades: Sequence[Recompute],
    crossings: float,
) -> Iterator[Collective]:
    """The exchange of tokens between the ranks of an expert group; once per node, in two steps."""
    repeat = [grade.includes(Recompute.ffn) for grade in grades]
    again = sum(sizes.has_experts(model, layer) for layer, repeats in enumerate(repeat) if repeats)
    halves = 2 if layout.interleave else 1
    layers, nodes = sizes.expert_layers(model), nodes_of_group(layout)
    straight = [("experts", moe.top_k, (layout.expert, 1), moe.experts)]
    local = layout.expert // nodes
    over_nodes = [
        ("nodes", crossings, (nodes, local), moe.experts + nodes),
        ("ranks", moe.top_k, (local, 1), moe.experts),
    ]
    for where, copies, group, counts in straight if layout.exchange_node_ranks is None else over_nodes:
        rows = tokens // halves * copies * model.d_model * compute_bytes
        exchanges = [(f"tokens to {where} and back", rows, 2 * (2 * layers + again), 2 * layers)]
        if layout.exchange_precision is ExchangePrecision.fp8:
            packed = rows / compute_bytes * (sizes.EXCHANGED_TILE + 1) / sizes.EXCHANGED_TILE
            exchanges = [
                (f"tokens to {where}, in fp8", packed, layers + again, layers),
                ("tokens back, and gradients", rows, 3 * layers + again, layers),
            ]
        if where == "nodes":
            labels = tokens // halves * copies * 2 * moe.top_k * FP32
            exchanges.append(("experts and their weights", labels, 2 * layers + again, layers))
        exchanges.append(("counts of tokens", counts * INT32, layers, layers))
        for what, payload, *calls in exchanges:
            in_all, ahead = (halves * each for each in calls)
            yield Collective(what, CollectiveKind.all_to_all, payload, *group, in_all, ahead)


def _shares_of_sequences(
    model: Model, layout: Parallelism, tokens: int, grades: Sequence[Recompute]
) -> list[Collective]:
    """Counts of each expert's tokens in shared sequences, one for every token, if balance is theirs."""
    moe = model.moe
    assert moe is not None
    if moe.balance_scope is not BalanceScope.sequence:
        return []
    layers = [sizes.has_experts(model, layer) for layer in range(sizes.layers(model))]
    again = sum(has and grade.includes(Recompute.ffn) for has, grade in zip(layers, grades, strict=True))
    size = tokens * layout.sharing * moe.experts * INT32
    calls = sum(layers) + again, sum(layers)
    return [Collective(SHARES, CollectiveKind.all_reduce, size, layout.sharing, 1, *calls)]


def _of_shared_weights(
    model: Model, layout: Parallelism, token_bytes: int, grades: Sequence[Recompute]
) -> list[Collective]:
    """Collectives of ranks that share dense weights: before and after attention, and dense feed-forward.

    Args:
        model: the decoder.
        layout: degrees of the mesh.
        token_bytes: bytes of an element of all tokens of a rank.
        grades: what each layer computes again in the backward pass.
    """
    dense = [not sizes.has_experts(model, layer) or _has_shared_expert(model) for layer in range(len(grades))]
    repeats = [
        (
            grade is Recompute.layer,
            grade.includes(Recompute.ffn) and has_dense,
            # Of a dense layer only what comes before the activation.
            grade is Recompute.gates and not sizes.has_experts(model, layer),
        )
        for layer, (grade, has_dense) in enumerate(zip(grades, dense, strict=True))
    ]
    attention_again, ffn_again, gates_again = (sum(each) for each in zip(*repeats, strict=True))
    ahead, again = len(grades) + sum(dense), attention_again + ffn_again
    whole = token_bytes * layout.tensor * model.d_model
    heads = token_bytes * (sizes.query_width(model) + 2 * sizes.key_width(model))
    kinds, group = CollectiveKind, (layout.tensor, 1)
    # The backward pass gathers a product's input again, and the gradients of its output.
    gathers = (3 * ahead + again + gates_again, ahead)
    return [
        Collective(GATHERED, kinds.all_gather, whole, *group, *gathers),
        Collective(SUMMED, kinds.all_to_all, whole, *group, 2 * ahead + again, ahead),
        Collective(HEADS, kinds.all_to_all, heads, *group, 2 * len(grades) + attention_again, len(grades)),
    ]


def _has_shared_expert(model: Model) -> bool:
    return model.moe is not None and model.moe.shared_hidden_size is not None


@dataclass(frozen=True)
class _Unit:
    """Weights that FSDP2 gathers together; one layer's represent those of all layers."""

    what: str
    weights: tuple[sizes.Weight, ...]
    placements: tuple[sizes.WeightPlacement, ...]
    """Of each weight; all have the same number of ranks for rows."""
    layers: tuple[int, ...]
    """Numbers of the layers; empty for what is outside the layers."""

    @property
    def count(self) -> int:
        """Units of this kind."""
        return len(self.layers) or 1

    @property
    def padded_elements(self) -> int:
        """Elements of the largest shard, to which all shards are padded."""
        return sum(
            place.rows_at_most(weight) * place.row_elements(weight)
            for weight, place in zip(self.weights, self.placements, strict=True)
        )


@functools.lru_cache(maxsize=64)  # the plan's search asks for each layout with many microbatches
def _units(model: Model, layout: Parallelism, world_size: int) -> tuple[_Unit, ...]:
    outside = [weight for weight in sizes.weights(model) if not sizes.is_in_layer(weight.name)]
    found: list[_Unit] = []
    for alike in sizes.alike_layers(replace(model, mtp=False)):
        of_layer = list(sizes.layer_weights(model, alike.layers[0]))
        name = LAYERS if alike.model.moe or model.moe is None else DENSE_LAYERS
        found += _grouped(of_layer, name, alike.layers, layout, world_size)
    if model.mtp:
        ahead = [*sizes.layer_weights(model, model.n_layers), *sizes.joining_weights(model)]
        found += _grouped(ahead, AHEAD, (model.n_layers,), layout, world_size)
    return (*found, *_grouped(outside, OUTSIDE, (), layout, world_size))


def _grouped(
    weights: list[sizes.Weight], name: str, layers: tuple[int, ...], layout: Parallelism, world_size: int
) -> list[_Unit]:
    """Groups weights of one layer, or those outside the layers, by FSDP2 unit."""
    groups: dict[str, list[sizes.Weight]] = {}
    for weight in weights:
        place = sizes.placement(weight, layout, world_size)
        if not place.is_replicated:
            groups.setdefault(place.unit, []).append(weight)
    return [
        _Unit(
            what=EXPERTS if members[0].is_expert and name != AHEAD else name,
            weights=tuple(members),
            placements=tuple(sizes.placement(member, layout, world_size) for member in members),
            layers=layers,
        )
        for members in groups.values()
    ]


def _gathers(unit: _Unit, first_kept: int) -> int:
    """Number of all-gathers of all units of this kind in one microbatch.

    Weights are gathered for the forward pass and again for the backward pass, which recomputation shares
    (:func:`train.layout.torch_patches.keep_recomputed_weights`). Weights outside the layers stay gathered,
    and so do those of the layers from ``first_kept`` on.
    """
    if unit.what == OUTSIDE:
        return 1
    return 2 * unit.count - sum(layer >= first_kept for layer in unit.layers)


def _sharding_collectives(
    unit: _Unit, layout: Parallelism, world_size: int, gathers: int, compute_bytes: int
) -> list[Collective]:
    placement = unit.placements[0]
    elements = unit.padded_elements * placement.rows_over
    group = (placement.rows_over, max(placement.split_over, placement.columns_over))
    reduced = reduced_bytes(layout)
    kinds = CollectiveKind
    is_once = layout.reduce is Reduction.once_a_batch
    found = [
        Collective(unit.what, kinds.all_gather, elements * compute_bytes, *group, gathers, unit.count),
        Collective(
            unit.what, kinds.reduce_scatter, elements * reduced, *group, unit.count, is_once_a_step=is_once
        ),
    ]
    if layout.replicate > 1:
        copies = (layout.replicate, world_size // layout.replicate)
        size = unit.padded_elements * reduced
        found.append(Collective(unit.what, kinds.all_reduce, size, *copies, unit.count, is_once_a_step=True))
    return found


def reduced_bytes(layout: Parallelism) -> int:
    """Bytes per element of gradients that are summed over ranks."""
    return FP32 if layout.reduce_precision is ReducePrecision.fp32 else FP32 // 2
