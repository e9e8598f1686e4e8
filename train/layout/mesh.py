"""Every layout: the mesh (replicate, shard, expert) and what of the model is sharded over which of it.

Experts are split over `expert`, each rank holding E / expert whole experts, and their rows again over
`shard`. Everything else is sharded over `shard` and `expert` together. `replicate` holds copies (hybrid
sharding). MegaBlocks sends tokens to their experts' ranks; FSDP2 gathers weights and averages gradients:
the experts' over `replicate` and `shard`, and since MegaBlocks divides them by the expert degree, every
gradient is the mean over all ranks.

Shapes: E experts, F expert hidden size, D model width.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard

from train.model.decoder import Block, Decoder
from train.model.init import initialize
from train.model.moe import MoE
from train.recipe.schema import Parallelism, Precision

REPLICATE, SHARD, EXPERT = "replicate", "shard", "expert"
DENSE = "dense"
"""`shard` and `expert` taken together: what all but the experts are sharded over."""


def let_fsdp2_run_on_gloo() -> None:
    """Mends three faults of FSDP2 on a CPU (torch 2.7.0); a GPU's path is left as it is.

    FSDP2 asks for ReduceOp.AVG. Gloo refuses it in an all-reduce, and in a reduce-scatter returns the sum
    without a word: gradients would be too large by the number of ranks, which Adam hides and clipping
    does not. Given divide factors, FSDP2 adds and divides by itself. A CPU stream's event is None, where
    hybrid sharding asserts that there is one. And weights that were gathered ahead for a backward pass
    that did not come, as recomputation makes FSDP2 do, wait for an event on an accelerator.
    """
    original = _fsdp_collectives._get_gradient_divide_factors
    if getattr(original, "divides_on_cpu", False):
        return

    def factors(
        reduce_scatter_group: dist.ProcessGroup,
        all_reduce_group: dist.ProcessGroup | None,
        reduce_dtype: torch.dtype,
        device_type: str = "",
    ) -> tuple[None, None] | tuple[float, float]:
        if device_type != "cpu":
            return original(reduce_scatter_group, all_reduce_group, reduce_dtype, device_type)
        replicas = all_reduce_group.size() if all_reduce_group is not None else 1
        return 1.0, float(reduce_scatter_group.size() * replicas)

    factors.divides_on_cpu = True  # type: ignore[attr-defined]
    _fsdp_collectives._get_gradient_divide_factors = factors
    torch.cpu.Stream.record_event = lambda _stream: torch.cpu.Event()  # type: ignore
    finalize = FSDPParamGroup.finalize_backward

    def finalize_backward(group: FSDPParamGroup) -> None:
        gathered = group._all_gather_result
        if gathered is not None and group.device.type == "cpu":
            group._all_gather_result = gathered._replace(all_gather_event=None)
        finalize(group)

    FSDPParamGroup.finalize_backward = finalize_backward  # type: ignore[method-assign]


def keep_recomputed_weights() -> None:
    """Lets units inside of a recomputed layer keep their weights until their backward pass (torch 2.7.0).

    Recomputation runs a layer's forward pass in the middle of the backward pass. FSDP2 would let go of the
    experts' weights at its end and gather them again at once; and having noted the forward pass twice, it
    would gather ahead experts whose turn is over. Experts are gathered twice a step so, not four times.
    """
    original = FSDPParamGroup.post_forward
    if getattr(original, "keeps_recomputed", False):
        return

    def post_forward(group: FSDPParamGroup, module: nn.Module, inputs: Any, output: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            return original(group, module, inputs, output)
        group._training_state = TrainingState.IDLE
        return output

    post_forward.keeps_recomputed = True  # type: ignore[attr-defined]
    FSDPParamGroup.post_forward = post_forward  # type: ignore


def build_mesh(layout: Parallelism, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh; ranks that are neighbours share `expert` first, which keeps tokens inside a node."""
    shard = world_size // (layout.replicate * layout.expert)
    mesh = init_device_mesh(
        device_type, (layout.replicate, shard, layout.expert), mesh_dim_names=(REPLICATE, SHARD, EXPERT)
    )
    mesh[SHARD, EXPERT]._flatten(DENSE)
    return mesh


def build_sharded(decoder: Decoder, mesh: DeviceMesh, precision: Precision, seed: int) -> None:
    """Shards a decoder that is on the meta device, then gives each rank its own part and its values.

    No rank ever holds more than one layer whole, and the values depend on the seed alone.
    """
    let_fsdp2_run_on_gloo()
    keep_recomputed_weights()
    moes = [module for module in decoder.modules() if isinstance(module, MoE)]
    if mesh[EXPERT].size() > 1:
        for moe in moes:
            _spread_experts(moe, mesh[EXPERT])
    cast = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision is Precision.bf16 else None, reduce_dtype=torch.float32
    )
    over_experts = _sharding_mesh(mesh, SHARD)
    over_all = _sharding_mesh(mesh, DENSE)
    for moe in moes:
        # What experts are given is cast by the layer itself. FSDP2 would round the routing weights too, and
        # only in the forward pass: a recomputed layer would not match.
        fully_shard(moe.experts, mesh=over_experts, mp_policy=replace(cast, cast_forward_inputs=False))
        # The router stays fp32: rounded weights would send near-ties to other experts.
        fully_shard(moe.router, mesh=over_all, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for module in decoder.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=over_all, mp_policy=cast)
    fully_shard(decoder, mesh=over_all, mp_policy=cast)
    decoder.to_empty(device=mesh.device_type)
    initialize(decoder, decoder.cfg, seed)


def _sharding_mesh(mesh: DeviceMesh, over: str) -> DeviceMesh:
    """The mesh that FSDP2 takes: two-dimensional where there are replicas."""
    return mesh[REPLICATE, over] if mesh[REPLICATE].size() > 1 else mesh[over]


def _spread_experts(moe: MoE, experts: DeviceMesh) -> None:
    """Leaves each rank its E / degree experts, and tells MegaBlocks to exchange tokens."""
    mlp = moe.experts.mlp
    for name in ("w1", "v1", "w2"):
        whole: nn.Parameter = getattr(mlp, name)
        rows = whole.shape[0] // experts.size()
        local = torch.empty(rows, whole.shape[1], dtype=whole.dtype, device=whole.device)
        part = nn.Parameter(DTensor.from_local(local, experts, [Shard(0)], run_check=False))
        part.expert_model_parallel = True  # type: ignore[attr-defined]
        setattr(mlp, name, part)
    # A rank's experts see the tokens of `degree` ranks, whose losses are means of their own.
    mlp.gradient_scale = 1 / experts.size()
    args = moe.experts.args
    args.moe_expert_model_parallelism = True
    args.expert_parallel_group = experts.get_group()
    moe.experts.forward_fn = moe.experts.parallel_forward_once
