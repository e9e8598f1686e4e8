"""Faults of expert parallelism that others have shipped, put in on purpose: the gate must see each.

A fault is a context in which a rank's process trains wrongly. ``python -m launch.verify --inject NAME``
shows what the gate says of it; the tests hold the gate to all of them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import _mesh_resources
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from launch.verify.cases import Layout
from train import run
from train.layout import mesh
from train.model import decoder
from train.model.attention import AttentionPlan
from train.model.moe import MoE
from train.recipe.schema import Precision
from train.step import balance, step
from train.step.language_model import LanguageModel

Build = Callable[..., None]
FOUR = Layout(2, 1, 2)
"""A layout with replicas and experts on different ranks."""


@dataclass(frozen=True)
class PlantedFault:
    """A fault, and where and in what it must show first."""

    what: str
    put_in: Callable[[], AbstractContextManager[Any]]
    shows_in: str
    """The quantity of the gate that must be over its bound; empty for a case that stops with an error."""
    layout: Layout = FOUR
    input: str = "accumulated"
    needs_global_scope: bool = False
    """Whether it can only go wrong where the balance loss is one over the global batch."""
    precision: Precision = Precision.fp32
    """The precision that it shows in."""


@contextlib.contextmanager
def after_building(change: Callable[[nn.Module], None]) -> Iterator[None]:
    """Changes the sharded decoder once it is built."""
    original = mesh.build_sharded

    def build(decoder: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(decoder, *args, **kwargs)  # type: ignore[arg-type]
        change(decoder)

    with mock.patch.object(run, "build_sharded", build):
        yield


def _scale_expert_gradients(power: int, decoder: nn.Module) -> None:
    """As if MegaBlocks' division by the expert degree were left out, or done twice."""
    for moe in _moes(decoder):
        moe.experts.mlp.gradient_scale /= FOUR.expert**power


def _let_replicas_drift(decoder: nn.Module) -> None:
    """Each replica keeps its own gradient of the router: it is averaged over a group of one rank."""
    for moe in _moes(decoder):
        assert isinstance(moe.router, FSDPModule)
        group = moe.router._get_fsdp_state()._fsdp_param_group
        weight = moe.router.layer.weight
        assert group is not None and isinstance(weight, DTensor) and FOUR.shard == 1
        alone = _mesh_resources.get_root_mesh(weight.device_mesh)[mesh.SHARD].get_group()
        group.mesh_info.replicate_process_group = alone  # type: ignore[attr-defined]


def _swap_experts(decoder: nn.Module) -> None:
    """Two experts change places, as a conversion between degrees might."""
    for moe in _moes(decoder):
        for weight in moe.experts.mlp.parameters():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            rows = weight.shape[0] // moe.router.moe.experts
            with torch.no_grad():
                local[: 2 * rows] = local[: 2 * rows].roll(rows, dims=0)


def _drop_gradient(decoder: nn.Module) -> None:
    """One rank's first expert does not learn from what it does."""
    if dist.get_rank():
        return

    def hook(mlp: nn.Module, _inputs: Any) -> None:
        for weight in mlp.parameters(recurse=False):
            if weight.requires_grad:
                weight.register_hook(functools.partial(_zero_first, rows))

    moe = _moes(decoder)[0]
    rows = moe.experts.mlp.w1.shape[0] // moe.router.moe.experts
    moe.experts.mlp.register_forward_pre_hook(hook)


def _zero_first(rows: int, gradient: Tensor) -> Tensor:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local[:rows] = 0
    return gradient


def _clipping_with(
    square: Callable[[nn.Parameter, Tensor], Tensor], over_ranks: bool = True
) -> AbstractContextManager[Any]:
    """Clips by another norm: the sum of ``square(parameter, this rank's gradient)``."""

    def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        kept = [(p, p.grad) for p in parameters if p.grad is not None]
        shards = [grad.to_local() if isinstance(grad, DTensor) else grad for _, grad in kept]
        squares = [square(p, shard) for (p, _), shard in zip(kept, shards, strict=True)]
        total = torch.stack(squares).sum() / FOUR.replicate
        if over_ranks:
            dist.all_reduce(total)
        norm = total.sqrt()
        assert max_norm is not None
        torch._foreach_mul_(shards, float(min(1.0, max_norm / norm)))
        return norm

    return mock.patch.object(step, "clip_gradients", clip)


def _times_for_experts(factor: float, parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """A shard's squared norm, the experts' times a factor."""
    placed = parameter.device_mesh if isinstance(parameter, DTensor) else None
    is_expert = placed is not None and mesh.EXPERT in (placed.mesh_dim_names or ())
    return shard.double().square().sum() * (factor if is_expert else 1.0)


def _balance_of_rank_0(self: LanguageModel, *args: Any) -> dict[str, Tensor]:
    """Only the first rank adds its balance loss."""
    if dist.get_rank():
        self.balance_weight = 0.0
    return _original_loss(self, *args)


_original_loss = LanguageModel.loss


def _count_microbatch_alone() -> AbstractContextManager[Any]:
    """The scope's counts are never gathered."""
    return mock.patch.object(balance, "_given", lambda _batch_counts_E, counts_E: counts_E)


@contextlib.contextmanager
def _round_in_forward_alone() -> Iterator[None]:
    """FSDP2 casts what layers and experts are given; not when they are computed again."""
    original = decoder.plan_attention

    def plan(*args: Any, **kwargs: Any) -> AttentionPlan:
        exact = original(*args, **kwargs | {"dtype": torch.float32})
        return original(*args, **kwargs)._replace(cos_SR=exact.cos_SR, sin_SR=exact.sin_SR)

    with (
        mock.patch.object(decoder, "plan_attention", plan),
        mock.patch.object(mesh, "replace", lambda policy, **_changes: policy),
    ):
        yield


def _moes(decoder: nn.Module) -> list[MoE]:
    return [module for module in decoder.modules() if isinstance(module, MoE)]


FAULTS = {
    "experts-times-degree": PlantedFault(
        "expert gradients times the expert degree",
        lambda: after_building(functools.partial(_scale_expert_gradients, -1)),
        "gradients",
    ),
    "experts-over-degree": PlantedFault(
        "expert gradients divided by the expert degree once more",
        lambda: after_building(functools.partial(_scale_expert_gradients, 1)),
        "gradients",
    ),
    "norm-without-experts": PlantedFault(
        "experts missing from the global norm",
        lambda: _clipping_with(functools.partial(_times_for_experts, 0.0)),
        "norm",
    ),
    "norm-with-experts-twice": PlantedFault(
        "experts counted twice in the global norm",
        lambda: _clipping_with(functools.partial(_times_for_experts, 2.0)),
        "norm",
    ),
    "local-norm": PlantedFault(
        "each rank clips with the norm of its own shards",
        lambda: _clipping_with(functools.partial(_times_for_experts, 1.0), over_ranks=False),
        "norm",
    ),
    "balance-of-one-rank": PlantedFault(
        "the balance loss of the first rank alone",
        lambda: mock.patch.object(LanguageModel, "loss", _balance_of_rank_0),
        "gradients",
    ),
    "balance-of-microbatch": PlantedFault(
        "a balance loss that depends on the split into microbatches",
        _count_microbatch_alone,
        "balance",
        layout=Layout(1, 2, 1),
        needs_global_scope=True,
    ),
    "router-not-synchronised": PlantedFault(
        "replicas that keep their own gradients of the router",
        lambda: after_building(_let_replicas_drift),
        "gradients",
    ),
    "experts-swapped": PlantedFault(
        "two experts swapped at load", lambda: after_building(_swap_experts), "gradients"
    ),
    "gradient-dropped": PlantedFault(
        "the gradient of one expert dropped", lambda: after_building(_drop_gradient), "gradients"
    ),
    "rounded-in-forward-alone": PlantedFault(
        "rotations and routing weights rounded to bf16, but not when a layer is computed again",
        _round_in_forward_alone,
        "",
        input="recomputed",
        precision=Precision.bf16,
    ),
}
