"""Summary of a recipe before anything is built: sizes, FLOPs, batches, phases, layout."""

from dataclasses import asdict

from train.recipe import sizes
from train.recipe.curriculum import fill_in_middle_in_words, plan_stages
from train.recipe.layout_rules import reader_in_words, readers_in_words
from train.recipe.phases import phases_of
from train.recipe.reading import to_dict
from train.recipe.schema import Recipe
from train.recipe.topology import Topology


def describe_run(recipe: Recipe, topology: Topology) -> tuple[str, dict[str, object]]:
    """Returns the figures of a run as an aligned table and as a JSON-ready dictionary."""
    model, training, layout = recipe.model, recipe.training, recipe.parallelism
    per_token = sizes.flops_per_token_training(model, recipe.data.sequence_tokens)
    total = sizes.training_flops(recipe)
    shard = sizes.shard_degree(layout, topology.world_size)
    microbatches = sizes.microbatches_per_rank(recipe, topology.world_size)
    figures: dict[str, object] = {
        "parameters_total": sizes.total_parameters(model),
        "parameters_active": sizes.active_parameters(model),
        "flops_per_token_weights": per_token.weights,
        "flops_per_token_attention": per_token.attention,
        "training_flops": total.total,
        "tokens": sizes.trained_tokens(recipe),
        "tokens_per_batch": sizes.tokens_per_batch(recipe),
        "batches": sizes.batches(recipe),
        "ranks": topology.world_size,
        "replicate": layout.replicate,
        "shard": shard,
        "expert": layout.expert,
        "context": layout.context,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "microbatches_per_rank": microbatches,
        "phases": [asdict(stage) for stage in plan_stages(recipe).stages],
    }
    readers = sizes.readers(layout, topology.world_size)
    per_rank = training.global_batch_sequences // readers
    forced = model.moe is not None and model.moe.forced_balance
    rows = [
        *([("routing", "forced balance: experts are dealt out, for benchmarks only")] if forced else []),
        ("parameters", f"{figures['parameters_total']:,}"),
        ("active per token", f"{figures['parameters_active']:,} (without the input embedding)"),
        (
            "FLOPs per token",
            f"{per_token.total:.4g}: 6 x active {per_token.weights:.4g}, attention {per_token.attention:.4g}",
        ),
        (
            "tokens",
            f"{figures['tokens']:,} in {figures['batches']:,} batches of {figures['tokens_per_batch']:,}",
        ),
        ("training FLOPs", f"{total.total:.4g}"),
        (
            "batch",
            f"{training.global_batch_sequences} sequences = {readers_in_words(layout, readers)} x "
            f"{microbatches} microbatches x {training.microbatch_sequences} sequences ({per_rank} per "
            f"{reader_in_words(layout)})",
        ),
        *_phase_rows(recipe),
        ("layout", _layout_in_words(recipe, shard)),
    ]
    return "\n".join(f"{name:18}{value}" for name, value in rows), {**figures, "recipe": to_dict(recipe)}


def _layout_in_words(recipe: Recipe, shard: int) -> str:
    layout = recipe.parallelism
    mesh = f"shard {shard} x expert {layout.expert}"
    if layout.pipeline > 1:
        layers = ", ".join(str(len(part.layers)) for part in sizes.parts(recipe.model, layout))
        chunks = f" in {layout.pipeline_chunks} chunks each" if layout.pipeline_chunks > 1 else ""
        return f"replicate {layout.replicate} x pipeline {layout.pipeline} x {mesh}; layers {layers}{chunks}"
    shared = "".join(
        f" x {name} {ranks}, across them"
        for name, ranks in (("context", layout.context), ("tensor", layout.tensor))
        if ranks > 1
    )
    return f"replicate {layout.replicate} x {mesh}{shared}"


def _phase_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns a row for each phase, none for a single mixture, and one for its fill-in-the-middle."""
    curriculum, phases, rows = plan_stages(recipe), phases_of(recipe), []
    for stage in curriculum.stages if recipe.data.phases else ():
        tokens = (stage.end_sample - stage.first_sample) * curriculum.sample_tokens
        shares = _shares(stage.weights)
        if stage.end_weights:
            shares = f"{shares} -> {_shares(stage.end_weights)} ({stage.interpolation})"
        context = phases[stage.phase].context
        shared = "" if context == recipe.parallelism.context else f", context {context}"
        rows.append(
            (
                f"phase {stage.phase}",
                f"{tokens:,} tokens in {stage.batches:,} batches of {stage.batch_sequences} x "
                f"{stage.sequence_samples * curriculum.sample_tokens}: {shares}; learning rate x "
                f"{stage.learning_rate_scale:g}, RoPE theta {stage.rope_theta:g}{shared}",
            )
        )
    for stage in curriculum.stages:
        if stage.fill_in_middle:
            what = fill_in_middle_in_words(stage.fill_in_middle, stage.spm)
            rows.append(("fill in the middle", f"phase {stage.phase}: {what}"))
    return rows


def _shares(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
