"""The tiny recipe: every feature of a recipe at a size that trains in seconds on any machine.

Kept: the kind of feed-forward network, positions, norms, QKV clipping, tied embeddings, the ratio of query
to key-value heads, the ratio of hidden size to width, up to 16 experts and top-4, losses, optimizer,
schedule shape, precision policy, checkpointing. Changed: widths, depth, more experts than that, vocabulary
and tokenizer, sequence length, batch, length of the run, corpus. A curriculum becomes two phases that
differ in mixture and, if the recipe's do, in sequence length, RoPE's base and learning rate. Weights are
drawn from the seed, and the layout is that of one rank.
"""

import math
from dataclasses import replace

from train.recipe import sizes
from train.recipe.phases import phases_of
from train.recipe.schema import (
    Data,
    ExchangePrecision,
    FillInMiddle,
    Model,
    Moe,
    Phase,
    Recipe,
    Start,
    Tokenizer,
    TokenizerKind,
    TransferBase,
)

HEAD_WIDTH = 16
MOST_KV_HEADS = 2
LAYERS = 2
MOST_EXPERTS = 16
MOST_TOP_K = 4
"""Of more experts: each is a product of its own on a CPU, and 128 of them take minutes a step."""
VOCABULARY = 512
SEQUENCE_TOKENS = 64
LONGER = 2
"""Factor by which a phase of longer sequences is longer."""
MICROBATCH_SEQUENCES = 2


def tiny_recipe(recipe: Recipe, *, steps: int, global_batch_sequences: int = 8) -> Recipe:
    """Makes the tiny recipe for ``steps`` optimizer steps.

    Args:
        recipe: any valid recipe.
        steps: length of the tiny run.
        global_batch_sequences: its batch; large enough for several microbatches per rank.

    Returns:
        A valid recipe that reads the installed corpus.
    """
    training = recipe.training
    model = _tiny_model(recipe.model, tile=sizes.TILE.get(training.expert_precision, 1))
    phases = _two_phases(recipe, steps, global_batch_sequences) if steps > 1 else []
    duration = steps * global_batch_sequences * SEQUENCE_TOKENS
    if phases:
        longest = max(phase.sequence_tokens or 0 for phase in phases)
        model = replace(model, max_sequence_tokens=longest)
        duration = sum(phase.tokens for phase in phases)
    scale = duration / sizes.trained_tokens(recipe)
    # Of two layers one.
    gathered = min(recipe.parallelism.gathered_layers, model.n_layers - 1)
    recomputed = training.recompute_layers and min(training.recompute_layers, max(1, model.n_layers - 1))
    return replace(
        recipe,
        name=f"{recipe.name}-shrunken",
        model=model,
        tokenizer=Tokenizer(TokenizerKind.bpe, VOCABULARY),
        data=_tiny_data(recipe.data, phases),
        training=replace(
            training,
            duration_tokens=duration,
            global_batch_sequences=global_batch_sequences,
            microbatch_sequences=MICROBATCH_SEQUENCES,
            recompute_layers=recomputed,
            loss_chunk_tokens=min(training.loss_chunk_tokens or SEQUENCE_TOKENS, SEQUENCE_TOKENS),
        ),
        start=Start(),
        parallelism=replace(
            recipe.parallelism,
            replicate=1,
            expert=1,
            context=1,
            tensor=1,
            pipeline=1,
            pipeline_layers=[],
            pipeline_chunks=1,
            gathered_layers=gathered,
            exchange_precision=ExchangePrecision.same,
            exchange_node_ranks=None,
        ),
        schedule=replace(
            recipe.schedule,
            warmup_tokens=round(recipe.schedule.warmup_tokens * scale),
            decay_tokens=round(recipe.schedule.decay_tokens * scale),
        ),
    )


def _tiny_data(data: Data, phases: list[Phase]) -> Data:
    return replace(
        data,
        shards=f".cache/shrunken-shards-{VOCABULARY}-{SEQUENCE_TOKENS}",
        corpus="installed",
        corpus_bytes=2_000_000,
        sources=[],
        domains={} if phases else {"code": 0.5, "prose": 0.5},
        phases=phases,
        domain_max_epochs={},
        fill_in_middle=FillInMiddle(),
        sequence_tokens=SEQUENCE_TOKENS,
        workers=0,
    )


def _tiny_model(model: Model, *, tile: int) -> Model:
    """Makes a tiny model of the same ratios: query to key-value heads, hidden size to width.

    Widths are multiples of ``tile``, the elements that share a scale.
    """
    queries_per_kv = model.n_heads // model.n_kv_heads
    kv_heads = min(model.n_kv_heads, MOST_KV_HEADS)
    heads = kv_heads * queries_per_kv
    d_model = heads * HEAD_WIDTH
    if model.head_width is not None:
        d_model = max(HEAD_WIDTH, round(d_model * model.d_model / sizes.query_width(model)))
    d_model = -(-d_model // tile) * tile
    has_own_width = model.head_width is not None or d_model != heads * HEAD_WIDTH
    unit = max(8, tile)

    def scaled(hidden_size: int) -> int:
        return max(unit, round(hidden_size / model.d_model * d_model / unit) * unit)

    latent = model.latent
    if latent is not None:
        latent = replace(
            latent,
            kv_rank=scaled(latent.kv_rank),
            q_rank=latent.q_rank and scaled(latent.q_rank),
            nope_width=HEAD_WIDTH,
            rope_width=HEAD_WIDTH // 2,
            v_width=HEAD_WIDTH,
        )
    moe = model.moe
    if moe is not None:
        widths = (moe.expert_hidden_size, moe.shared_hidden_size)
        expert, shared = (width and scaled(width) for width in widths)
        # One dense layer stands for all of the first, one for all between two layers of experts.
        moe = replace(
            moe if moe.experts <= MOST_EXPERTS else _fewer_experts(moe),
            expert_hidden_size=expert,
            shared_hidden_size=shared,
            dense_layers=min(moe.dense_layers, 1),
            every_n_layers=min(moe.every_n_layers, LAYERS),
        )
    # Of any fraction, one that makes whole pairs.
    pairs = max(1, round(model.rope_share * HEAD_WIDTH / 2))
    return replace(
        model,
        moe=moe,
        rope_share=2 * pairs / HEAD_WIDTH,
        d_model=d_model,
        n_layers=min(
            model.n_layers, LAYERS if moe is None else moe.dense_layers + LAYERS * moe.every_n_layers
        ),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_width=HEAD_WIDTH if has_own_width and latent is None else None,
        latent=latent,
        ffn_hidden_size=scaled(model.ffn_hidden_size),
        transfer_base=model.transfer_base and _half(heads, d_model, moe, scaled(model.ffn_hidden_size)),
        vocab_size=VOCABULARY,
        max_sequence_tokens=SEQUENCE_TOKENS,
        yarn=model.yarn and replace(model.yarn, original_tokens=SEQUENCE_TOKENS // 2),
    )


def _half(heads: int, d_model: int, moe: Moe | None, hidden_size: int) -> TransferBase:
    """Makes the base of a tiny model: half of each size, so that no weight's scales are 1."""
    base_heads = max(1, heads // 2)
    return TransferBase(
        d_model=d_model * base_heads // heads,
        n_layers=max(1, LAYERS // 2),
        n_heads=base_heads,
        hidden_size=((moe and moe.expert_hidden_size) or hidden_size) // 2,
        top_k=max(1, moe.top_k // 2) if moe else 1,
    )


def _fewer_experts(moe: Moe) -> Moe:
    """Makes a mixture of :data:`MOST_EXPERTS`, at least two of which are in each group."""
    groups = math.gcd(moe.groups, MOST_EXPERTS // 2)
    top_groups = min(moe.top_groups, groups)
    top_k = min(moe.top_k, MOST_TOP_K, top_groups * MOST_EXPERTS // groups)
    return replace(moe, experts=MOST_EXPERTS, top_k=top_k, groups=groups, top_groups=top_groups)


def _two_phases(recipe: Recipe, steps: int, sequences: int) -> list[Phase]:
    """Makes two phases of half the steps each, like the recipe's first and last; empty for a single phase."""
    if len(recipe.data.phases) < 2:
        return []
    phases = phases_of(recipe)
    first, last = phases[0], phases[-1]
    is_longer = (last.sequence_tokens or 0) > (first.sequence_tokens or 0)
    length = SEQUENCE_TOKENS * (LONGER if is_longer else 1)
    batch = Phase(global_batch_sequences=sequences, microbatch_sequences=MICROBATCH_SEQUENCES)
    begun = steps // 2
    return [
        replace(
            batch,
            tokens=begun * sequences * SEQUENCE_TOKENS,
            weights={"code": 0.5, "prose": 0.5},
            sequence_tokens=SEQUENCE_TOKENS,
            learning_rate_scale=first.learning_rate_scale,
        ),
        replace(
            batch,
            tokens=(steps - begun) * sequences * length,
            weights={"code": 0.75, "prose": 0.25},
            sequence_tokens=length,
            learning_rate_scale=last.learning_rate_scale,
            rope_theta=last.rope_theta if last.rope_theta != recipe.model.rope_theta else None,
        ),
    ]
