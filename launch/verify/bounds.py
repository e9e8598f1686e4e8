"""Bounds on the deviation of a layout from one process, by precision and quantity, with their reasons.

fp32. Layouts differ in summation order: 1e-5 relative for everything; token counts are equal. AdamW's eps is
at least :data:`LEAST_EPS`.

bf16. The reference is one process that rounds where FSDP2 rounds (one rank, weights gathered in bf16) and
keeps its activations. Every layout starts each step from the reference's weights, so that rounding in one
step does not send tokens to other experts in the next (fp32 covers how errors compound over steps). From
equal weights, a token's forward pass is the same arithmetic on every layout: losses and counts have the
fp32 bounds. Gradients are rounded to bf16, unit roundoff ``u = 2**-8``, once by every rank in every
microbatch, and experts shared by several ranks round the sum instead of its parts: either side is within
u of the exact sum, so the two are within 2 u of each other (Higham 2002, section 2.2). The norm sums tens of
thousands of such errors with random signs: u / 8 is generous. AdamW's first step, and every Lion step, is the
sign of the gradient. If gradients differ by the angle 2 u, a share 2 u / pi of signs differs (Sheppard 1899),
which moves weights by 2 sqrt(2 u / pi) of the step's change, 10%. That is for normally distributed gradients;
real ones lie nearer to zero, so twice that. Weights are measured against the change of the step.

With `parallelism.reduce_precision: bf16` the sums over ranks and microbatches are rounded too, each partial
sum by at most u of it, with random signs: twice the gradients' bound, and the weights' that follows from it.

A plain process rounds less than FSDP2 (norms and embeddings stay fp32), so bf16 is not run on one rank.
"""

import math

from train.recipe.schema import Parallelism, Precision, ReducePrecision

UNIT_ROUNDOFF = 2.0**-8
"""Unit roundoff of bf16, which has 8 significant bits."""

BOUNDS: dict[Precision, dict[str, float]] = {
    Precision.fp32: {
        "loss": 1e-5,
        "balance": 1e-5,
        "z": 1e-5,
        "choices": 0.0,
        "gradients": 1e-5,
        "norm": 1e-5,
        "weights": 1e-5,
    },
    Precision.bf16: {
        "loss": 1e-5,
        "balance": 1e-5,
        "z": 1e-5,
        "choices": 0.0,
        "gradients": 2 * UNIT_ROUNDOFF,
        "norm": UNIT_ROUNDOFF / 8,
        "weights": 4 * math.sqrt(2 * UNIT_ROUNDOFF / math.pi),
    },
}
"""Largest relative error that passes. `choices` are the experts' token counts."""
REDUCED_IN_BF16 = {"gradients": 4 * UNIT_ROUNDOFF, "weights": 4 * math.sqrt(4 * UNIT_ROUNDOFF / math.pi)}
"""Those of bf16 that are wider where gradients are also summed in it."""
QUANTITIES = tuple(BOUNDS[Precision.fp32])
FLOOR = 1e-4
"""The error of a near-zero gradient is measured against this fraction of the full gradient's RMS."""
LEAST_GAP = 2e-7
"""Least gap between the scores of the last selected and the first rejected expert; rounding might swap
closer ones."""
LEAST_EPS = 1e-6
"""Least eps of AdamW in fp32 cases. Its first step divides a gradient by its own size plus eps: at 1e-8, an
element whose gradient is all rounding moves by up to the full learning rate in either direction."""
LEAST_CHANGE = 1e-4
"""In bf16, a step that changes a weight by less than this fraction is measured against the fraction: times
the bound, that is the fp32 bound."""


def bounds_of(precision: Precision, layout: Parallelism) -> dict[str, float]:
    """Returns the bounds of a case in a precision."""
    is_wider = precision is Precision.bf16 and layout.reduce_precision is ReducePrecision.bf16
    return BOUNDS[precision] | (REDUCED_IN_BF16 if is_wider else {})
