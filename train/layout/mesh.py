"""Layouts: the device mesh (replicate, pipeline, shard, expert), and what each part is sharded over.

Experts are split over `expert`, each rank holding E / expert whole experts, and their rows again over
`shard`. Routers are replicated: every rank holds them whole. Everything else is sharded over `shard` and
`expert` together. `replicate` holds copies (hybrid sharding). A dimension of one rank has no group, except
`shard`, which FSDP2 needs. Tokens are sent to their experts' ranks (:mod:`train.model.exchange`); FSDP2
gathers weights, a layer ahead of their use, and averages gradients. Expert gradients are averaged over
`replicate` and `shard`, and MegaBlocks divides them by the expert degree; routers' gradients are averaged
once a step (:func:`train.layout.optim.average_replicated_gradients`): so every gradient is the mean over all
ranks.

Of a pipeline, every stage has such meshes of its own, over its own ranks: averages and shards are of these.
An embedding that the last stage reads too is held by both, with the sum of both gradients.

Where groups of neighbouring ranks share layers' dense weights (:mod:`train.model.tensor_parallel`), each of
them has its part by `tensor`, whose rows are sharded over `rest`; norms of layers, and a shared expert's
gate, are replicated like routers. The experts' mesh stays what it is, and so do embeddings and output
projection, which every rank gathers whole for its own tokens.

Shapes: E experts, F expert hidden size, D model width.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from train.layout.torch_patches import apply_torch_patches
from train.model.context import Context
from train.model.decoder import Block, Decoder, MultiTokenPrediction
from train.model.init import initialize
from train.model.moe import MoE
from train.model.node_exchange import OncePerNode
from train.model.norms import LayerNorm, RmsNorm
from train.model.pipeline import Pipeline
from train.model.tensor_parallel import ColumnLinear, RowLinear, TensorGroup
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import ExchangePrecision, Model, Parallelism, Precision, ReducePrecision, Reduction

REPLICATE, PIPELINE, SHARD, EXPERT = "replicate", "pipeline", "shard", "expert"
DENSE = "dense"
"""`shard` and `expert` flattened into one dimension, over which everything but the experts is sharded."""
REST, TENSOR = "rest", "tensor"
"""`dense` in two dimensions, where groups of ranks share layers' dense weights."""


class Mesh(NamedTuple):
    """The ranks of a job, arranged for experts and for everything else."""

    experts: DeviceMesh
    """`replicate` x `shard` x `expert`; `shard` and those of the others that have several ranks."""
    dense: DeviceMesh
    """`replicate` x `dense`, or only `dense` if there is one replica."""
    layout: Parallelism
    context: Context | None
    """The ranks that share sequences; None: no others."""
    split: DeviceMesh | None = None
    """`replicate` x `rest` x `tensor`, or only the last two; None: dense weights are split over no group."""
    pipeline: Pipeline | None = None
    """The stages that share each sequence; None: every rank has all layers."""
    nodes: OncePerNode | None = None
    """The ranks over which tokens cross to each node once; None: they go straight to their experts."""


def build_mesh(layout: Parallelism, world_size: int, device_type: str) -> Mesh:
    """Builds the mesh. `expert` is the innermost dimension, which keeps tokens inside a node.

    A rank is in one group per dimension; ``init_device_mesh`` would add one for each dimension of one rank.
    Ranks that share sequences are neighbours too: to weights they are what any other ranks are, so they are
    no dimension, and lie across the others as they come. Where they share dense weights too, the mesh
    of these has them as a dimension.
    """
    shard = sizes.shard_degree(layout, world_size)
    degrees = {REPLICATE: layout.replicate, PIPELINE: layout.pipeline, SHARD: shard, EXPERT: layout.expert}
    degrees = {name: size for name, size in degrees.items() if size > 1 or name == SHARD}
    ranks, pipeline = torch.arange(world_size).view(*degrees.values()), None
    of_experts = [_own_group(ranks, n) for n, name in enumerate(degrees) if name != PIPELINE]
    names = tuple(name for name in degrees if name != PIPELINE)
    if layout.pipeline > 1:
        pipeline = _join_pipeline(layout, ranks, list(degrees).index(PIPELINE))
        ranks = ranks.select(list(degrees).index(PIPELINE), pipeline.stage)
    experts = DeviceMesh.from_group(of_experts, device_type, ranks, mesh_dim_names=names)
    context = None
    if layout.context > 1:
        context = Context(_own_group(torch.arange(world_size).view(-1, layout.context), 1))
    split = None
    if layout.tensor > 1:
        split = _split_mesh(layout, world_size, device_type, of_experts[0], pipeline)
        context = TensorGroup(split.get_group(TENSOR))
    nodes = None
    if layout.exchange_node_ranks is not None:
        local = layout.exchange_node_ranks
        of_nodes = torch.arange(world_size).view(-1, layout.expert // local, local)
        nodes = OncePerNode(across=_own_group(of_nodes, 1), within=_own_group(of_nodes, 2))
    if layout.replicate == 1:
        of_dense = dist.group.WORLD if pipeline is None else pipeline.peers
        assert of_dense is not None
        dense = DeviceMesh.from_group(of_dense, device_type, mesh_dim_names=(DENSE,))
        return Mesh(experts, dense, layout, context, split, pipeline, nodes)
    # A flattened dimension could only be had through private functions. The groups of `replicate` are shared
    # with the other mesh.
    every = torch.arange(world_size).view(layout.replicate, layout.pipeline, shard * layout.expert)
    groups = [of_experts[names.index(REPLICATE)], _own_group(every, 2)]
    ranks = every[:, 0 if pipeline is None else pipeline.stage]
    dense = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=(REPLICATE, DENSE))
    return Mesh(experts, dense, layout, context, split, pipeline, nodes)


def _join_pipeline(layout: Parallelism, ranks: Tensor, dimension: int) -> Pipeline:
    """Makes the groups of a rank's pipeline, of its ends, and of all ranks that have its stage."""
    count = 4 if layout.pipeline_chunks > 1 else 2
    links = [_own_group(ranks, dimension) for _ in range(count)]
    by_stage = ranks.movedim(dimension, 0).reshape(layout.pipeline, -1)
    ends, _ = dist.new_subgroups_by_enumeration(by_stage[[0, -1]].t().tolist())
    assert ends is None or isinstance(ends, dist.ProcessGroup)
    return Pipeline(links, _own_group(by_stage, 1), layout.pipeline_chunks, ends)


def _split_mesh(
    layout: Parallelism,
    world_size: int,
    device_type: str,
    replicas: dist.ProcessGroup,
    pipeline: Pipeline | None,
) -> DeviceMesh:
    """Builds the mesh of dense weights that groups of ranks share; ``replicas`` are those of other meshes."""
    every = torch.arange(world_size).view(layout.replicate, layout.pipeline, -1, layout.tensor)
    names: tuple[str, ...] = (REPLICATE, REST, TENSOR)
    groups = [replicas, _own_group(every, 2), _own_group(every, 3)]
    ranks = every[:, 0 if pipeline is None else pipeline.stage]
    if layout.replicate == 1:
        ranks, names, groups = ranks[0], names[1:], groups[1:]
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)


def replicas_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that hold the same shards of a model as this one; None if no other does."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and REPLICATE in (parameter.device_mesh.mesh_dim_names or ()):
            return parameter.device_mesh.get_group(REPLICATE)
    return None


def build_sharded(decoder: Decoder, mesh: Mesh, precision: Precision, seed: int | None) -> None:
    """Shards a decoder on the meta device, then allocates and initialises each rank's shards.

    No rank ever holds more than one full layer, and the initial weights depend only on the seed; without one
    the shards are left for a checkpoint to fill.
    """
    apply_torch_patches()
    moes = [module for module in decoder.modules() if isinstance(module, MoE)]
    names = mesh.experts.mesh_dim_names or ()
    if EXPERT in names:
        for moe in moes:
            _spread_experts(moe, mesh.experts[EXPERT], mesh.nodes)
    in_bf16 = mesh.layout.reduce_precision is ReducePrecision.bf16
    cast = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision is Precision.bf16 else None,
        reduce_dtype=torch.bfloat16 if in_bf16 else torch.float32,
    )
    over_experts = mesh.experts[REPLICATE, SHARD] if REPLICATE in names else mesh.experts[SHARD]
    over_all = mesh.dense
    # Routers stay whole and fp32. As units they would be gathered and reduced between the experts' product
    # and their reduce-scatter, which nothing would then hide; rounded, they would send near-ties elsewhere.
    routers = {parameter for moe in moes for parameter in moe.router.parameters()}
    blocks = decoder.transformer.layers
    # Replicated, of a layer; and the mesh over which the rest of it is sharded.
    whole, over_layers = routers, over_all
    if mesh.split is not None:
        assert isinstance(mesh.context, TensorGroup)
        names = mesh.split.mesh_dim_names or ()
        over_layers = mesh.split[REPLICATE, REST] if REPLICATE in names else mesh.split[REST]
        whole = routers | {
            parameter
            for block in blocks
            for parameter in _split_layer(block, mesh.split[TENSOR], mesh.context, precision)
        }
    for block, is_freed in zip(blocks, _freed_after_forward(len(blocks), mesh.layout), strict=True):
        if isinstance(block.ffn, MoE):
            block.ffn.experts.packs = mesh.layout.exchange_precision is ExchangePrecision.fp8
            # The layer casts its experts' inputs itself. FSDP2 would also round the routing weights, and only
            # in the forward pass: a recomputed layer would not match.
            of_experts = replace(cast, cast_forward_inputs=False)
            try:
                fully_shard(
                    block.ffn.experts, mesh=over_experts, mp_policy=of_experts, reshard_after_forward=is_freed
                )
            except NotImplementedError:  # torch 2.7
                raise _uneven_experts(decoder.cfg, over_experts.size(over_experts.ndim - 1), mesh) from None
        fully_shard(
            block, mesh=over_layers, mp_policy=cast, reshard_after_forward=is_freed, ignored_params=whole
        )
    fully_shard(decoder, mesh=over_all, mp_policy=cast, ignored_params=whole)
    gather_ahead(decoder)
    if over_all.device_type == "cpu":
        sum_on_gloo(decoder)
    decoder.transformer.interleave = mesh.layout.interleave
    decoder.context = mesh.context
    decoder.pipeline = mesh.pipeline
    decoder.to_empty(device=over_all.device_type)
    initialize(decoder, decoder.cfg, seed)


def _uneven_experts(model: Model, shard: int, mesh: Mesh) -> UserError:
    """The refusal of a torch whose FSDP2 has no uneven shards of what other dimensions split too."""
    assert model.moe is not None
    rows, ranks = model.moe.experts * sizes.expert_width(model), shard * mesh.layout.expert
    what = f"cuts the experts' {rows} rows for {ranks} ranks unevenly, which torch {torch.__version__} can't"
    return UserError(what, key="parallelism.expert", remedy="use a newer torch, or ranks that divide them")


def gather_ahead(decoder: nn.Module) -> None:
    """Makes FSDP2 gather each layer's weights while the layer before it computes, in both directions.

    By itself FSDP2 gathers a unit's weights when the unit before it has its own: only the attention would
    hide the experts' gather, nearly all of a layer's traffic. Forward gathers are asked for by layers and not
    by experts: recomputation runs an expert's forward hooks again, in the middle of the backward pass, where
    its own next layer is done; a layer's it skips.
    """
    assert isinstance(decoder, Decoder)
    assert isinstance(decoder, FSDPModule)
    # Else a unit's gradients would not be summed before those of the unit before it are: the experts' sum, of
    # all traffic in the backward pass the most, would be hidden by the attention only. From torch 2.15 on.
    in_flight = getattr(decoder, "set_reduce_scatter_max_input_buffers", None)
    if in_flight is not None:
        in_flight(sizes.REDUCTIONS_IN_FLIGHT)
    runs = [[_units(block) for block in run] for run in decoder.transformer.runs]
    if len(runs) == 1:  # else the pass says which run is next, after these hooks
        decoder.set_modules_to_forward_prefetch(runs[0][0])
        decoder.set_modules_to_backward_prefetch(runs[0][-1])
    for layer, after in itertools.chain.from_iterable(map(itertools.pairwise, runs)):
        # The layer of multi-token prediction is gathered when it runs: validation would gather it in vain.
        if not isinstance(after[0], MultiTokenPrediction):
            layer[0].set_modules_to_forward_prefetch(after)
        # Asked for by the last unit of a layer, whose backward pass is the first.
        after[-1].set_modules_to_backward_prefetch(layer)


def reduce_gradients(
    model: nn.Module, layout: Parallelism, *, after_this_pass: bool, run: Sequence[nn.Module] | None = None
) -> None:
    """Says before a backward pass whether FSDP2 sums gradients over ranks at its end, or adds them up.

    Replicas are summed after a batch's last backward pass only: it costs nothing to add shards up before. The
    ranks of a replica are if `parallelism.reduce` says so.

    Args:
        model: the decoder.
        layout: the recipe's.
        after_this_pass: it is the last.
        run: layers that the pass runs, of a rank that has others too; None: all.
    """
    if not isinstance(model, FSDPModule):
        return
    units = [(model, run is None), *((layer, True) for layer in run or ())]
    for unit, with_children in units:
        assert isinstance(unit, FSDPModule)
        unit.set_requires_all_reduce(after_this_pass, recurse=with_children)
        if layout.reduce is Reduction.once_a_batch:
            unit.set_requires_gradient_sync(after_this_pass, recurse=with_children)


def _freed_after_forward(layers: int, layout: Parallelism) -> list[bool]:
    """Of each layer: are its gathered weights freed after the forward pass?"""
    return [layer < layers - layout.gathered_layers for layer in range(layers)]


def _units(block: Block) -> list[FSDPModule]:
    """A layer's FSDP2 units in the order of their forward passes: its attention and norms, its experts."""
    return [module for module in block.modules() if isinstance(module, FSDPModule)]


def sum_on_gloo(model: nn.Module) -> None:
    """Makes FSDP2 sum gradients and divide them itself, since gloo's own average is wrong before torch 2.11.

    torch 2.7 lacks the call: :func:`train.layout.torch_patches.average_gradients_on_gloo` stands in for it.
    """
    for module in model.modules():
        force_sums = getattr(module, "set_force_sum_reduction_for_comms", None)
        if force_sums is not None:
            force_sums(True)


def _own_group(ranks: Tensor, dimension: int) -> dist.ProcessGroup:
    """Makes the group of this rank and of those that differ from it in one dimension only."""
    rows = ranks.movedim(dimension, -1).reshape(-1, ranks.shape[dimension])
    # Every rank names every row, as torch numbers groups by calls; a row without this rank costs no more.
    own, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    assert isinstance(own, dist.ProcessGroup)  # every rank is in a row
    return own


def _spread_experts(moe: MoE, experts: DeviceMesh, nodes: OncePerNode | None) -> None:
    """Leaves each rank E / degree experts, and makes ranks exchange tokens."""
    mlp = moe.experts.mlp
    for name in ("w1", "v1", "w2"):
        whole: nn.Parameter = getattr(mlp, name)
        rows = whole.shape[0] // experts.size()
        local = torch.empty(rows, whole.shape[1], dtype=whole.dtype, device=whole.device)
        part = nn.Parameter(DTensor.from_local(local, experts, [Shard(0)], run_check=False))
        part.expert_model_parallel = True  # type: ignore[attr-defined]
        setattr(mlp, name, part)
    # A rank's experts see tokens of `degree` ranks, each of which averages its own loss.
    mlp.gradient_scale = 1 / experts.size()
    args = moe.experts.args
    args.moe_expert_model_parallelism = True
    args.expert_parallel_group = experts.get_group()
    moe.experts.forward_fn = moe.experts.parallel_forward_once
    moe.experts.way = nodes


def _split_layer(
    block: Block, ranks: DeviceMesh, group: TensorGroup, precision: Precision
) -> set[nn.Parameter]:
    """Leaves each rank its part of a layer's dense weights; returns the parameters that stay whole."""
    split: set[nn.Parameter] = set()
    for module in block.modules():
        if isinstance(module, ColumnLinear | RowLinear):
            dimension = 0 if isinstance(module, ColumnLinear) else 1
            whole, shape = module.weight, list(module.weight.shape)
            shape[dimension] //= group.ranks
            part = DTensor.from_local(whole.new_empty(shape), ranks, [Shard(dimension)], run_check=False)
            module.weight = nn.Parameter(part)
            module.group = group
            split.add(module.weight)
        elif isinstance(module, LayerNorm | RmsNorm):
            module.casts_weight = precision is Precision.bf16
    experts = block.ffn.experts.parameters() if isinstance(block.ffn, MoE) else ()
    return set(block.parameters()) - split - set(experts)
