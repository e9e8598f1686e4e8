"""Measured memory and speed of optimizer steps of a slice of a recipe, compared with the plan."""

import time
from dataclasses import dataclass, replace

import torch

from launch.gpu_check.one_device import build_on_one_device
from launch.gpu_check.rows import CheckRow
from launch.plan.hardware import GPUS, Gpu
from launch.plan.memory import memory, states
from launch.plan.step import make_plan
from train.layout.device import measured_peak_flops
from train.layout.optim import clip_gradients
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Parallelism, Precision, Recipe
from train.step.microbatch import Batch, MicrobatchModel

MEMORY_BOUND = 0.05
"""Largest error of the planned peak relative to the measured one."""
WARMUP_STEPS, TIMED_STEPS = 3, 10
MOST_SHARE = 0.9
"""Share of the device's memory that a slice may take by its plan."""


@dataclass(frozen=True)
class Measured:
    """Measurements of some optimizer steps."""

    step_seconds: float
    held_bytes: int
    """Weights, gradients and optimizer state."""
    peak_bytes: int | None
    """Peak allocation during a step; None if the device does not track it."""


def slice_of(recipe: Recipe, memory_bytes: int) -> Recipe:
    """Returns the recipe with as many layers and sequences as fit one device, layers first.

    Raises:
        UserError: if one layer and one sequence do not fit.
    """
    for layers in (4, 2, 1):
        for sequences in (8, 4, 2, 1):
            found = replace(
                recipe,
                model=replace(recipe.model, n_layers=min(layers, recipe.model.n_layers)),
                parallelism=Parallelism(),
                training=replace(
                    recipe.training, microbatch_sequences=sequences, global_batch_sequences=sequences
                ),
            )
            if memory(found, 1).total < MOST_SHARE * memory_bytes:
                return found
    raise UserError(f"{recipe.name}: one layer and one sequence do not fit {memory_bytes:,} bytes")


def check_step(device: str, recipe: Recipe, gpu: Gpu | None, steps: int = TIMED_STEPS) -> list[CheckRow]:
    """Checks memory and reports speed of a slice.

    Args:
        device: `cpu` or `cuda`.
        recipe: the slice, see :func:`slice_of`.
        gpu: the device's data sheet, if known.
        steps: timed steps.
    """
    precision = Precision.bf16 if recipe.training.precision is not Precision.fp32 else Precision.fp32
    found = measure(device, recipe, precision, steps)
    planned = memory(recipe, 1)
    held = states(recipe.model, recipe.parallelism, 1, 0, recipe.optimizer)
    name = f"{recipe.name}, {recipe.model.n_layers} layers, {recipe.training.microbatch_sequences} sequences"
    # Only a step counter per tensor may differ.
    rows = [_bytes_row(f"weights, gradients, optimizer ({name})", found.held_bytes, held.total, 1e-3)]
    if found.peak_bytes is not None:
        peak = planned.total - planned.fragmentation - planned.reserved
        rows.append(_bytes_row(f"peak of a step ({name})", found.peak_bytes, peak, MEMORY_BOUND))
    return [*rows, *_speed(device, recipe, precision, found, gpu)]


def _speed(
    device: str, recipe: Recipe, precision: Precision, found: Measured, gpu: Gpu | None
) -> list[CheckRow]:
    tokens = sizes.tokens_per_batch(recipe) / found.step_seconds
    flops = sizes.flops_per_token_training(recipe.model, recipe.data.sequence_tokens).total * tokens
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    peak = measured_peak_flops(device, dtype)
    rows = [
        CheckRow("speed", f"tokens/s in {precision.value}, median of steps", f"{tokens:,.0f}", ""),
        CheckRow("speed", "FLOP/s of a large matrix product", f"{peak / 1e12:.2f} T", ""),
        CheckRow("speed", "FLOP utilisation of that", f"{flops / peak:.1%}", ""),
    ]
    if gpu is not None:
        plan = make_plan(recipe, 1, gpu)
        planned = f"{plan.tokens_per_second_per_gpu:,.0f} planned"
        rows[0] = replace(rows[0], wanted=planned)
        rows.append(
            CheckRow(
                "speed", f"FLOP utilisation of {gpu.name}'s data sheet", f"{flops / gpu.matrix_flops:.1%}", ""
            )
        )
    return rows


def measure(device: str, recipe: Recipe, precision: Precision, steps: int) -> Measured:
    """Runs optimizer steps on random tokens; measures the median time and the memory."""
    model, optimizer = build_on_one_device(recipe, device, precision)
    batch = _random_batch(recipe, device)
    times = []
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        _step(model, optimizer, batch, recipe.training.clip_norm)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None] + state
    return Measured(
        step_seconds=sorted(times[WARMUP_STEPS:])[steps // 2],
        held_bytes=sum(t.nbytes for t in held if isinstance(t, torch.Tensor)),
        peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


def _step(
    model: MicrobatchModel, optimizer: torch.optim.Optimizer, batch: Batch, clip_norm: float | None
) -> None:
    optimizer.zero_grad(set_to_none=True)
    model.loss(model(batch), batch)["total"].backward()
    clip_gradients(model.parameters(), clip_norm)
    optimizer.step()


def _random_batch(recipe: Recipe, device: str) -> Batch:
    """Returns random tokens with two documents per sequence."""
    shape = (recipe.training.microbatch_sequences, recipe.data.sequence_tokens)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(recipe.model.vocab_size, shape, generator=generator)
    documents_BS = (torch.arange(shape[1]) >= shape[1] // 2).long().expand(shape)
    batch = {"input_ids": ids_BS, "document_ids": documents_BS, "targets": ids_BS.roll(-1, dims=1)}
    return {key: value.to(device) for key, value in batch.items()} | {
        "sample_positions": torch.arange(shape[0], device=device)
    }


def _bytes_row(what: str, found: int, planned: int, bound: float) -> CheckRow:
    error = abs(planned - found) / found
    return CheckRow(
        "memory", what, f"{found / 2**30:.3f} GiB", f"{planned / 2**30:.3f} GiB planned", error <= bound
    )


def gpu_of(device_name: str) -> Gpu | None:
    """Returns the data sheet of a device by torch's name for it, for example `NVIDIA H100 80GB HBM3`."""
    return next((gpu for name, gpu in GPUS.items() if name.upper() in device_name.upper()), None)
