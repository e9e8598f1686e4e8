"""Published training speeds on H100s beside the planner's: `python -m launch.experiments.published`.

Five rows fit the planner's two efficiencies; all others are predicted.

Runs are rows of `published_speeds.csv`, their models rows of `published_models.csv`. Sources, with their
inputs:

- LLM Foundry, scripts/train/benchmarking/README.md, "H100 80GB BF16": MPT models under FSDP full sharding,
  tokens per second and GPU. All rows of 1b and larger with sequences of up to 8192 tokens.
- Liu et al. 2025, "MoE Parallel Folding", arXiv 2504.14960: Megatron-Core on Eos (DGX H100), sequences of
  4096, microbatches of one, capacity factor 1, utilisation with the attention term. Tables 1, 3 and 4, "MCore
  w/ Folding" and "FSDP + EP". Not given there, assumed here: one layer per virtual pipeline stage.
- NVIDIA's AutoModel and Megatron of 2025 and 2026, with sources in the table: FSDP whose gathers are
  prefetched, so traffic overlaps as in :mod:`launch.plan.overlap`. "Forced balance": a router that gives
  every expert as many tokens.

Biases and learned positions of MPT, under 0.2% of its parameters, are not counted.
"""

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from launch.plan.hardware import GPUS, Gpu, gpu_named
from launch.plan.overlap import overlap, traffic_of
from launch.plan.rows import read_rows
from launch.plan.step_time import (
    FITTED,
    Efficiency,
    Seconds,
    Split,
    compute_seconds,
    head_work,
    layer_work,
    link_seconds,
    update_work,
)
from launch.plan.traffic import Collective, CollectiveKind
from train.recipe import sizes
from train.recipe.schema import Ffn, Model, Moe, Position
from train.record.command import Figures, command

ADAM_BYTES = 8
WITHIN = 0.15
"""Largest relative error that a prediction should have."""
BF16 = 2
FP32 = 4


@dataclass(frozen=True)
class PublishedRun:
    """A published run: model, layout, batch and measured speed."""

    name: str
    model: Model
    gpus: int
    sequence_tokens: int
    microbatch_sequences: int
    microbatches: int
    checkpointing: bool = False
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    shards_weights: bool = True
    """FSDP; otherwise only the optimizer state is sharded."""
    overlaps: bool = False
    """Weights' traffic is ordered to run under arithmetic, as ours is."""
    measured_tokens_per_second: float | None = None
    """Tokens per second and GPU."""
    measured_utilisation: float | None = None
    fits: bool = False
    """Used to fit the efficiencies."""

    @property
    def copies(self) -> int:
        """GPUs that hold the same part of the model, outside the experts."""
        return self.gpus // (self.tensor * self.pipeline)


def flops_per_token(system: PublishedRun) -> float:
    """Training FLOPs per token with attention over all positions, as both sources count them."""
    return sizes.flops_per_token_training(system.model, system.sequence_tokens).total


def measured(system: PublishedRun, gpu: Gpu) -> float:
    """Measured tokens per second and GPU."""
    if system.measured_tokens_per_second is not None:
        return system.measured_tokens_per_second
    assert system.measured_utilisation is not None
    return system.measured_utilisation * gpu.matrix_flops / flops_per_token(system)


def predicted(system: PublishedRun, gpu: Gpu, efficiency: Efficiency = FITTED) -> float:
    """Predicted tokens per second and GPU."""
    tokens = system.microbatch_sequences * system.sequence_tokens
    microbatch = _microbatch_seconds(system, tokens, gpu, efficiency).total
    stages = system.model.n_layers // system.pipeline
    # Interleaved pipelines wait for (stages - 1) / virtual stages microbatches (Narayanan et al. 2021).
    waiting = (system.pipeline - 1) / stages * microbatch
    step = system.microbatches * microbatch + waiting + _step_seconds(system, gpu, efficiency).total
    return system.microbatches * tokens / step / (system.tensor * system.pipeline)


def _microbatch_seconds(system: PublishedRun, tokens: int, gpu: Gpu, efficiency: Efficiency) -> Seconds:
    """Time of a forward and backward pass of one pipeline stage."""
    split = Split(system.tensor, system.expert)
    forward = layer_work(system.model, tokens, system.sequence_tokens, split)
    layer = forward + forward.backward() + (forward if system.checkpointing else forward.times(0))
    head = head_work(system.model, tokens, split)
    layers = system.model.n_layers // system.pipeline
    work = layer.times(layers) + (head + head.backward()).times(1 / system.pipeline)
    arithmetic = compute_seconds(work, gpu, efficiency)
    exchanges = list(_exchanges(system, tokens))
    if system.overlaps:
        calls = [(exchange, exchange.calls) for exchange in exchanges]
        return overlap(arithmetic, traffic_of(calls, layers, gpu, efficiency.collectives)).seconds
    return arithmetic + link_seconds(exchanges, gpu, efficiency)


def _exchanges(system: PublishedRun, tokens: int) -> Iterable[Collective]:
    model, layers = system.model, system.model.n_layers // system.pipeline
    found = []
    if model.moe and system.expert > 1:
        rows = tokens // system.tensor * model.moe.top_k * model.d_model * BF16
        found.append(Collective("tokens", CollectiveKind.all_to_all, rows, system.expert, 1, 4 * layers))
    if system.tensor > 1:
        # Sequence parallelism: gather and reduce around attention and feed-forward, forward and backward.
        whole = tokens * model.d_model * BF16
        found.append(Collective("tensor", CollectiveKind.all_gather, whole, system.tensor, 1, 8 * layers))
    if system.shards_weights:
        for weights, ranks, stride in _sharded(system):
            found.append(
                Collective(
                    "weights", CollectiveKind.all_gather, weights * BF16 / layers, ranks, stride, 3 * layers
                )
            )
    return found


def _sharded(system: PublishedRun) -> list[tuple[float, int, int]]:
    """Weights of a GPU's tensor, pipeline and expert part, with size and stride of the sharding group."""
    model = system.model
    experts = sum(w.elements for w in sizes.layer_weights(model, 0) if w.is_expert) * model.n_layers
    rest = sizes.total_parameters(model) - experts
    parts = [(rest / system.tensor / system.pipeline, system.copies, system.tensor)]
    if experts:
        # With folding, experts are distributed over neighbouring GPUs, however the other matrices are split.
        over = system.expert * (system.tensor if system.shards_weights else 1)
        ranks = system.gpus // (over * system.pipeline)
        parts.append((experts / over / system.pipeline, ranks, over))
    return parts


def _step_seconds(system: PublishedRun, gpu: Gpu, efficiency: Efficiency) -> Seconds:
    """Time once per step: the optimizer, and without FSDP also reducing gradients and gathering weights."""
    parts = _sharded(system)
    held = sum(weights / ranks for weights, ranks, _ in parts)
    total = compute_seconds(update_work(held, ADAM_BYTES, clips=False), gpu, efficiency)
    if not system.shards_weights:
        for weights, ranks, stride in parts:
            reduce = Collective("gradients", CollectiveKind.reduce_scatter, weights * FP32, ranks, stride, 1)
            gather = Collective("weights", CollectiveKind.all_gather, weights * BF16, ranks, stride, 1)
            total += link_seconds([reduce, gather], gpu, efficiency)
    return total


def fit(systems: Iterable[PublishedRun], gpu: Gpu) -> Efficiency:
    """Fits the two efficiencies by least squares of log(predicted / measured), to two digits.

    A step's time is linear in the inverses of both efficiencies, so three predictions per system suffice.
    """
    parts = []
    for system in systems:
        if system.fits:
            whole, half_matrix, half_links = (
                1 / predicted(system, gpu, replace(FITTED, matrix=matrix, links=links))
                for matrix, links in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))
            )
            parts.append((measured(system, gpu), half_matrix - whole, half_links - whole, whole))

    def loss(matrix: float, links: float) -> float:
        return sum(
            math.log(real * (whole + by_matrix * (1 / matrix - 1) + by_links * (1 / links - 1))) ** 2
            for real, by_matrix, by_links, whole in parts
        )

    _, matrix, links = min(
        (loss(matrix / 100, links / 100), matrix / 100, links / 100)
        for matrix in range(40, 91)
        for links in range(40, 161)
    )
    return replace(FITTED, matrix=matrix, links=links)


def published_models() -> dict[str, Model]:
    """Returns the models of the published runs by name."""
    return {
        row["model"]: Model(
            d_model=int(row["d_model"]),
            n_layers=int(row["n_layers"]),
            n_heads=int(row["n_heads"]),
            n_kv_heads=int(row["n_kv_heads"]),
            head_width=int(row["head_width"]),
            ffn_hidden_size=int(row["ffn_hidden_size"]),
            vocab_size=int(row["vocab_size"]),
            max_sequence_tokens=int(row["max_sequence_tokens"]),
            ffn=Ffn(row["ffn"]),
            position=Position(row["position"]),
            tie_embeddings=row["tie_embeddings"] == "true",
            moe=_experts(row),
        )
        for row in read_rows(Path(__file__).with_name("published_models.csv"))
    }


def _experts(row: dict[str, str]) -> Moe | None:
    if not int(row["experts"]):
        return None
    shared = int(row["shared_ffn"]) or None
    return Moe(experts=int(row["experts"]), top_k=int(row["top_k"]), shared_hidden_size=shared)


def published_systems() -> list[PublishedRun]:
    """Returns the published runs in the order of the file."""
    models = published_models()
    systems = []
    for row in read_rows(Path(__file__).with_name("published_speeds.csv")):
        gpus, microbatch = int(row["gpus"]), int(row["microbatch_sequences"])
        tensor, pipeline = int(row["tensor"]), int(row["pipeline"])
        speed, utilisation = row["tokens_per_second_per_gpu"], row["flop_utilisation"]
        systems.append(
            PublishedRun(
                name=row["system"],
                model=models[row["model"]],
                gpus=gpus,
                sequence_tokens=int(row["sequence_tokens"]),
                microbatch_sequences=microbatch,
                microbatches=int(row["batch_sequences"]) * tensor * pipeline // (gpus * microbatch),
                checkpointing=row["recomputed"] == "true",
                tensor=tensor,
                pipeline=pipeline,
                expert=int(row["expert"]),
                shards_weights=row["fsdp"] == "true",
                overlaps=row["overlaps"] == "true",
                measured_tokens_per_second=int(speed) if speed else None,
                measured_utilisation=float(utilisation) if utilisation else None,
                fits=row["fits"] == "true",
            )
        )
    return systems


def published_figures(gpu: Gpu = GPUS["h100"]) -> list[dict[str, str | int | float | bool]]:
    """Returns predicted and published speed of each run."""
    return [
        {
            "system": system.name,
            "gpus": system.gpus,
            "published_tokens_per_second_per_gpu": measured(system, gpu),
            "predicted_tokens_per_second_per_gpu": predicted(system, gpu),
            "error": predicted(system, gpu) / measured(system, gpu) - 1,
            "fitted": system.fits,
        }
        for system in published_systems()
    ]


def format_published(gpu: Gpu = GPUS["h100"]) -> str:
    """Formats predicted and published speeds for a terminal."""
    lines = [f"{'system':44}{'GPUs':>6}{'published':>11}{'predicted':>11}{'error':>8}  tokens/s per GPU"]
    rows = published_figures(gpu)
    for row in rows:
        lines.append(
            f"{row['system']:44}{row['gpus']:>6}{row['published_tokens_per_second_per_gpu']:>11.0f}"
            f"{row['predicted_tokens_per_second_per_gpu']:>11.0f}{row['error']:>+8.1%}"
            f"{'  fitted' if row['fitted'] else ''}"
        )
    predicted_rows = [row for row in rows if not row["fitted"]]
    near = sum(abs(float(row["error"])) <= WITHIN for row in predicted_rows)
    lines += [
        "",
        f"{near} of {len(predicted_rows)} predicted rows within {WITHIN:.0%}; fitted on the other "
        f"{len(rows) - len(predicted_rows)}: matrix products {FITTED.matrix:.0%} of the peak, "
        f"links {FITTED.links:.0%} of their rate.",
    ]
    return "\n".join(lines)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")


@command(
    "python -m launch.experiments.published",
    "Compares predicted with published training speeds.",
    add_arguments,
    json="write the figures as JSON too",
)
def main(options: Namespace) -> Figures:
    """Prints the table."""
    gpu = gpu_named(options.gpu)
    print(format_published(gpu))
    return Figures(published_figures(gpu))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
