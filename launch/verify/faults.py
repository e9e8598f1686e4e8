"""Known bugs of expert parallelism in other frameworks, injected on purpose: the gate must find each.

A fault is a context in which a rank's process trains incorrectly. ``python -m launch.verify --inject NAME``
shows the gate's report; the tests check that the gate finds all of them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.verify import (
    context_faults,
    decision_faults,
    expert_faults,
    node_faults,
    pipeline_faults,
    tensor_faults,
    update_faults,
)
from launch.verify.cases import MOST_QK_CLIP, NODES, Layout
from launch.verify.expert_faults import FINER, GLOBAL_SCOPE, Changes
from train import run
from train.layout import mesh, optim, qk_clip
from train.layout.mesh import DENSE
from train.model import decoder
from train.model.attention import AttentionPlan
from train.model.moe import MoE
from train.recipe.matrices import Stack
from train.recipe.schema import Model, OptimizerKind, Precision, Recipe, TransferBase
from train.step import balance, step
from train.step.language_model import LanguageModel

Build = Callable[..., None]
FOUR = Layout(2, 1, 2)
"""A layout with replicas and with expert parallelism."""
PAIR = Layout(1, 2, 1)
"""Two ranks that share out everything."""
HALVES = Layout(1, 1, 2)
"""The same two, each with whole experts, half of them."""
SHARED = Layout(1, 2, 1, context=2)
"""The same two with parts of the same sequences."""
SPLIT = Layout(1, 2, 1, tensor=2)
"""The same two, which split heads too."""

STAGED = Layout(1, 1, 1, pipeline=2)
"""The same two, each with half of the layers."""


@dataclass(frozen=True)
class KnownFault:
    """A fault, and the case and quantity in which it must be detected."""

    what: str
    inject: Callable[[], AbstractContextManager[Any]]
    shows_in: str
    """The quantity that must exceed its bound; empty if the case must stop with an error."""
    layout: Layout = HALVES
    input: str = "accumulated"
    experts: Changes = ()
    """Changes of the recipe's experts without which it has no effect."""
    precision: Precision = Precision.fp32
    """fp32: it is detected in every precision in which its input is run. bf16: it must be in that one."""
    optimizer: OptimizerKind | None = None
    """The optimizer that it is a fault of; None: of any."""
    model: Changes = ()
    """Changes of the recipe's model without which it has no effect."""
    qk_clip: float | None = None
    """The recipe's `optimizer.qk_clip`."""

    def recipe_of(self, recipe: Recipe) -> Recipe:
        """The recipe in which the fault has an effect."""
        assert recipe.model.moe is not None
        moe = replace(recipe.model.moe, **dict(self.experts))  # type: ignore[arg-type]
        recipe = replace(recipe, model=replace(recipe.model, moe=moe, **dict(self.model)))  # type: ignore[arg-type]
        optimizer = replace(recipe.optimizer, qk_clip=self.qk_clip)
        if self.optimizer is not None:
            optimizer = replace(optimizer, kind=self.optimizer)
        return replace(recipe, optimizer=optimizer)


@contextlib.contextmanager
def after_building(change: Callable[[nn.Module], None]) -> Iterator[None]:
    """Applies a change to the sharded decoder after it is built."""
    original = mesh.build_sharded

    def build(decoder: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(decoder, *args, **kwargs)  # type: ignore[arg-type]
        change(decoder)

    with mock.patch.object(run, "build_sharded", build):
        yield


def _scale_expert_gradients(power: int, decoder: nn.Module) -> None:
    """Omits MegaBlocks' division by the expert degree, or does it twice."""
    for moe in _moes(decoder):
        moe.experts.mlp.gradient_scale /= HALVES.expert**power


def _average_in_each_replica(parameters: Iterable[nn.Parameter], _: object = None) -> None:
    """Averages routers' gradients over the ranks of one replica only."""
    held = list(parameters)
    meshes = [p.device_mesh for p in held if isinstance(p, DTensor)]
    group = next(each.get_group(DENSE) for each in meshes if DENSE in (each.mesh_dim_names or ()))
    for parameter in held:
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= group.size()


def _swap_experts(decoder: nn.Module) -> None:
    """Swaps two experts, as a faulty conversion between expert degrees might."""
    for moe in _moes(decoder):
        for weight in moe.experts.mlp.parameters():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            rows = weight.shape[0] // moe.router.moe.experts
            with torch.no_grad():
                local[: 2 * rows] = local[: 2 * rows].roll(rows, dims=0)


def _drop_gradient(decoder: nn.Module) -> None:
    """Zeroes the gradient of the first expert on one rank."""
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
    """Clips by another norm: the root of the sum of ``square(parameter, this rank's gradient)``."""

    def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, *_: object) -> Tensor:
        kept = [(p, p.grad) for p in parameters if p.grad is not None]
        shards = [grad.to_local() if isinstance(grad, DTensor) else grad for _, grad in kept]
        squares = [square(p, shard) for (p, _), shard in zip(kept, shards, strict=True)]
        total = torch.stack(squares).sum() / FOUR.replicate
        if over_ranks:
            dist.all_reduce(total)
        norm = total.sqrt()
        assert max_norm is not None
        torch._foreach_mul_(shards, min(1.0, max_norm / norm.item()))
        return norm

    return mock.patch.object(step, "clip_gradients", clip)


def _times_for_experts(factor: float, parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """A shard's squared norm, times a factor if it is an expert's; of a router, this rank's share of it."""
    square = shard.double().square().sum()
    if not isinstance(parameter, DTensor):
        return square * FOUR.replicate / FOUR.world_size
    is_expert = mesh.EXPERT in (parameter.device_mesh.mesh_dim_names or ())
    return square * (factor if is_expert else 1.0)


def _balance_of_rank_0(self: LanguageModel, *args: Any) -> dict[str, Tensor]:
    """Adds the balance loss only on the first rank."""
    if dist.get_rank():
        self.balance_weight = 0.0
    return _original_loss(self, *args)


_original_loss = LanguageModel.loss


def _count_each_microbatch() -> AbstractContextManager[Any]:
    """Never gathers counts over the balance scope."""
    return mock.patch.object(balance, "_given", lambda _batch_counts_LE, counts_LE: counts_LE)


@contextlib.contextmanager
def _round_in_forward_only() -> Iterator[None]:
    """Lets FSDP2 cast the inputs of layers and experts; before torch 2.13 it does not in recomputation."""
    original = decoder.plan_attention

    def plan(*args: Any, **kwargs: Any) -> AttentionPlan:
        exact = original(*args, **kwargs | {"dtype": torch.float32})
        return original(*args, **kwargs)._replace(cos_SR=exact.cos_SR, sin_SR=exact.sin_SR)

    with (
        mock.patch.object(decoder, "plan_attention", plan),
        mock.patch.object(mesh, "replace", lambda policy, **_changes: policy),
    ):
        yield


def _slab_of(_name: str, parameter: nn.Parameter, _cfg: Model | None) -> tuple[Stack, None]:
    """Takes the rows that a rank holds for one whole matrix."""
    rows, columns = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
    return Stack((rows,), columns), None


def _moes(decoder: nn.Module) -> list[MoE]:
    return [module for module in decoder.modules() if isinstance(module, MoE)]


FAULTS = {
    "experts-times-degree": KnownFault(
        "expert gradients times the expert degree",
        lambda: after_building(functools.partial(_scale_expert_gradients, -1)),
        "gradients",
    ),
    "experts-over-degree": KnownFault(
        "expert gradients divided by the expert degree once more",
        lambda: after_building(functools.partial(_scale_expert_gradients, 1)),
        "gradients",
    ),
    "norm-without-experts": KnownFault(
        "experts missing from the global norm",
        lambda: _clipping_with(functools.partial(_times_for_experts, 0.0)),
        "norm",
        layout=FOUR,
    ),
    "norm-with-experts-twice": KnownFault(
        "experts counted twice in the global norm",
        lambda: _clipping_with(functools.partial(_times_for_experts, 2.0)),
        "norm",
        layout=FOUR,
    ),
    "local-norm": KnownFault(
        "each rank clips with the norm of its own shards",
        lambda: _clipping_with(functools.partial(_times_for_experts, 1.0), over_ranks=False),
        "norm",
        layout=FOUR,
    ),
    "balance-of-one-rank": KnownFault(
        "a balance loss of the first rank only",
        lambda: mock.patch.object(LanguageModel, "loss", _balance_of_rank_0),
        "gradients",
    ),
    "balance-of-microbatch": KnownFault(
        "a balance loss that depends on the split into microbatches",
        _count_each_microbatch,
        "balance",
        layout=PAIR,
        experts=GLOBAL_SCOPE,
    ),
    "shared-times-degree": KnownFault(
        "gradients of a shared expert times the expert degree",
        lambda: expert_faults.count_shared_by_degree(HALVES.expert),
        "gradients",
        experts=FINER,
    ),
    "bias-of-one-rank": KnownFault(
        "a balancing bias that is updated on the first rank only",
        expert_faults.update_bias_on_rank_0,
        "weights",
        experts=FINER,
    ),
    "sequences-of-microbatch": KnownFault(
        "a balance loss of all of a microbatch in place of each sequence",
        expert_faults.balance_each_microbatch,
        "balance",
        experts=FINER,
    ),
    "router-not-synchronised": KnownFault(
        "replicas that keep their own gradients of the router",
        lambda: mock.patch.object(step, "average_replicated_gradients", _average_in_each_replica),
        "gradients",
        layout=FOUR,
    ),
    "router-not-reduced": KnownFault(
        "ranks that keep their own gradients of the router",
        lambda: mock.patch.object(step, "average_replicated_gradients", lambda *_: None),
        "gradients",
    ),
    "experts-swapped": KnownFault(
        "two experts swapped at load", lambda: after_building(_swap_experts), "gradients"
    ),
    "gradient-dropped": KnownFault(
        "the gradient of one expert dropped", lambda: after_building(_drop_gradient), "gradients"
    ),
    "rounded-in-forward-alone": KnownFault(
        "rotations and routing weights rounded to bf16, but not in recomputation (torch before 2.13)",
        _round_in_forward_only,
        "",
        input="recomputed",
        precision=Precision.bf16,
    ),
    "reduced-in-bf16": KnownFault(
        "gradients summed over ranks in bf16 though the recipe says fp32",
        update_faults.reduce_in_bf16,
        "exact",
        precision=Precision.bf16,
    ),
    "w2-gradient-smaller": KnownFault(
        "gradients of the experts' w2 half a percent too small",
        lambda: update_faults.scale_gradients("experts.mlp.w2", update_faults.SMALLER),
        "bias",
        precision=Precision.bf16,
    ),
    "clipped-by-own-norm": KnownFault(
        "each rank clips by the norm of its own shards, but reports the right one",
        update_faults.clip_by_own_norm,
        "clipped",
        precision=Precision.bf16,
    ),
    "moments-in-bf16": KnownFault(
        "first moments rounded to bf16",
        lambda: update_faults.with_optimizer(update_faults.round_moments),
        "moments",
        precision=Precision.bf16,
    ),
    "weights-in-bf16": KnownFault(
        "weights rounded to bf16 after each step",
        lambda: update_faults.with_optimizer(update_faults.round_weights),
        "weights",
        precision=Precision.bf16,
    ),
    "norms-decayed": KnownFault(
        "weight decay of norms too",
        lambda: update_faults.with_optimizer(update_faults.decay_norms),
        "settings",
        precision=Precision.bf16,
    ),
    "norms-decayed-unseen": KnownFault(
        "weight decay of norms, outside of the optimizer",
        lambda: update_faults.with_optimizer(update_faults.decay_norms_unseen),
        "weights",
        precision=Precision.bf16,
    ),
    "expert-rate-lost": KnownFault(
        "experts' learning rate not scaled from the base's",
        lambda: update_faults.with_optimizer(update_faults.lose_expert_rates),
        "settings",
        model=(("transfer_base", TransferBase(64, 2, 2, 112, top_k=2)),),
    ),
    "rate-of-one-rank": KnownFault(
        "a learning rate that reaches only the first rank",
        update_faults.rate_of_one_rank,
        "settings",
        precision=Precision.bf16,
    ),
    "first-share-read": KnownFault(
        "every rank reads the first rank's sequences",
        decision_faults.read_first_share,
        "read",
        layout=PAIR,
        input="loaded",
    ),
    "documents-joined": KnownFault(
        "ranks that take each sequence for one document",
        decision_faults.join_documents,
        "read",
        layout=PAIR,
        input="loaded",
    ),
    "noise-by-place": KnownFault(
        "router noise by the place in a microbatch",
        decision_faults.draw_noise_by_place,
        "gradients",
        layout=PAIR,
        input="loaded",
    ),
    "base-of-first-phase": KnownFault(
        "ranks that a phase's RoPE base does not reach",
        decision_faults.keep_first_base,
        "gradients",
        layout=PAIR,
        input="loaded",
    ),
    "rate-of-first-phase": KnownFault(
        "ranks that a phase's learning rate does not reach",
        decision_faults.keep_first_rate_scale,
        "settings",
        layout=PAIR,
        input="loaded",
    ),
    "z-loss-of-one-rank": KnownFault(
        "a z-loss of the first rank only",
        decision_faults.lose_z_loss,
        "gradients",
        layout=PAIR,
        input="loaded",
    ),
    "mtp-by-own-targets": KnownFault(
        "a loss of multi-token prediction divided by the microbatch's own targets",
        expert_faults.divide_by_own_targets,
        "loss",
        model=(("mtp", True),),
    ),
    "responses-of-microbatch": KnownFault(
        "a loss divided by each microbatch's own count of response tokens",
        expert_faults.divide_by_microbatch_targets,
        "gradients",
        layout=PAIR,
        input="masked",
    ),
    "responses-of-rank": KnownFault(
        "a loss divided by the response tokens of a rank's own sequences",
        expert_faults.divide_by_rank_targets,
        "gradients",
        layout=PAIR,
        input="masked",
    ),
    "border-target-lost": KnownFault(
        "the last target of each part of a sequence lost, as if targets were made of parts",
        context_faults.lose_border_targets,
        "gradients",
        layout=SHARED,
    ),
    "places-of-a-whole": KnownFault(
        "parts of sequences that count their places from 0",
        context_faults.count_from_zero,
        "gradients",
        layout=SHARED,
    ),
    "keys-one-off": KnownFault(
        "keys of shared sequences that are one place off",
        context_faults.shift_keys,
        "gradients",
        layout=SHARED,
    ),
    "keys-averaged": KnownFault(
        "gradients of keys and values averaged over the ranks that share them, not summed",
        context_faults.average_keys,
        "gradients",
        layout=SHARED,
    ),
    "loss-over-the-whole": KnownFault(
        "losses of parts divided by the positions of whole sequences: gradients averaged twice",
        context_faults.divide_by_whole,
        "gradients",
        layout=SHARED,
    ),
    "documents-of-other-half": KnownFault(
        "a document mask whose queries are those of a rank's other chunk",
        context_faults.swap_documents,
        "gradients",
        layout=SHARED,
    ),
    "norms-of-own-tokens": KnownFault(
        "ranks that share dense weights keep their own gradients of norms",
        tensor_faults.keep_own_norms,
        "gradients",
        layout=SPLIT,
    ),
    "norms-summed": KnownFault(
        "gradients of norms summed over the ranks that share dense weights, not averaged",
        lambda: tensor_faults.sum_norms(SPLIT.tensor),
        "gradients",
        layout=SPLIT,
    ),
    "input-gradients-of-own-share": KnownFault(
        "gradients of a split product's input that are not summed over the ranks that share it",
        tensor_faults.keep_own_input_gradients,
        "gradients",
        layout=SPLIT,
    ),
    "own-sums-twice": KnownFault(
        "a rank's own partial sums added once more, as a bias of every rank would be",
        tensor_faults.add_own_sums_twice,
        "gradients",
        layout=SPLIT,
    ),
    "router-times-degree": KnownFault(
        "gradients of routers times the ranks that share a sequence",
        lambda: tensor_faults.sum_routers(SPLIT.tensor),
        "gradients",
        layout=SPLIT,
    ),
    "tokens-sent-twice": KnownFault(
        "tokens sent to their experts by each rank that shares their sequence",
        tensor_faults.dispatch_twice,
        "choices",
        layout=SPLIT,
    ),
    "heads-not-exchanged": KnownFault(
        "ranks that attend with the heads that they have computed, of whatever kind",
        tensor_faults.keep_heads,
        "gradients",
        layout=SPLIT,
    ),
    "row-lost-in-node": KnownFault(
        "a token that crossed to a node and was lost between its ranks",
        node_faults.drop_row,
        "gradients",
        layout=NODES,
        input="split",
    ),
    "weights-twice": KnownFault(
        "weights of experts applied on their node and once more",
        node_faults.weigh_twice,
        "gradients",
        layout=NODES,
        input="split",
    ),
    "weights-gradients-lost": KnownFault(
        "gradients of experts' weights that do not come back from their node",
        node_faults.lose_gradients_of_weights,
        "gradients",
        layout=NODES,
        input="split",
    ),
    "stage-bias-lost": KnownFault(
        "a balancing bias that only the first stage of a pipeline updates",
        pipeline_faults.keep_bias,
        "weights",
        layout=STAGED,
        experts=FINER,
    ),
    "gradient-sent-twice": KnownFault(
        "the gradient of a microbatch sent twice to the stage before, in place of the next one's",
        pipeline_faults.send_gradient_twice,
        "gradients",
        layout=STAGED,
    ),
    "norm-without-a-stage": KnownFault(
        "a stage of a pipeline left out of the global norm",
        pipeline_faults.lose_norm_of_stage,
        "norm",
        layout=STAGED,
    ),
    "activation-of-another": KnownFault(
        "a stage that computes a microbatch from the activation of the one before it",
        pipeline_faults.take_earlier_activation,
        "gradients",
        layout=STAGED,
    ),
    "routers-of-all-stages": KnownFault(
        "gradients of routers averaged over all stages of a pipeline",
        pipeline_faults.average_over_stages,
        "gradients",
        layout=STAGED,
    ),
    "embeddings-apart": KnownFault(
        "an embedding of the first and the last stage, each with its own part's gradient",
        pipeline_faults.keep_embeddings_apart,
        "gradients",
        layout=STAGED,
        model=(("mtp", True),),
    ),
    "embedding-twice-in-norm": KnownFault(
        "an embedding of the first and the last stage that is twice in the global norm",
        pipeline_faults.count_embedding_twice,
        "norm",
        layout=STAGED,
        model=(("mtp", True),),
    ),
    "logits-of-every-stage": KnownFault(
        "heads clipped by the logits of other stages' layers",
        pipeline_faults.clip_by_every_stage,
        "weights",
        layout=STAGED,
        model=(("clip_qkv", None),),
        qk_clip=MOST_QK_CLIP,
    ),
    "recomputed-with-newest": KnownFault(
        "layers of a pipeline recomputed with the sequences of the newest microbatch",
        pipeline_faults.recompute_with_newest,
        "gradients",
        layout=STAGED,
        input="recomputed",
        experts=FINER,
    ),
    "muon-on-a-slab": KnownFault(
        "Muon on the rows that a rank holds, parts of matrices and stacks of experts",
        lambda: mock.patch.object(optim, "stack_of", _slab_of),
        "weights",
        optimizer=OptimizerKind.muon,
    ),
    "logits-of-one-rank": KnownFault(
        "heads clipped by the largest logits of a rank's own sequences",
        lambda: mock.patch.object(qk_clip, "over_ranks", lambda largest_LH: largest_LH),
        "weights",
        layout=PAIR,
        model=(("clip_qkv", None),),
        qk_clip=MOST_QK_CLIP,
    ),
}
