"""One optimizer step of rank 0: its collectives; for a process of its own.

The CPU computes it, so the model is as narrow as its heads and experts allow, and two small depths are run,
whose difference is what a layer adds. Neither changes which collectives there are. Sharding at full size is
part of the start; kernels, memory and waits at full size are shown on the stand-in for CUDA
(tests/cuda_standin).
"""

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from launch.rehearse.alone import Kind, join_alone, tallied
from train.hf.initial_weights import freeze
from train.layout import mesh
from train.layout.optim import average_replicated_gradients, build_optimizer, clip_gradients
from train.model.decoder import Decoder
from train.recipe import sizes
from train.recipe.schema import Balance, Latent, Model, Precision, Recipe, Recompute
from train.recipe.sizes import microbatches_per_rank
from train.step.balance import BalanceCounts
from train.step.batch_sums import BatchSums
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch

TOKENS = 8
HEAD, FFN, VOCABULARY = 16, 128, 512
"""Sizes of the narrow model: of a head, of an expert, and of the vocabulary."""


@dataclass(frozen=True)
class StepCollectives:
    """Rank 0's collectives in a step of the whole model."""

    collectives: dict[Kind, int]
    seconds: float
    """Of the rehearsal."""


def rehearse_step(recipe: Recipe, world_size: int) -> StepCollectives:
    """Takes steps of shallow, narrow models as rank 0, and counts for all layers and microbatches."""
    begun = time.process_time()
    join_alone(world_size, 0)
    built = mesh.build_mesh(recipe.parallelism, world_size, "cpu")
    narrow = replace(recipe, model=narrowed(recipe.model))
    layers = recipe.model.n_layers
    # The last layers may stay gathered, and the first be dense; all others are alike, or recur every so many.
    moe = recipe.model.moe
    first, period = (moe.dense_layers, moe.every_n_layers) if moe else (0, 1)
    depth = first + recipe.parallelism.gathered_layers + period
    depth += (layers - depth) % period
    ahead = sizes.layers(recipe.model) - layers  # of multi-token prediction
    grades = sizes.recomputed(recipe.training, layers + ahead)
    if depth + period > layers or len(set(grades)) > 1:
        collectives = count_step(narrow, grades, built)
    else:
        shallow, deeper = (
            count_step(narrow, grades[: some + ahead], built) for some in (depth, depth + period)
        )
        more = {kind: deeper[kind] - shallow[kind] for kind in deeper}
        collectives = Counter({k: shallow[k] + (layers - depth) // period * more[k] for k in deeper})
    return StepCollectives(dict(collectives), time.process_time() - begun)


def narrowed(model: Model) -> Model:
    """Returns a model with the same heads, experts and layers, which a CPU computes in no time."""
    moe = model.moe
    if moe is not None:
        widths = (moe.expert_hidden_size, moe.shared_hidden_size)
        expert, shared = (width and min(width, FFN) for width in widths)
        moe = replace(moe, expert_hidden_size=expert, shared_hidden_size=shared)
    latent = model.latent
    if latent is not None:
        q_rank = latent.q_rank and HEAD
        latent = Latent(kv_rank=HEAD, q_rank=q_rank, nope_width=HEAD, rope_width=HEAD, v_width=HEAD)
    return replace(
        model,
        moe=moe,
        latent=latent,
        d_model=min(model.d_model, model.n_heads * HEAD),
        head_width=None if model.head_width is None else min(model.head_width, HEAD),
        ffn_hidden_size=min(model.ffn_hidden_size, FFN),
        vocab_size=min(model.vocab_size, VOCABULARY),
    )


def count_step(recipe: Recipe, grades: list[Recompute], built: mesh.Mesh) -> Counter[Kind]:
    """Takes a step of a model with a layer of each grade; of its microbatches the last and one other run."""
    training, moe = recipe.training, recipe.model.moe
    decoder = Decoder(
        replace(recipe.model, n_layers=len(grades) - recipe.model.mtp),
        device="meta",
        recompute=grades,
        loss_chunk_tokens=training.loss_chunk_tokens,
    )
    mesh.build_sharded(decoder, built, Precision.bf16, recipe.seed)
    freeze(decoder, training.frozen)
    model = LanguageModel(decoder, recipe, Precision.bf16)
    optimizer = build_optimizer(model, recipe.optimizer)
    batch, sums = _few_tokens(recipe), BatchSums(None)
    microbatches = microbatches_per_rank(recipe, dist.get_world_size())
    needs_first_pass = False
    if moe is not None and moe.balance is not Balance.bias:
        needs_first_pass = BalanceCounts(model, moe.balance_scope, microbatches).needs_first_pass

    def one_pass(*, is_last: bool) -> Counter[Kind]:
        with tallied() as tally:
            if needs_first_pass:
                model.count_choices(batch)
            outputs = model(batch)
            losses = model.loss(outputs, batch)
            sums.add(batch, outputs, losses["language"])
            mesh.reduce_gradients(decoder, recipe.parallelism, after_this_pass=is_last)
            losses["total"].backward()
        return tally.calls

    total: Counter[Kind] = Counter()
    if microbatches > 1:
        calls = one_pass(is_last=False)
        total.update({kind: (microbatches - 1) * count for kind, count in calls.items()})
    total.update(one_pass(is_last=True))
    with tallied() as tally:
        sums.reduce([False, False])
        average_replicated_gradients(model.parameters())
        with torch.no_grad():
            clip_gradients(model.parameters(), training.clip_norm)
    total.update(tally.calls)
    optimizer.step()  # Muon's exchange does not grow by the layer: launch.plan counts it.
    return total


def _few_tokens(recipe: Recipe) -> Batch:
    """Returns one short sequence of random tokens."""
    # Ranks that share a sequence have equal parts of it.
    tokens = min(TOKENS, recipe.data.sequence_tokens) if recipe.parallelism.sharing == 1 else TOKENS
    shape = (1, tokens * recipe.parallelism.sharing)
    ids_BS = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids_BS,
        "document_ids": torch.zeros_like(ids_BS),
        "targets": ids_BS.roll(-1, dims=1),
        "sample_positions": torch.zeros(1, dtype=torch.int64),
    }
