"""How far a layout may be from one process, by precision and quantity, and why.

fp32. Layouts differ in the order in which they add: 1e-5 relative for everything; token counts are equal.

bf16. The reference is one process that rounds where FSDP2 rounds (one rank, weights gathered in bf16) and
keeps its activations; every layout starts each step from the reference's weights, so that what rounding has
done in one step does not send tokens to other experts in the next (fp32 holds the compounding of steps).
From equal weights a token's forward pass is the same arithmetic on every layout: losses and counts have the
bounds of fp32. Gradients are rounded to bf16, unit roundoff ``u = 2**-8``, once by every rank in every
microbatch, and experts that several ranks share round the sum instead of its parts: either side is within
u of the exact sum, two sides are within 2 u (Higham 2002, section 2.2). The norm adds up tens of thousands
of such errors with random signs: u / 8 is generous. AdamW's first step, and every one of Lion's, is the sign
of the gradient. Where gradients differ by the angle 2 u, a share 2 u / pi of signs differs (Sheppard 1899),
which moves weights by 2 sqrt(2 u / pi) of the step's change, 10%. That is for normally distributed gradients;
real ones lie nearer to zero, so twice that. Weights are measured against the change of the step.

A plain process rounds less than FSDP2 (norms and embeddings stay fp32), so bf16 has no row for one rank.
"""

import math

from train.recipe.schema import Precision

UNIT_ROUNDOFF = 2.0**-8
"""Of bf16, which keeps 8 bits."""

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
QUANTITIES = tuple(BOUNDS[Precision.fp32])
FLOOR = 1e-4
"""A gradient that is noise by itself is measured against this share of the whole gradient's rms."""
LEAST_GAP = 2e-7
"""Scores of the last chosen and the first refused expert: nearer ones could swap by rounding alone."""
LEAST_CHANGE = 1e-4
"""A step that changes a weight by less than this share of it is measured against the share, in bf16: times
the bound, that is the fp32 bound."""
