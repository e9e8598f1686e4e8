"""The rules of a layout: what the number of ranks, the batch and the experts must be divisible by."""

from collections.abc import Iterator

from train.recipe import sizes
from train.recipe.errors import Violation
from train.recipe.phases import batch_sequences, in_phase, microbatch_sequences, phases_of
from train.recipe.schema import (
    BalanceScope,
    Compile,
    ExchangePrecision,
    ExpertPrecision,
    Moments,
    OptimizerKind,
    Parallelism,
    Phase,
    Position,
    QkNormOver,
    Recipe,
)
from train.recipe.topology import Topology


def check_layout(recipe: Recipe, topology: Topology) -> Iterator[Violation]:
    """Yields every rule that batch and layout violate, in order, then those of phases with another layout."""
    own, lengths = recipe.parallelism.context, []
    of_phases: list[tuple[str, Phase]] = []
    for number, phase in enumerate(phases_of(recipe)):
        if phase.context == own:
            lengths.append(phase.sequence_tokens or 0)
        else:
            of_phases.append((f"data.phases[{number}].context", phase))
    yield from _of_layout(recipe, topology.world_size, lengths)
    for key, phase in of_phases:
        lengths = [phase.sequence_tokens or 0]
        for each in _of_layout(in_phase(recipe, phase), topology.world_size, lengths):
            named = each.key.replace(CONTEXT, key), each.what.replace(CONTEXT, key)
            yield Violation(*named, each.remedy.replace(CONTEXT, key))


CONTEXT = "parallelism.context"


def _of_layout(recipe: Recipe, ranks: int, lengths: list[int]) -> Iterator[Violation]:
    """Yields every rule that one layout violates, which trains sequences of these lengths."""
    yield from _batch_and_degrees(recipe, ranks)
    yield from _context(recipe, ranks, lengths)
    yield from tensor_violations(recipe, ranks)
    yield from _pipeline(recipe, ranks)
    yield from _interleaved(recipe)
    yield from _exchanged(recipe)
    yield from _once_per_node(recipe)


def _batch_and_degrees(recipe: Recipe, ranks: int) -> Iterator[Violation]:
    training, layout = recipe.training, recipe.parallelism
    global_batch, microbatch = training.global_batch_sequences, training.microbatch_sequences
    readers, each = sizes.readers(layout, ranks), reader_in_words(layout)
    if readers and global_batch % readers:
        yield Violation(
            "training.global_batch_sequences",
            f"{global_batch} is not divisible by {readers_in_words(layout, readers)}",
            f"use a multiple of {readers}, or another number of ranks",
        )
    elif readers and (global_batch // readers) % microbatch:
        yield Violation(
            "training.microbatch_sequences",
            f"{global_batch // readers} sequences of each {each} are not divisible by {microbatch}",
            f"use a divisor of {global_batch // readers}",
        )
    if ranks % (layout.replicate * layout.pipeline * layout.expert):
        degrees = f"replicate={layout.replicate} x expert={layout.expert}"
        degrees += f" x pipeline={layout.pipeline}" if layout.pipeline > 1 else ""
        yield Violation(
            "parallelism",
            f"{ranks} ranks are not divisible by {degrees}",
            f"choose degrees whose product divides {ranks}, or start more ranks (composer -n)",
        )
    if layout.gathered_layers > recipe.model.n_layers:
        yield Violation(
            "parallelism.gathered_layers",
            f"is {layout.gathered_layers}, but the model has {recipe.model.n_layers} layers",
            "give at most as many",
        )
    if layout.expert > 1:
        if recipe.model.moe is None:
            yield Violation("parallelism.expert", "is above 1, but the model is dense", "set it to 1")
        elif recipe.model.moe.experts % layout.expert:
            experts, expert_degree = recipe.model.moe.experts, layout.expert
            yield Violation(
                "parallelism.expert",
                f"{experts=} is not divisible by {expert_degree=}",
                f"use a divisor of {experts}",
            )
        else:
            yield from _uneven_experts(recipe, ranks)


def reader_in_words(layout: Parallelism) -> str:
    """Returns what reads sequences of its own: a rank, or a group of ranks that share each sequence."""
    return "rank" if layout.on_each_sequence == 1 else "group"


def readers_in_words(layout: Parallelism, count: int) -> str:
    """Returns so many of them, with the size of a group."""
    ranks = layout.on_each_sequence
    return f"{count} ranks" if ranks == 1 else f"{count} groups of {ranks} ranks"


def _context(recipe: Recipe, ranks: int, lengths: list[int]) -> Iterator[Violation]:
    """Yields violations of the ranks that share sequences."""
    context, expert, moe = recipe.parallelism.context, recipe.parallelism.expert, recipe.model.moe
    if context == 1:
        return
    if ranks % context:
        yield Violation(
            CONTEXT,
            f"{ranks} ranks are not divisible by {context=}",
            f"use a divisor of {ranks}, or start more ranks (composer -n)",
        )
    for length in sorted({length for length in lengths if length % (2 * context)}):
        yield Violation(
            CONTEXT,
            f"cuts sequences into {2 * context} chunks, but {length} tokens are not divisible by that",
            "use a divisor of half the length",
        )
    if recipe.training.compile is not Compile.off:
        yield Violation(
            CONTEXT,
            f"is not built for compiled layers, but training.compile={recipe.training.compile.value}",
            "remove either",
        )
    is_nested = expert % context == 0 or context % expert == 0
    if moe is not None and moe.balance_scope is BalanceScope.expert_group and not is_nested:
        yield Violation(
            CONTEXT,
            f"{context=} and {expert=} cut through each other, so model.moe.balance_scope=expert_group is "
            "no group's",
            "let one divide the other, or balance over another scope",
        )


def tensor_violations(recipe: Recipe, ranks: int) -> Iterator[Violation]:
    """Yields violations of the ranks that share sequences and dense weights."""
    name, layout, moe = "parallelism.tensor", recipe.parallelism, recipe.model.moe
    degree, expert = layout.tensor, layout.expert
    if degree == 1:
        return
    apart = layout.replicate * layout.pipeline
    if ranks % (apart * degree):
        degrees = f"replicate={layout.replicate} x tensor={degree}"
        degrees += f" x pipeline={layout.pipeline}" if layout.pipeline > 1 else ""
        what = f"{ranks} ranks are not divisible by {degrees}"
        remedy = f"use a divisor of {ranks} / {apart}, or start more ranks (composer -n)"
        yield Violation(name, what, remedy)
    lengths = {phase.sequence_tokens for phase in phases_of(recipe)}
    for length in sorted(length for length in lengths if length and length % degree):
        what = f"cuts sequences into {degree} parts, but {length} tokens are not divisible by that"
        yield Violation(name, what, "use a divisor of the length")
    for what, remedy in _unsplittable(recipe, ranks):
        yield Violation(name, what, remedy)
    is_nested = expert % degree == 0 or degree % expert == 0
    if moe is not None and moe.balance_scope is BalanceScope.expert_group and not is_nested:
        yield Violation(
            name,
            f"tensor={degree} and {expert=} cut through each other, so "
            "model.moe.balance_scope=expert_group is no group's",
            "let one divide the other, or balance over another scope",
        )


def _unsplittable(recipe: Recipe, ranks: int) -> Iterator[tuple[str, str]]:
    """Yields what ranks cannot share dense weights of or with, and its remedies."""
    model, training, optimizer, layout = recipe.model, recipe.training, recipe.optimizer, recipe.parallelism
    of_models = {
        "model.latent": model.latent is not None,
        "model.qkv_bias": model.qkv_bias,
        "model.position=alibi": model.position is Position.alibi,
        "model.qk_norm_over=all_heads": model.qk_norm and model.qk_norm_over is QkNormOver.all_heads,
    }
    others = {
        f"training.compile={training.compile.value}": training.compile is not Compile.off,
        f"parallelism.context={layout.context}": layout.context > 1,
        "optimizer.kind=muon": optimizer.kind is OptimizerKind.muon,
        "optimizer.moments=bf16": optimizer.moments is Moments.bf16,
        "optimizer.qk_clip": optimizer.qk_clip is not None,
    }
    yield from ((f"is not built for {key}", _ANOTHER) for key, is_set in of_models.items() if is_set)
    yield from ((f"is not built for {key}", "remove either") for key, is_set in others.items() if is_set)
    if model.n_kv_heads % layout.tensor:
        what = f"splits heads over {layout.tensor} ranks, but model.n_kv_heads={model.n_kv_heads}"
        yield what, f"use a divisor of {model.n_kv_heads}"
    over = sizes.stage_ranks(layout, ranks)
    for weight in sizes.weights(model):
        if sizes.is_split_by_rows(weight.name) and weight.shape[0] % over:
            yield f"rows of {weight.name}, {weight.shape[0]}, do not shard evenly over {over} ranks", _ANOTHER
            return


_ANOTHER = "set it to 1, or use another model"


def _pipeline(recipe: Recipe, ranks: int) -> Iterator[Violation]:
    """Yields violations of the stages that share the layers."""
    name, layout, layers = "parallelism.pipeline", recipe.parallelism, recipe.model.n_layers
    stages, parts = layout.pipeline, layout.pipeline * layout.pipeline_chunks
    if stages == 1:
        for key, is_set in (("layers", layout.pipeline_layers), ("chunks", layout.pipeline_chunks > 1)):
            if is_set:
                what = "is of the stages of a pipeline, but parallelism.pipeline is 1"
                yield Violation(f"{name}_{key}", what, "remove it, or set the stages")
        return
    if layers < parts:
        what = f"cuts the model into {parts} parts, but it has {layers} layers"
        yield Violation(name, what, f"use at most {layers} parts")
    given = layout.pipeline_layers
    if given and (len(given) != parts or sum(given) != layers):
        what = (
            f"gives {len(given)} parts {sum(given)} layers, but there are {parts} parts and {layers} layers"
        )
        yield Violation(f"{name}_layers", what, "give each part its layers, or remove it")
    for what, remedy in unstaged(recipe):
        yield Violation(name, f"is not built for {what}", remedy)
    readers = sizes.readers(layout, ranks)
    for phase in phases_of(recipe) if layout.pipeline_chunks > 1 and readers else ():
        microbatches = batch_sequences(recipe, phase) // readers // microbatch_sequences(recipe, phase)
        if microbatches % stages:
            what = f"takes microbatches by {stages}, one for each stage, but a batch has {microbatches}"
            yield Violation(f"{name}_chunks", what, "change the batch or the microbatch, or remove it")
            return


def unstaged(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields what the stages of a pipeline are not built for, and remedies."""
    training, layout = recipe.training, recipe.parallelism
    others = {
        f"parallelism.context={layout.context}": layout.context > 1,
        "parallelism.interleave": layout.interleave,
        f"parallelism.gathered_layers={layout.gathered_layers} in several chunks": layout.gathered_layers > 0
        and layout.pipeline_chunks > 1,
        f"training.compile={training.compile.value}": training.compile is not Compile.off,
        f"training.expert_precision={training.expert_precision.value}": training.expert_precision
        is not ExpertPrecision.same,
        "training.offload": training.offload,
        "training.frozen": bool(training.frozen),
        "guard.recheck_interval_batches": recipe.guard.recheck_interval_batches is not None,
    }
    yield from ((key, "remove either") for key, is_set in others.items() if is_set)


def _interleaved(recipe: Recipe) -> Iterator[Violation]:
    if not recipe.parallelism.interleave:
        return
    if recipe.parallelism.expert == 1:
        yield Violation(
            "parallelism.interleave",
            "hides the exchange of tokens, but with parallelism.expert=1 there is none",
            "remove it, or spread the experts over ranks",
        )
    if recipe.training.compile is not Compile.off:
        yield Violation(
            "parallelism.interleave",
            f"is not built for compiled layers, but training.compile={recipe.training.compile.value}",
            "remove either",
        )
    if all(microbatch_sequences(recipe, phase) % 2 for phase in phases_of(recipe)):
        yield Violation(
            "parallelism.interleave",
            f"halves microbatches, but training.microbatch_sequences={recipe.training.microbatch_sequences}",
            "make it even, or remove parallelism.interleave",
        )


def _exchanged(recipe: Recipe) -> Iterator[Violation]:
    name, tile, d_model = "parallelism.exchange_precision", sizes.EXCHANGED_TILE, recipe.model.d_model
    if recipe.parallelism.exchange_precision is ExchangePrecision.same:
        return
    if recipe.parallelism.expert == 1:
        what = "is of the exchange of tokens, but with parallelism.expert=1 there is none"
        yield Violation(name, what, "remove it, or spread the experts over ranks")
    if d_model % tile:
        what = f"{d_model} is not divisible by {tile}, the numbers of a token that share a scale in fp8"
        yield Violation("model.d_model", what, f"make it a multiple of {tile}, or remove {name}")


def _once_per_node(recipe: Recipe) -> Iterator[Violation]:
    name, expert = "parallelism.exchange_node_ranks", recipe.parallelism.expert
    local = recipe.parallelism.exchange_node_ranks
    if local is None:
        return
    if expert <= local:
        what = f"sends tokens once per node of {local} ranks, but groups of {expert=} lie within one"
        yield Violation(name, what, "remove it, or spread the experts over more ranks")
    elif expert % local:
        what = f"cuts groups of {expert=} into nodes of {local} ranks, which does not divide them"
        yield Violation(name, what, f"use a divisor of {expert}")


def _uneven_experts(recipe: Recipe, ranks: int) -> Iterator[Violation]:
    """Yields a violation for expert rows that do not shard evenly, as FSDP2 (torch 2.7) requires."""
    layout, moe = recipe.parallelism, recipe.model.moe
    assert moe is not None
    if ranks % (layout.replicate * layout.pipeline * layout.expert):
        return
    rows, over = moe.experts * sizes.expert_width(recipe.model), sizes.stage_ranks(layout, ranks)
    if rows % over:
        yield Violation(
            "parallelism.replicate",
            f"experts x their hidden size = {rows} rows do not shard evenly over {over} ranks",
            f"make {ranks} / replicate a divisor of {rows}",
        )
