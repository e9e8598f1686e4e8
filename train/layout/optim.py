"""Optimizers, learning-rate schedule and gradient clipping, the same under every layout."""

import functools
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from train.recipe.schema import Optimizer as OptimizerRecipe
from train.recipe.schema import OptimizerKind, Schedule, ScheduleKind


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """Builds AdamW or Lion over the model's parameters, with decoupled weight decay of matrices only.

    Experts form separate parameter groups, and so do routers where others are sharded: a fused update needs
    all its tensors on one mesh.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # Frozen: neither updated nor decayed.
            continue
        kind = (parameter.ndim > 1, ".experts." in name, isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    decay = recipe.weight_decay
    betas = (recipe.betas[0], recipe.betas[1])
    if recipe.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(
            [{"params": p, "weight_decay": decay if matrix else 0.0} for (matrix, *_), p in groups.items()],
            lr=recipe.learning_rate,
            betas=betas,
            eps=recipe.eps,
            fused=True,
        )
    # LLM Foundry's Lion decays by weight_decay * lr / initial lr; scaled, by weight_decay * lr like AdamW.
    scaled = decay * recipe.learning_rate
    lion: torch.optim.Optimizer = load_lion().DecoupledLionW(
        [{"params": p, "weight_decay": scaled if matrix else 0.0} for (matrix, *_), p in groups.items()],
        lr=recipe.learning_rate,
        betas=betas,
    )
    return lion


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
    Hutter 2017), or a constant peak until the last ``decay_tokens``, over which the rate falls linearly to
    ``final_share`` (Hu et al. 2024, section 4.2).
    """
    if tokens_seen < schedule.warmup_tokens:
        return tokens_seen / schedule.warmup_tokens
    if schedule.kind is ScheduleKind.cosine:
        span = max(1, duration_tokens - schedule.warmup_tokens)
        progress = min(1.0, (tokens_seen - schedule.warmup_tokens) / span)
        fallen = (1 - math.cos(math.pi * progress)) / 2
    else:
        left = max(0, duration_tokens - tokens_seen)
        fallen = max(0.0, 1 - left / schedule.decay_tokens)
    return 1 - (1 - schedule.final_share) * fallen


def average_replicated_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages, in one all-reduce over all ranks, the gradients of parameters that every rank holds whole.

    FSDP2 averages those of sharded parameters in the backward pass. Where nothing is sharded, there is only
    one rank. To be called once a step, after the last backward pass: microbatches add up on each rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not whole or len(whole) == len(gradients):
        return
    together = torch.cat([gradient.flatten() for gradient in whole])
    # A sum, since gloo has no average.
    torch.distributed.all_reduce(together)
    together /= torch.distributed.get_world_size()
    parts = together.split([gradient.numel() for gradient in whole])
    torch._foreach_copy_(whole, [part.view_as(own) for part, own in zip(parts, whole, strict=True)])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales gradients to a global L2 norm of at most ``max_norm`` and returns the previous norm (fp32).

    The norm is that of the unsharded model: each rank sums over its own shards in float64, a shard held by
    several ranks counts once, and one all-reduce sums over ranks. If every rank holds the whole model there
    is nothing to reduce.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if not shards:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(shards)).double()
    is_sharded = any(isinstance(g, DTensor) for g in gradients)
    world_size = torch.distributed.get_world_size() if is_sharded else 1
    holders = [_holders(g, world_size) for g in gradients]
    square = (norms.square() / torch.tensor(holders, dtype=torch.float64, device=norms.device)).sum()
    if is_sharded:
        torch.distributed.all_reduce(square)
    norm = square.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_(shards, scale)
    return norm.float()


def _holders(gradient: Tensor, world_size: int) -> int:
    """Number of ranks that hold the same shard of this gradient."""
    if not isinstance(gradient, DTensor):
        return world_size
    mesh = gradient.device_mesh
    return math.prod(
        mesh.size(dim)
        for dim, placement in enumerate(gradient.placements)
        if isinstance(placement, Replicate)
    )
