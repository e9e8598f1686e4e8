"""The gate's input `loaded`: the real loader, under two phases that differ in all that may change.

The samples are in memory; order, ranks' shares, joined samples, borders of documents and targets are the
loader's own. The second phase has longer sequences in another number, another microbatch, mixture, learning
rate and RoPE base. Routers draw noise, and both of their losses weigh enough for a fault of a tenth to show.

Shapes: S tokens of a sample.
"""

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.order.plan import OrderPlan
from data.shards.packing import Sample
from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Balance, LossMean, Moe, Phase, Position, Recipe
from train.recipe.tiny import SEQUENCE_TOKENS
from train.recipe.topology import Topology

if TYPE_CHECKING:
    from data.loader import TrainLoader

MIXTURES = {"code": 0.5, "prose": 0.5}, {"code": 0.25, "prose": 0.75}
"""Of the first phase and of the second."""
BATCHES = 16, 8
"""Sequences of the two phases' global batches."""
MICROBATCHES = 2, 1
"""Sequences of a microbatch in either phase."""
JOINED = 2
"""Samples of a sequence of the second phase."""
LATER_BATCHES = 2
RATE_SCALE = 0.5
THETA_FACTOR = 10.0
JITTER = 0.05
BALANCE_WEIGHT, Z_WEIGHT = 0.5, 0.1
SHARD_SAMPLES = (8, 4, 8)
"""Samples of each shard of a domain: a run reads some twice."""


def with_phases(small: Recipe) -> Recipe:
    """The tiny recipe with the two phases and the routers' settings."""
    first, later = BATCHES[0] * SEQUENCE_TOKENS, BATCHES[1] * SEQUENCE_TOKENS * JOINED
    duration = first + LATER_BATCHES * later
    scale = duration / small.training.duration_tokens
    rotates = small.model.position is Position.rope
    phases = [
        Phase(
            tokens=first,
            weights=MIXTURES[0],
            sequence_tokens=SEQUENCE_TOKENS,
            global_batch_sequences=BATCHES[0],
            microbatch_sequences=MICROBATCHES[0],
        ),
        Phase(
            tokens=LATER_BATCHES * later,
            weights=MIXTURES[1],
            sequence_tokens=SEQUENCE_TOKENS * JOINED,
            global_batch_sequences=BATCHES[1],
            microbatch_sequences=MICROBATCHES[1],
            learning_rate_scale=RATE_SCALE,
            rope_theta=small.model.rope_theta * THETA_FACTOR if rotates else None,
        ),
    ]
    schedule = small.schedule
    moe = None if small.model.moe is None else _loud(small.model.moe)
    return replace(
        small,
        model=replace(small.model, max_sequence_tokens=SEQUENCE_TOKENS * JOINED, moe=moe),
        data=replace(small.data, domains={}, phases=phases),
        training=replace(small.training, duration_tokens=duration, global_batch_sequences=BATCHES[0]),
        schedule=replace(
            schedule,
            warmup_tokens=round(schedule.warmup_tokens * scale),
            decay_tokens=round(schedule.decay_tokens * scale),
        ),
    )


def build_loader(recipe: Recipe, seed: int, topology: Topology) -> "TrainLoader":
    """Builds a rank's loader over samples drawn from a seed."""
    # Where there is no Streaming, gpu_check imports this module too.
    from data.loader import TrainSequences, open_loader

    curriculum = plan_stages(recipe)
    plan = build_plan(recipe)
    samples = draw_samples(recipe, seed)
    dataset = TrainSequences(
        plan,
        [samples[domain] for domain in plan.domains],
        curriculum,
        rank=sizes.reader_of(recipe.parallelism, topology.world_size, topology.rank),
        world_size=sizes.readers(recipe.parallelism, topology.world_size),
        start=0,
    )
    return open_loader(dataset, workers=0)


def build_plan(recipe: Recipe) -> OrderPlan:
    """The order of the samples of :func:`draw_samples`."""
    sizes = dict.fromkeys(MIXTURES[0], SHARD_SAMPLES)
    return OrderPlan(plan_stages(recipe).segments(), sizes, seed=recipe.seed, window_shards=1)


def draw_samples(recipe: Recipe, seed: int) -> dict[str, list[Sample]]:
    """Draws each domain's samples: documents of one token to some samples, which continue in the next."""
    S, V = recipe.data.sequence_tokens, recipe.model.vocab_size
    found = {}
    for number, domain in enumerate(sorted(MIXTURES[0])):
        generator = np.random.default_rng([seed, number])
        count = sum(SHARD_SAMPLES)
        begins = generator.random((count, S)) < 3 / S
        documents = begins.ravel().cumsum().reshape(count, S)
        tokens = generator.integers(V, size=(count, S), dtype=np.int32)
        found[domain] = [_sample(*each) for each in zip(tokens, documents, strict=True)]
        if recipe.training.loss_mean is LossMean.targets and domain == "code":
            # Of the other domain's samples every token has a loss, as where old text is mixed in.
            is_trained = np.repeat(generator.random((count, S // 8)) < 1 / 4, 8, axis=1)
            bits = np.packbits(is_trained, axis=1)
            found[domain] = [
                replace(each, trained=own) for each, own in zip(found[domain], bits, strict=True)
            ]
    return found


def _sample(tokens: NDArray[np.int32], documents: NDArray[np.int64]) -> Sample:
    pieces = [(document, len(list(of))) for document, of in itertools.groupby(documents.tolist())]
    lengths = np.array([length for _, length in pieces], np.int32)
    return Sample(tokens, lengths, np.array([document for document, _ in pieces], np.int64))


def _loud(moe: Moe) -> Moe:
    """Router settings under which noise and losses show."""
    weight = moe.balance_loss_weight if moe.balance is Balance.bias else BALANCE_WEIGHT
    return replace(moe, jitter_eps=JITTER, z_loss_weight=Z_WEIGHT, balance_loss_weight=weight)
