"""Optimizers, learning-rate schedule and gradient clipping, the same under every layout."""

import functools
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.layout.average import keep_average
from train.layout.bf16_moments import Bf16MomentsAdamW, PartOffset
from train.layout.mesh import DENSE, EXPERT, SHARD, TENSOR
from train.layout.muon import Muon
from train.layout.qk_clip import clip_heads
from train.model.decoder import Decoder
from train.recipe.matrices import Stack, is_orthogonalised, stacked_rows
from train.recipe.schema import Decay, Model, Moments, OptimizerKind, Schedule, ScheduleKind
from train.recipe.schema import Optimizer as OptimizerRecipe
from train.recipe.transfer import Scales, transfer_scales


class _Kind(NamedTuple):
    """The properties that a group's parameters share; a fused update needs all its tensors on one mesh."""

    is_matrix: bool
    is_expert: bool
    is_sharded: bool
    """Routers are not, where others are, nor layers' norms where ranks share layers' weights."""
    is_orthogonal: bool
    """Muon updates it."""
    scales: Scales
    """Of `model.transfer_base`."""
    is_split: bool
    """A group of ranks shares it."""


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe, seed: int = 0) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer of the model's parameters, with decoupled weight decay of matrices only.

    Experts form separate parameter groups, and so do what is replicated where others are sharded, what groups
    of ranks share, and weights whose rates differ by `model.transfer_base`. A group's ``lr_scale`` is its
    learning rate as a multiple of the recipe's.

    Args:
        model: the model, on its device and sharded.
        recipe: the optimizer's section.
        seed: of the rounding of moments in bf16.
    """
    decoder = _decoder_of(model)
    optimizer = _of_kind(_groups(model, decoder, recipe), model, recipe, seed)
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * group["lr_scale"]
    if recipe.qk_clip is not None and decoder is not None:
        clip_heads(optimizer, decoder, recipe.qk_clip)  # before the average, which is of clipped weights
    if recipe.average_decay is not None:
        keep_average(optimizer, recipe.average_decay)
    return optimizer


def _groups(model: nn.Module, decoder: Decoder | None, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    kinds: dict[_Kind, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # Frozen: neither updated nor decayed.
            continue
        is_orthogonal = recipe.kind is OptimizerKind.muon and is_orthogonalised(name, parameter.shape)
        scales = Scales()
        if decoder is not None:
            # Weights that differ only in their initial scale share a group.
            scales = transfer_scales(decoder.cfg, name, orthogonal=is_orthogonal)._replace(std=1.0)
        names = (parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()
        kind = _Kind(
            is_matrix=parameter.ndim > 1,
            is_expert=".experts." in name,
            is_sharded=isinstance(parameter, DTensor),
            is_orthogonal=is_orthogonal,
            scales=scales,
            is_split=TENSOR in names,
        )
        kinds.setdefault(kind, []).append(parameter)
    decay = recipe.weight_decay
    if recipe.kind is OptimizerKind.lion:
        # LLM Foundry's Lion decays by weight_decay * lr / initial lr; now by weight_decay * lr like AdamW.
        decay *= recipe.learning_rate
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            # Per step, a weight loses rate * decay of itself, at any rate.
            "weight_decay": decay / kind.scales.rate if kind.is_matrix else 0.0,
            "lr_scale": kind.scales.rate,
        }
        for kind, parameters in kinds.items()
    ]
    if recipe.kind is not OptimizerKind.lion:
        for kind, group in zip(kinds, groups, strict=True):
            group["eps"] = recipe.eps * kind.scales.eps
    if recipe.kind is OptimizerKind.muon:
        rate_of_rest = (recipe.adamw_learning_rate or recipe.learning_rate) / recipe.learning_rate
        for kind, group in zip(kinds, groups, strict=True):
            group["orthogonal"] = kind.is_orthogonal
            group["lr_scale"] *= 1.0 if kind.is_orthogonal else rate_of_rest
    return groups


def _of_kind(
    groups: list[dict[str, Any]], model: nn.Module, recipe: OptimizerRecipe, seed: int
) -> torch.optim.Optimizer:
    """The recipe's optimizer of parameter groups."""
    lr, betas = recipe.learning_rate, (recipe.betas[0], recipe.betas[1])
    if recipe.kind is OptimizerKind.adamw and recipe.moments is Moments.bf16:
        places: dict[Tensor, PartOffset] = {
            p: _place(number, p) for number, p in zip(_numbers_of(model), model.parameters(), strict=True)
        }
        return Bf16MomentsAdamW(groups, places, seed, lr=lr, betas=betas, eps=recipe.eps)
    if recipe.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=recipe.eps, fused=True)
    if recipe.kind is OptimizerKind.muon:
        decoder = _decoder_of(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        stacks: dict[Tensor, tuple[Stack, dist.ProcessGroup | None]] = {
            p: stack_of(names[p], p, decoder.cfg if decoder is not None else None)
            for group in groups
            for p in group["params"]
            if group["orthogonal"]
        }
        return Muon(
            groups,
            stacks,
            lr=lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            steps=recipe.newton_schulz_steps,
            betas=betas,
            eps=recipe.eps,
        )
    lion: torch.optim.Optimizer = load_lion().DecoupledLionW(groups, lr=lr, betas=betas)
    return lion


def _decoder_of(model: nn.Module) -> Decoder | None:
    return next((module for module in model.modules() if isinstance(module, Decoder)), None)


def _numbers_of(model: nn.Module) -> list[int]:
    """The number of each parameter in the whole model, of which a stage of a pipeline has some."""
    decoder, held = _decoder_of(model), [name for name, _ in model.named_parameters()]
    if decoder is None or decoder.pipeline is None:
        return list(range(len(held)))
    every = [name for name, _ in Decoder(decoder.cfg, device="meta").named_parameters()]
    numbers = {name: number for number, name in enumerate(every)}
    return [numbers[name.removeprefix("decoder.")] for name in held]


def _place(number: int, parameter: nn.Parameter) -> PartOffset:
    """Where this rank's part of a parameter begins."""
    if not isinstance(parameter, DTensor):
        return PartOffset(number, 0)
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return PartOffset(number, offset[0] * math.prod(parameter.shape[1:]) if offset else 0)


def stack_of(name: str, parameter: nn.Parameter, cfg: Model | None) -> tuple[Stack, dist.ProcessGroup | None]:
    """Returns the matrices that a weight is a stack of, and the ranks that share its rows; None: only this.

    Of experts, the expert-parallel ranks have some each: the stack is that of this rank's.
    """
    (rows, columns), degree, group = parameter.shape, 1, None
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        group = parameter.device_mesh.get_group(DENSE if DENSE in names else SHARD)
        if EXPERT in names:
            degree = parameter.device_mesh.size(names.index(EXPERT))
    return Stack(stacked_rows(cfg, name, rows, degree) if cfg is not None else (rows,), columns), group


@functools.cache
def load_lion() -> Any:
    """Imports only LLM Foundry's module of Lion; all of LLM Foundry takes longer to import than torch."""
    package = importlib.util.find_spec("llmfoundry")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("lion", Path(package.origin).parent / "optim/lion.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def learning_rate_share(tokens_seen: int, duration_tokens: int, schedule: Schedule) -> float:
    """Learning rate after ``tokens_seen`` tokens, as a share of its peak.

    Linear warm-up from 0; then either a half cosine that falls to ``final_share`` at the end (Loshchilov and
    Hutter 2017), or a constant peak until the last ``decay_tokens``, over which the rate falls to
    ``final_share`` (Hu et al. 2024, section 4.2), linearly or in another shape (Hägele et al. 2024).
    """
    if tokens_seen < schedule.warmup_tokens:
        return tokens_seen / schedule.warmup_tokens
    if schedule.kind is ScheduleKind.cosine:
        span = max(1, duration_tokens - schedule.warmup_tokens)
        progress, shape = min(1.0, (tokens_seen - schedule.warmup_tokens) / span), Decay.cosine
    else:
        left = max(0, duration_tokens - tokens_seen)
        progress, shape = max(0.0, 1 - left / schedule.decay_tokens), schedule.decay
    fallen = {
        Decay.linear: progress,
        Decay.sqrt: math.sqrt(progress),
        Decay.cosine: (1 - math.cos(math.pi * progress)) / 2,
    }[shape]
    return 1 - (1 - schedule.final_share) * fallen


def average_replicated_gradients(
    parameters: Iterable[nn.Parameter], holders_of: dist.ProcessGroup | None = None
) -> None:
    """Averages, in one all-reduce over all ranks, the gradients of parameters that every rank holds whole.

    FSDP2 averages those of sharded parameters in the backward pass. Where nothing is sharded, there is only
    one rank. To be called once a step, after the last backward pass: microbatches add up on each rank.

    Args:
        parameters: the model's.
        holders_of: the ranks of this one's stage in a pipeline, which hold these parameters; None: all.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not whole or len(whole) == len(gradients):
        return
    together = torch.cat([gradient.flatten() for gradient in whole])
    # A sum, since gloo has no average.
    dist.all_reduce(together, group=holders_of)
    together /= dist.get_world_size(holders_of)
    parts = together.split([gradient.numel() for gradient in whole])
    torch._foreach_copy_(whole, [part.view_as(own) for part, own in zip(parts, whole, strict=True)])


def sum_over_ends(weight: nn.Parameter, ends: dist.ProcessGroup) -> None:
    """Sums the gradient of a weight that the first and the last stage of a pipeline hold, over both of them.

    To be called once a step, after the last backward pass. Both then make the same update of equal weights.
    """
    assert weight.grad is not None
    dist.all_reduce(weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad, group=ends)


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    stages: int = 1,
    twice: nn.Parameter | None = None,
) -> Tensor:
    """Scales gradients to a global L2 norm of at most ``max_norm`` and returns the previous norm (fp32).

    The norm is that of the unsharded model: each rank sums over its own shards in float64, a shard held by
    several ranks counts once, and one all-reduce sums over ranks. If every rank holds the whole model there
    is nothing to reduce.

    Args:
        parameters: the model's, or those of this rank's stage.
        max_norm: the limit; None: none.
        stages: of the pipeline, each of which has parameters of its own on an equal number of ranks.
        twice: the one that another stage has too; None: there is none.
    """
    held = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in held if p.grad is not None]
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if not shards:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(shards)).double()
    is_sharded = any(isinstance(g, DTensor) for g in gradients)
    world_size = torch.distributed.get_world_size() if is_sharded else 1
    shared = [holders(p, world_size // stages) * (2 if p is twice else 1) for p in held]
    square = (norms.square() / torch.tensor(shared, dtype=torch.float64, device=norms.device)).sum()
    if is_sharded:
        torch.distributed.all_reduce(square)
    norm = square.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_(shards, scale)
    return norm.float()


def holders(tensor: Tensor, world_size: int) -> int:
    """Number of ranks that hold the same shard of this weight or gradient; all of them, if it is whole."""
    if not isinstance(tensor, DTensor):
        return world_size
    mesh = tensor.device_mesh
    return math.prod(
        mesh.size(dim) for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)
    )
