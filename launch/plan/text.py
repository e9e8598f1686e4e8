"""Plans as text for a terminal and as plain values for JSON."""

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from launch.plan.goodput import Goodput, goodput
from launch.plan.hardware import GIB
from launch.plan.memory import Memory
from launch.plan.search import choice_of
from launch.plan.stages import memory_of
from launch.plan.step import DAY_SECONDS, Plan
from launch.plan.traffic import Collective
from train.recipe import sizes
from train.recipe.schema import Recipe, Recompute
from train.recipe.units import duration, short_number

IMBALANCES = (1.0, 1.25, 1.5, 2.0)
EXPLANATIONS = {
    "weights": "fp32 shards",
    "gradients": "fp32 shards",
    "optimizer": "moments, fp32 shards",
    "activations": "kept for the backward pass, and its own",
    "loss": "logits of a chunk, gradients",
    "gathered": "whole weights and gradients of the layers at hand",
    "exchanged": "tokens on their way between experts",
    "fragmentation": "margin of 5%",
    "reserved": "CUDA, cuBLAS, NCCL",
}


def format_plan(plan: Plan, kept: Goodput | None = None) -> str:
    """The whole plan for a terminal, with the goodput that interruptions leave; None: at published rates."""
    parts = [_headline(plan), _memory_table(plan), _imbalance_table(plan), _traffic_table(plan)]
    parts.append(_time_table(plan))
    if plan.others:
        parts.append(_shapes_table(plan))
    return "\n\n".join([*parts, _verdict(plan, kept or goodput(plan))])


def format_search(plans: list[Plan], show: int) -> str:
    """The fastest plans that fit."""
    sharing = [
        name
        for name in ("context", "tensor", "pipeline")
        if any(getattr(plan.recipe.parallelism, name) > 1 for plan in plans[:show])
    ]
    sharing_titles = "".join(f"{name:>9}" for name in sharing)
    lines = [
        f"{len(plans)} layouts fit; the fastest:",
        f"{'replicate':>9}{'shard':>7}{'expert':>7}{sharing_titles}{'micro':>7}{'recomputed':>30}"
        f"{'memory':>10}{'step':>11}{'tok/s/GPU':>11}{'util':>7}{'days':>8}",
    ]
    for plan in plans[:show]:
        layout, training = plan.recipe.parallelism, plan.recipe.training
        shared = "".join(f"{getattr(layout, name):>9}" for name in sharing)
        lines.append(
            f"{layout.replicate:>9}{sizes.shard_degree(layout, plan.world_size):>7}{layout.expert:>7}"
            f"{shared}{training.microbatch_sequences:>7}{recomputation(plan.recipe):>30}"
            f"{plan.fullest.memory.total / GIB:>6.1f} GiB{plan.step_seconds:>9.2f} s"
            f"{plan.tokens_per_second_per_gpu:>11.0f}{plan.utilisation:>7.1%}{plan.days:>8.1f}"
        )
    if plans:
        lines += ["", f"to use the first: {choice_of(plans[0].recipe).overrides()}"]
    return "\n".join(lines)


def plan_figures(plan: Plan, kept: Goodput | None = None) -> dict[str, Any]:
    """All figures of a plan as plain values; the keys name the units."""
    layout, kept = plan.shape.recipe.parallelism, kept or goodput(plan)
    return {
        "recipe": plan.recipe.name,
        "gpu": plan.gpu.name,
        "gpus": plan.world_size,
        "layout": {
            "replicate": layout.replicate,
            "shard": sizes.shard_degree(layout, plan.world_size),
            "expert": layout.expert,
            "context": layout.context,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "pipeline_layers": [len(part.layers) for part in sizes.parts(plan.recipe.model, layout)],
        },
        "microbatches": plan.microbatches,
        "microbatch_sequences": plan.shape.recipe.training.microbatch_sequences,
        "recompute": [grade.value for grade in _grades(plan.recipe)],
        "imbalance": plan.imbalance,
        "forced_balance": plan.recipe.model.moe is not None and plan.recipe.model.moe.forced_balance,
        "memory_bytes": {
            **asdict(plan.fullest.memory),
            "total": plan.fullest.memory.total,
            "limit": plan.gpu.memory_bytes,
        },
        "host_memory_bytes": {
            "pinned": plan.host_bytes,
            "copies": plan.copies_bytes,
            "limit": plan.gpu.host_room,
        },
        "fits": plan.fits,
        "traffic_bytes_per_step_and_gpu": [_traffic_figures(plan, c) for c in plan.collectives],
        "step_seconds": plan.step_seconds,
        "step_seconds_by_kind": asdict(plan.seconds),
        "hidden_links_seconds": plan.hidden_seconds,
        "step_seconds_if_traffic_added": plan.step_seconds_if_added,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "utilisation": plan.utilisation,
        "utilisation_of_weights": plan.utilisation_of_weights,
        "forms": [_shape_figures(each) for each in plan.step_shapes],
        "training_flops": asdict(plan.flops),
        "batches": sizes.batches(plan.recipe),
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "goodput": {
            **asdict(kept),
            "share": kept.share,
            "days": plan.days / kept.share if kept.share else None,
        },
        "dollars": plan.dollars,
        "dollars_per_gpu_hour": plan.dollars_per_gpu_hour,
        "nearest_to_limit": nearest_to_limit(plan),
    }


def nearest_to_limit(plan: Plan) -> str:
    """The bottleneck: memory if it is nearly full, otherwise whatever takes most of the step."""
    filled = plan.fullest.memory.total / plan.gpu.memory_bytes
    seconds = plan.seconds
    kinds = {
        "matrix products": seconds.matrix,
        "attention": seconds.attention,
        "memory bandwidth": seconds.memory,
        "links between GPUs": seconds.links,
        "waits for other stages": seconds.idle,
    }
    name, most = max(kinds.items(), key=lambda item: item[1])
    time = f"{name} take {most / plan.step_seconds:.0%} of the step"
    return f"memory is {filled:.0%} full" if filled > 0.9 else time


def _headline(plan: Plan) -> str:
    recipe, training, shaped = plan.recipe, plan.recipe.training, plan.shape.recipe
    layout = shaped.parallelism
    shard = sizes.shard_degree(layout, plan.world_size)
    shared = f", context {layout.context} across them" if layout.context > 1 else ""
    shared += f", tensor {layout.tensor} across them" if layout.tensor > 1 else ""
    stages = f"pipeline {layout.pipeline} x " if layout.pipeline > 1 else ""
    each = "GPU" if layout.on_each_sequence == 1 else f"{layout.on_each_sequence} GPUs"
    plural = "" if plan.microbatches == 1 else "es"
    forced = ", forced balance" if recipe.model.moe and recipe.model.moe.forced_balance else ""
    return "\n".join(
        [
            f"{recipe.name}: {sizes.total_parameters(recipe.model) / 1e9:.2f}B parameters, "
            f"{sizes.active_parameters(recipe.model) / 1e9:.2f}B active, "
            f"{short_number(training.duration_tokens)} tokens on {plan.world_size} x {plan.gpu.name}{forced}",
            f"layout: replicate {layout.replicate} x {stages}shard {shard} x expert {layout.expert}{shared}; "
            f"{plan.microbatches} microbatch{plural} of {shaped.training.microbatch_sequences} x "
            f"{shaped.data.sequence_tokens} tokens per {each}, recomputed: {recomputation(recipe)}",
        ]
    )


def _memory_table(plan: Plan) -> str:
    fullest = plan.fullest
    where = f", with {fullest.shape.recipe.data.sequence_tokens} tokens a sequence" if plan.others else ""
    lines = [f"memory of the fullest GPU at its worst moment{where}, GiB"]
    for name in Memory.parts():
        lines.append(f"  {name:16}{getattr(fullest.memory, name) / GIB:>8.2f}  {EXPLANATIONS[name]}")
    limit = plan.gpu.memory_bytes
    verdict = "fits" if fullest.memory.total <= limit else "does NOT fit"
    lines.append(f"  {'total':16}{fullest.memory.total / GIB:>8.2f}  of {limit / GIB:.1f}: {verdict}")
    room = plan.gpu.host_room
    verdict = "fits" if plan.host_bytes + plan.copies_bytes <= room else "does NOT fit"
    for name, size in (("inputs", plan.host_bytes), ("copies", plan.copies_bytes)):
        if size:
            lines.append(f"  {name:16}{size / GIB:>8.2f}  of {room / GIB:.1f} in its host's: {verdict}")
    return "\n".join(lines)


def _imbalance_table(plan: Plan) -> str:
    fullest = plan.fullest.shape.recipe
    rows = {grade.value: _recomputing(fullest, grade) for grade in Recompute}
    rows.setdefault(recomputation(fullest), fullest)  # a mixture
    width = max(24, 2 + max(map(len, rows)))
    lines = ["activations, GiB, by what layers recompute and rows of the busiest expert rank over the mean"]
    lines.append("  " + " " * width + "".join(f"{imbalance:>8.2f}" for imbalance in IMBALANCES))
    for title, recipe in rows.items():
        cells = [memory_of(recipe, plan.world_size, imbalance).activations / GIB for imbalance in IMBALANCES]
        lines.append(f"  {title:{width}}" + "".join(f"{cell:>8.2f}" for cell in cells))
    if plan.recipe.parallelism.expert == 1:
        lines.append("  (no difference: every GPU has all experts)")
    return "\n".join(lines)


def recomputation(recipe: Recipe) -> str:
    """Returns what a recipe's layers recompute: `layer`, or `layer in 12, gates in 28`."""
    grades = Counter(_grades(recipe))
    if len(grades) == 1:
        return next(iter(grades)).value
    return ", ".join(f"{grade.value} in {layers}" for grade, layers in grades.items())


def _grades(recipe: Recipe) -> list[Recompute]:
    return sizes.recomputed(recipe.training, sizes.layers(recipe.model))


def _recomputing(recipe: Recipe, grade: Recompute) -> Recipe:
    training = replace(
        recipe.training, recompute=grade, recompute_layers=None, recompute_rest=Recompute.nothing
    )
    return replace(recipe, training=training)


def _traffic_table(plan: Plan) -> str:
    lines = [
        "sent by each GPU per step, GB",
        f"  {'what':28}{'collective':16}{'over':>6}{'calls':>8}{'NVLink':>10}{'InfiniBand':>12}"
        f"{'full rate':>11}",
    ]
    total = {"nvlink": 0.0, "network": 0.0}
    for collective in plan.collectives:
        if collective.ranks == 1:
            continue
        figures = _traffic_figures(plan, collective)
        total["nvlink"] += figures["nvlink"]
        total["network"] += figures["network"]
        lines.append(
            f"  {collective.what:28}{collective.kind.value:16}{collective.ranks:>6}{figures['calls']:>8}"
            f"{figures['nvlink'] / 1e9:>10.2f}{figures['network'] / 1e9:>12.2f}"
            f"{figures['seconds_at_full_rate']:>9.3f} s"
        )
    lines.append(f"  {'total':58}{total['nvlink'] / 1e9:>10.2f}{total['network'] / 1e9:>12.2f}")
    return "\n".join(lines)


def _traffic_figures(plan: Plan, collective: Collective) -> dict[str, Any]:
    links = collective.link_bytes(plan.gpu.gpus_per_node)
    calls = collective.calls_in_step(plan.microbatches)
    return {
        "what": collective.what,
        "collective": collective.kind.value,
        "ranks": collective.ranks,
        "calls": calls,
        "nvlink": links.nvlink * calls,
        "network": links.network * calls,
        "seconds_at_full_rate": collective.seconds(plan.gpu) * calls,
    }


def _time_table(plan: Plan) -> str:
    lines = [
        "time of a step, seconds",
        f"  {'':12}{'matrix':>9}{'attention':>11}{'memory':>9}{'links':>9}{'total':>9}",
    ]
    rows = [(part.name, part.seconds.times(part.repeats)) for part in plan.parts]
    for name, seconds in [*rows, ("step", plan.seconds)]:
        lines.append(
            f"  {name:12}{seconds.matrix:>9.3f}{seconds.attention:>11.3f}{seconds.memory:>9.3f}"
            f"{seconds.links:>9.3f}{seconds.total:>9.3f}"
        )
    hidden = plan.hidden_seconds
    lines.append(
        f"  overlap: of {plan.seconds.links + hidden:.3f} s of traffic {hidden:.3f} s run under arithmetic, "
        "the rest is open"
    )
    lines.append(
        f"  ({plan.step_seconds_if_added:.3f} s, {plan.utilisation_if_added:.1%}, if arithmetic hid no more "
        "than in published runs)"
    )
    return "\n".join(lines)


def _shapes_table(plan: Plan) -> str:
    contexts = {each.shape.recipe.parallelism.context for each in plan.step_shapes}
    width = 9 if len(contexts) > 1 else 0  # of a column that says nothing otherwise
    lines = [
        "phases, by what their steps are made of (above: a step of the first line)",
        f"  {'phases':10}{'sequence':>9}{'batch':>7}{'micro':>6}{'context':>{width}.{width}}"
        f"{'steps':>11}{'memory':>11}{'step':>11}"
        f"{'tok/s/GPU':>11}{'util':>7}{'days':>8}{'FLOPs':>11}",
    ]
    for each in plan.step_shapes:
        shaped, shape = each.shape.recipe, each.shape
        lines.append(
            f"  {', '.join(str(number + 1) for number in shape.phases):10}{shaped.data.sequence_tokens:>9}"
            f"{shaped.training.global_batch_sequences:>7}{shaped.training.microbatch_sequences:>6}"
            f"{shaped.parallelism.context!s:>{width}.{width}}{shape.batches:>11,}"
            f"{each.memory.total / GIB:>7.1f} GiB{each.step_seconds:>9.2f} s"
            f"{each.tokens_per_second_per_gpu:>11.0f}{each.utilisation:>7.1%}"
            f"{shape.batches * each.step_seconds / DAY_SECONDS:>8.1f}{shape.flops.total:>11.4g}"
        )
    lines.append(f"  {'total':43}{'':32}{'':7}{'':{width}}{plan.days:>8.1f}{plan.flops.total:>11.4g}")
    return "\n".join(lines)


def _shape_figures(plan: Plan) -> dict[str, Any]:
    shaped = plan.shape.recipe
    return {
        "phases": list(plan.shape.phases),
        "sequence_tokens": shaped.data.sequence_tokens,
        "global_batch_sequences": shaped.training.global_batch_sequences,
        "microbatch_sequences": shaped.training.microbatch_sequences,
        "context": shaped.parallelism.context,
        "batches": plan.shape.batches,
        "tokens": plan.shape.tokens,
        "training_flops": asdict(plan.shape.flops),
        "memory_bytes": plan.memory.total,
        "step_seconds": plan.step_seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "utilisation": plan.utilisation,
        "days": plan.shape.batches * plan.step_seconds / DAY_SECONDS,
    }


def _goodput_lines(plan: Plan, kept: Goodput) -> list[str]:
    """The share of its time that interruptions leave a run."""
    if not kept.share:
        return ["goodput 0%: interruptions come faster than the run gets over them; save more often"]
    hours = f"one in {1 / kept.failures_per_hour:.1f} h" if kept.failures_per_hour else "none"
    again = f", steps run again {kept.recheck_share:.1%}" if kept.recheck_share else ""
    best = ""
    if kept.failures_per_hour:
        best = f"; best saved every {max(1, round(kept.best_interval_seconds / plan.step_seconds)):,} steps"
    return [
        f"goodput {kept.share:.1%} with interruptions ({hours}): restarts {kept.restart_share:.1%}, "
        f"lost work {kept.rework_share:.1%}, saves {kept.save_share:.2%}{again}",
        f"{duration(plan.days * 86400 / kept.share)} with them{best}",
    ]


def _verdict(plan: Plan, kept: Goodput) -> str:
    lines = [
        f"{plan.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, utilisation {plan.utilisation:.1%} "
        f"({plan.utilisation_of_weights:.1%} by 6 x active)",
        f"{duration(plan.days * 86400)} for {sizes.batches(plan.recipe):,} steps; "
        f"{plan.gpu_hours:,.0f} GPU-hours"
        + (f"; ${plan.dollars:,.0f} at ${plan.dollars_per_gpu_hour:g}" if plan.dollars_per_gpu_hour else ""),
        *_goodput_lines(plan, kept),
        f"nearest to its limit: {nearest_to_limit(plan)}",
    ]
    return "\n".join(lines)
