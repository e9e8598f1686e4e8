"""Checks that losses, gradients and weights agree between the CPU and the device.

Input, tiny recipe and clipping are those of the parity gate (launch/verify), on one process.
"""

import torch
from torch import Tensor

from launch.gpu_check.kernels import relative_error
from launch.gpu_check.one_device import build_on_one_device
from launch.gpu_check.rows import CheckRow, deviation_row
from launch.verify.case_inputs import make_batches
from launch.verify.cases import INPUTS, STEPS, Layout, make_case
from train.layout.optim import clip_gradients
from train.recipe.schema import Precision, Recipe
from train.recipe.tiny import tiny_recipe

BOUNDS = {
    Precision.fp32: {"loss": 1e-5, "expert choices": 0.0, "gradients": 1e-4, "weights": 1e-4},
    # bf16 keeps 3 digits, and nearly tied experts may be chosen differently.
    Precision.bf16: {"loss": 1e-2, "expert choices": 0.05, "whole gradient": 0.2},
}
"""Largest deviations. Choices: the share of tokens that went to another expert. Whole gradient: the relative
Euclidean norm of the difference over all weights. Others: the largest relative error of a tensor."""

Record = dict[str, list[Tensor]]


def check_numerics(device: str, recipe: Recipe, precisions: tuple[Precision, ...]) -> list[CheckRow]:
    """Trains the tiny recipe for a few clipped steps on the CPU and the device, and compares."""
    rows = []
    expected = train_steps("cpu", recipe, Precision.fp32)
    for precision in precisions:
        found = train_steps(device, recipe, precision)
        for quantity, bound in BOUNDS[precision].items():
            pairs = zip(found[quantity], expected[quantity], strict=True)
            compare = COMPARE.get(quantity, relative_error)
            worst = max(compare(ours, theirs) for ours, theirs in pairs)
            what = f"{quantity} over {STEPS} steps in {precision.value} against fp32 on the CPU"
            rows.append(deviation_row("numerics", what, worst, bound))
    return rows


def train_steps(device: str, recipe: Recipe, precision: Precision) -> Record:
    """Trains a few steps; returns losses, choices, gradients and weights per step and tensor, on the CPU."""
    plain = INPUTS[0]
    small = make_case(tiny_recipe(recipe, steps=STEPS), Layout(1, 1, 1), plain, precision).recipe
    model, optimizer = build_on_one_device(small, device, precision)
    record: Record = {"loss": [], "expert choices": [], "gradients": [], "whole gradient": []}
    for batch in make_batches(small, plain, seed=0):
        moved = {key: value.to(device) for key, value in batch.items()}
        optimizer.zero_grad(set_to_none=True)
        outputs = model(moved)
        loss = model.loss(outputs, moved)["total"]
        loss.backward()
        clip_gradients(model.parameters(), small.training.clip_norm)
        record["loss"].append(loss.detach().cpu())
        record["expert choices"].append(outputs.expert_tokens_LE.cpu())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        record["gradients"] += [gradient.cpu().clone() for gradient in gradients]
        record["whole gradient"].append(torch.cat([gradient.cpu().flatten() for gradient in gradients]))
        optimizer.step()
    record["weights"] = [parameter.detach().cpu() for parameter in model.parameters()]
    return record


def _moved_share(ours: Tensor, theirs: Tensor) -> float:
    """Returns the share of choices that differ."""
    return float((ours - theirs).abs().sum() / (2 * theirs.sum()))


def _norm_error(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


COMPARE = {"expert choices": _moved_share, "whole gradient": _norm_error}
