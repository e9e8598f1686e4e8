"""Published training speeds on H100s: five rows fit the two efficiencies, all others are predicted.

Sources, with the inputs as given there:

- LLM Foundry, scripts/train/benchmarking/README.md, "H100 80GB BF16": MPT models under FSDP full sharding,
  tokens per second and GPU. All rows of 1b and larger with sequences of up to 8192 tokens.
- Liu et al. 2025, "MoE Parallel Folding", arXiv 2504.14960: Megatron-Core on Eos (DGX H100), sequences of
  4096, microbatches of one, capacity factor 1, utilisation with the attention term. Tables 1, 3 and 4, "MCore
  w/ Folding" and "FSDP + EP". Not given there and assumed here: one layer per virtual pipeline stage.

Head widths are 128; biases and learned positions of MPT, under 0.2% of its parameters, are left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from launch.plan.hardware import GPUS, Gpu
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

ADAM_BYTES = 8
WITHIN = 0.15
"""Error that a prediction should not exceed."""
BF16 = 2
FP32 = 4


@dataclass(frozen=True)
class PublishedRun:
    """A published run: model, layout, batch, and what was measured."""

    name: str
    model: Model
    gpus: int
    sequence_tokens: int
    microbatch_sequences: int
    microbatches: int
    checkpointing: bool = False
    shared_ffn: int = 0
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    shards_weights: bool = True
    """FSDP; otherwise only the optimizer's state is sharded."""
    measured_tokens_per_second: float | None = None
    """Per GPU."""
    measured_utilisation: float | None = None
    fits: bool = False
    """Used to fit the efficiencies."""

    @property
    def copies(self) -> int:
        """GPUs that hold the same part of the model, outside of the experts."""
        return self.gpus // (self.tensor * self.pipeline)


def flops_per_token(system: PublishedRun) -> float:
    """Model FLOPs of a token in training, all positions attended to, as both sources count."""
    flops = sizes.flops_per_token_training(system.model, system.sequence_tokens)
    shared = 6 * 3 * system.model.d_model * system.shared_ffn * system.model.n_layers
    return flops.total + shared


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
    """One forward and backward pass of one pipeline stage."""
    split = Split(system.tensor, system.expert)
    forward = layer_work(system.model, tokens, system.sequence_tokens, split, system.shared_ffn)
    layer = forward + forward.backward() + (forward if system.checkpointing else forward.times(0))
    head = head_work(system.model, tokens, split)
    work = layer.times(system.model.n_layers / system.pipeline)
    work += (head + head.backward()).times(1 / system.pipeline)
    return compute_seconds(work, gpu, efficiency) + link_seconds(_exchanges(system, tokens), gpu, efficiency)


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
    """Weights of one GPU's tensor, pipeline and expert part, and the group that shards them: size, stride."""
    model = system.model
    experts = sum(w.elements for w in sizes.layer_weights(model, 0) if w.is_expert) * model.n_layers
    shared = 3 * model.d_model * system.shared_ffn * model.n_layers
    rest = sizes.total_parameters(model) - experts + shared
    parts = [(rest / system.tensor / system.pipeline, system.copies, system.tensor)]
    if experts:
        # Folded, experts are spread over neighbouring GPUs whatever shares the other matrices.
        over = system.expert * (system.tensor if system.shards_weights else 1)
        ranks = system.gpus // (over * system.pipeline)
        parts.append((experts / over / system.pipeline, ranks, over))
    return parts


def _step_seconds(system: PublishedRun, gpu: Gpu, efficiency: Efficiency) -> Seconds:
    """What happens once per step: the optimizer, and without FSDP the gradients and the new weights."""
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
    """The two efficiencies with the least squared logarithm of predicted over measured, to two digits.

    A step's time is linear in both efficiencies' inverses, so that three predictions of each system give all.
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


def _mpt(d_model: int, layers: int) -> Model:
    return Model(
        d_model=d_model,
        n_layers=layers,
        n_heads=d_model // 128,
        n_kv_heads=d_model // 128,
        ffn_hidden_size=4 * d_model,
        vocab_size=50368,
        max_sequence_tokens=8192,
        ffn=Ffn.mlp,
        position=Position.alibi,
        tie_embeddings=True,
    )


MPT = {
    "1b": _mpt(2048, 24),
    "3b": _mpt(2560, 32),
    "7b": _mpt(4096, 32),
    "13b": _mpt(5120, 40),
    "30b": _mpt(7168, 48),
    "70b": _mpt(8192, 80),
}
MIXTRAL = Model(
    d_model=6144,
    n_layers=56,
    n_heads=48,
    n_kv_heads=8,
    ffn_hidden_size=16384,
    vocab_size=32000,
    max_sequence_tokens=4096,
    moe=Moe(experts=8, top_k=2),
)
MIXTRAL_FINE = replace(MIXTRAL, ffn_hidden_size=2048, moe=Moe(experts=64, top_k=8))
QWEN2 = Model(
    d_model=3584,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    ffn_hidden_size=2560,
    vocab_size=151936,
    max_sequence_tokens=4096,
    moe=Moe(experts=64, top_k=8),
)
QWEN2_SHARED = 20480

# Size, sequence, GPUs, microbatch, accumulated microbatches, recomputation, tokens/s/GPU, fits.
FOUNDRY_ROWS = (
    ("70b", 2048, 64, 8, 4, True, 1039, False),
    ("70b", 2048, 32, 2, 16, True, 882, True),
    ("30b", 8192, 8, 1, 21, True, 1384, False),
    ("30b", 4096, 8, 1, 21, True, 1802, False),
    ("30b", 2048, 32, 14, 3, True, 2308, False),
    ("30b", 2048, 16, 10, 3, True, 2263, False),
    ("30b", 2048, 8, 3, 21, True, 2002, False),
    ("30b", 1024, 8, 6, 21, True, 2084, False),
    ("13b", 4096, 8, 10, 3, True, 4717, False),
    ("13b", 2048, 64, 2, 1, False, 4800, True),
    ("13b", 2048, 32, 2, 1, False, 4811, False),
    ("13b", 2048, 16, 2, 1, False, 4767, False),
    ("13b", 2048, 8, 2, 1, False, 4792, True),
    ("13b", 1024, 8, 40, 3, True, 5502, False),
    ("7b", 8192, 8, 8, 2, True, 6935, False),
    ("7b", 4096, 8, 16, 2, True, 8611, True),
    ("7b", 2048, 8, 6, 1, False, 10643, True),
    ("7b", 1024, 8, 64, 2, True, 10203, False),
    ("3b", 8192, 8, 3, 6, False, 16578, False),
    ("3b", 4096, 8, 5, 6, False, 20964, False),
    ("3b", 2048, 64, 6, 3, False, 22525, False),
    ("3b", 2048, 32, 6, 3, False, 23021, False),
    ("3b", 2048, 16, 10, 3, False, 24142, False),
    ("3b", 1024, 8, 20, 6, False, 27046, False),
    ("3b", 512, 8, 40, 6, False, 27965, False),
    ("1b", 8192, 8, 3, 4, False, 29157, False),
    ("1b", 4096, 8, 7, 4, False, 38535, False),
    ("1b", 2048, 64, 20, 1, False, 44402, False),
    ("1b", 2048, 32, 20, 1, False, 45130, False),
    ("1b", 2048, 16, 20, 1, False, 46037, False),
    ("1b", 2048, 8, 14, 1, False, 45455, False),
    ("1b", 1024, 8, 18, 4, False, 48910, False),
    ("1b", 512, 8, 56, 4, False, 52275, False),
)
# Model, method, GPUs, sequences per batch, utilisation.
MEGATRON_ROWS = (
    ("Mixtral 8x22B", "folding", 128, 256, 0.493),
    ("Mixtral 8x22B", "folding", 128, 1024, 0.522),
    ("Mixtral 8x22B", "folding", 256, 1024, 0.507),
    ("Mixtral 8x22B", "folding", 512, 1024, 0.489),
    ("Mixtral 8x22B", "folding", 1024, 1024, 0.449),
    ("Mixtral 8x22B", "FSDP + EP", 128, 256, 0.234),
    ("Mixtral 8x22B", "FSDP + EP", 128, 1024, 0.239),
    ("Mixtral 8x22B", "FSDP + EP", 256, 1024, 0.255),
    ("Mixtral 8x22B", "FSDP + EP", 512, 1024, 0.244),
    ("Mixtral 8x22B", "FSDP + EP", 1024, 1024, 0.238),
    ("Mixtral 8x22B G8T8", "folding", 128, 256, 0.288),
    ("Mixtral 8x22B G8T8", "folding", 128, 1024, 0.300),
    ("Mixtral 8x22B G8T8", "folding", 256, 1024, 0.293),
    ("Mixtral 8x22B G8T8", "folding", 512, 1024, 0.267),
    ("Mixtral 8x22B G8T8", "folding", 1024, 1024, 0.255),
    ("Qwen2-57B-A14B", "folding", 64, 256, 0.390),
    ("Qwen2-57B-A14B", "folding", 64, 1024, 0.399),
    ("Qwen2-57B-A14B", "folding", 128, 1024, 0.397),
    ("Qwen2-57B-A14B", "folding", 256, 1024, 0.381),
    ("Qwen2-57B-A14B", "folding", 512, 1024, 0.366),
    ("Qwen2-57B-A14B", "folding", 1024, 1024, 0.334),
    ("Qwen2-57B-A14B", "FSDP + EP", 64, 256, 0.254),
    ("Qwen2-57B-A14B", "FSDP + EP", 64, 1024, 0.263),
    ("Qwen2-57B-A14B", "FSDP + EP", 128, 1024, 0.256),
    ("Qwen2-57B-A14B", "FSDP + EP", 256, 1024, 0.234),
    ("Qwen2-57B-A14B", "FSDP + EP", 512, 1024, 0.228),
    ("Qwen2-57B-A14B", "FSDP + EP", 1024, 1024, 0.216),
)
MEGATRON_MODELS = {
    "Mixtral 8x22B": (MIXTRAL, 0),
    "Mixtral 8x22B G8T8": (MIXTRAL_FINE, 0),
    "Qwen2-57B-A14B": (QWEN2, QWEN2_SHARED),
}
# Tensor, pipeline, expert degree (table 3).
MEGATRON_LAYOUTS = {
    ("Mixtral 8x22B", "folding"): (2, 8, 8),
    ("Mixtral 8x22B", "FSDP + EP"): (2, 1, 8),
    ("Mixtral 8x22B G8T8", "folding"): (4, 8, 8),
    ("Qwen2-57B-A14B", "folding"): (2, 4, 4),
    ("Qwen2-57B-A14B", "FSDP + EP"): (1, 1, 8),
}


def published_systems() -> list[PublishedRun]:
    """All rows."""
    systems = [
        PublishedRun(
            name=f"MPT-{size}, {sequence} tokens{', recomputed' if recomputed else ''}",
            model=MPT[size],
            gpus=gpus,
            sequence_tokens=sequence,
            microbatch_sequences=microbatch,
            microbatches=microbatches,
            checkpointing=recomputed,
            measured_tokens_per_second=speed,
            fits=fits,
        )
        for size, sequence, gpus, microbatch, microbatches, recomputed, speed, fits in FOUNDRY_ROWS
    ]
    for name, method, gpus, batch, utilisation in MEGATRON_ROWS:
        model, shared = MEGATRON_MODELS[name]
        tensor, pipeline, expert = MEGATRON_LAYOUTS[name, method]
        systems.append(
            PublishedRun(
                name=f"{name}, {method}, batch {batch}",
                model=model,
                gpus=gpus,
                sequence_tokens=4096,
                microbatch_sequences=1,
                microbatches=batch * tensor * pipeline // gpus,
                shared_ffn=shared,
                tensor=tensor,
                pipeline=pipeline,
                expert=expert,
                shards_weights=method == "FSDP + EP",
                measured_utilisation=utilisation,
            )
        )
    return systems


def published_figures(gpu: Gpu = GPUS["h100"]) -> list[dict[str, str | int | float | bool]]:
    """Predicted against published, row by row."""
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
    """The same for a terminal."""
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
