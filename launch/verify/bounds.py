"""Bounds on the deviation of a layout from one process, by precision and quantity, with their reasons.

fp32. Layouts differ in summation order: 1e-5 relative for everything; token counts are equal. AdamW's eps is
at least :data:`LEAST_EPS`. Lion's update is a sign, which jumps at zero: where momentum and gradient nearly
cancel, any rounding turns it, and the weight moves by two steps. No bound follows from the gradient's, so
with Lion too every step begins from the reference's weights and the update is computed from its gradients, as
in bf16: what is wrong in a step shows in that step, and is not carried into the next.

bf16. The reference is one process that rounds where FSDP2 rounds (one rank, weights gathered in bf16) and
keeps its activations. Every layout starts each step from the reference's weights, so that rounding in one
step does not send tokens to other experts in the next (fp32 covers how errors compound over steps). From
equal weights, every pass of a microbatch is the same arithmetic on every layout: losses, counts and gradients
have the fp32 bounds, with one exception. Gradients are rounded to bf16, unit roundoff ``u = 2**-8``, once by
every rank in every microbatch, and experts shared by several ranks round the sum instead of its parts: either
side is within u of the exact sum, so the two are within 2 u of each other (Higham 2002, section 2.2). These
errors have both signs: over the thousands of elements of an expert's matrix their mean, weighted by the
gradient (`bias`), is some hundredths of u, and a quarter of u is the bound, 0.1%.

The update is computed from the reference's gradients, before clipping and again after it, so nothing of that
enters it. What is left, the norm, is summed in another order: 1e-6. Moments and weights come from equal
gradients element by element, and are mostly equal bit for bit: 1e-6, of weights of the step's change.

With `parallelism.reduce_precision: bf16` the sums over ranks are rounded too. One rounding of an element is
at most u of it, and 0.43 u of a tensor in the root mean square. Of W ranks the partial sums of 2 to W
gradients are rounded. Independent gradients add up like a random walk, so that in the mean square these
roundings are (2 + ... + W) / W = (W + 1) / 2 - 1 / W of one of the whole sum: 4.4 for 8 ranks, more than
the gate runs. Their errors are independent (Higham and Mary 2019, theorem 2.4): 0.43 u sqrt(4.4) = 0.9 u,
and for shared experts, either side of which is rounded once more, 0.43 u sqrt(6.4) = 1.1 u. The bounds are
three times that, since few elements spread: 3 u, and 4 u. The signed mean of a norm's 64 elements, the
fewest, has a standard deviation of 1.1 u sqrt(3 / 64) = 0.24 u if they spread like a Gaussian's; u is four
of them. Four ranks reach 1.0 u and 0.3 u.

With `parallelism.interleave` the reference takes halves a and b as microbatches, and adds fl(a) and fl(b).
Here, inside of a layer, their sum is rounded once more: u of it. Outside of the layers a and b are added
before they are rounded, so the two sides are within (1 + k) u of each other, `k = (|a| + |b|) / |a + b|`. Of
independent halves k is 1.4, and the error 0.43 u sqrt(k^2 / 2 + 1) = 0.6 u inside and outside of the layers,
of shared experts, either side of which is rounded once more, 0.8 u. The bound is 4 u, which is k = 3 with
every rounding at its worst. The signed mean of a norm's 64 elements is as with shared sequences, below.

With `training.expert_precision: fp8` a row's results are those of any layout, and gradients of experts are,
as long as the same tokens share a scale. In fp32 the reference's microbatches are those of a whole expert
group, and all bounds stay. In bf16 they are a rank's, so tokens of experts that ranks share meet others in
a tile there. Rounding an operand to e4m3 is at most 2**-4 of it, 0.43 times that in the root mean square;
of the two operands of a gradient, on two sides with other scales, 0.43 sqrt(4) 2**-4 = 5.4%, below the
bound of 2**-4. Seen are 3.5%, as some scales are the same. The elements of a row share their tokens'
errors, so their mean falls more slowly than with the root of their number: it is up to 0.8%, under a bound
of 1.6%. Scales of `mxfp8` are powers of two, which change no rounding but near zero.
Ranks that share sequences have tokens of an expert in another order than one process, in fp32 too, and sum
gradients of keys or of products in another order: 1e-7 of an element, which turns its rounding to e4m3 where
that is nearly a tie, by 2**-4 of it. Of all other gradients up to 1.3e-3 is seen, and the bound is 2**-7.

With `parallelism.context` and `parallelism.tensor` each rank rounds the gradients of its own tokens, where
the reference rounds their sum: 0.43 u sqrt(2) = 0.6 u of a tensor for independent parts, whatever their
number, and up to 0.8 u are seen, under the bound of 2 u. The signed mean of a norm's 64 elements has a
standard deviation of 0.6 u sqrt(3 / 64) = 0.13 u; up to 0.26 u are seen, and the bound is u. Passes are the
same arithmetic. With `context` each rank's gradients of all keys and values are rounded too before they are
summed: 0.6 u more of these, in each layer, and of all gradients of layers before. In the two layers of the
tiny recipe up to 1.5 u are seen, and 0.34 u of the mean; the bounds are 4 u and u. With `tensor` partial sums
are rounded before they are added up, which changes every activation: the reference rounds the same partial
sums of plain products (:mod:`launch.verify.reference`). Gradients of weights that are split are sums over
whole sequences, as in the reference, and `exact`.

A plain process rounds less than FSDP2 (norms and embeddings stay fp32), so bf16 is not run on one rank.
"""

from train.recipe.schema import ExpertPrecision, Precision, Recipe, ReducePrecision

UNIT_ROUNDOFF = 2.0**-8
"""Unit roundoff of bf16, which has 8 significant bits."""

BOUNDS: dict[Precision, dict[str, float]] = {
    Precision.fp32: {
        "read": 0.0,
        "loss": 1e-5,
        "balance": 1e-5,
        "z": 1e-5,
        "choices": 0.0,
        "gradients": 1e-5,
        "exact": 1e-5,
        "bias": 1e-5,
        "norm": 1e-5,
        "clipped": 2e-5,
        "settings": 0.0,
        "moments": 4e-5,
        "weights": 1e-5,
    },
    Precision.bf16: {
        "read": 0.0,
        "loss": 1e-5,
        "balance": 1e-5,
        "z": 1e-5,
        "choices": 0.0,
        "gradients": 2 * UNIT_ROUNDOFF,
        "exact": 1e-5,
        "bias": UNIT_ROUNDOFF / 4,
        "norm": 1e-6,
        "clipped": 1e-6,
        "settings": 0.0,
        "moments": 1e-6,
        "weights": 1e-6,
    },
}
"""Largest relative error that passes. `read` are the sequences of the loader: 1 where a rank reads others.
`choices` are the experts' token counts; `exact` are the gradients
that are rounded where the reference rounds them, and `bias` is the mean of a gradient's signed errors,
weighted by the gradient. `settings` are the learning rate, decay and other options of each parameter's
update, and the precision of weights and moments: 1 where they differ. In fp32 errors of gradient and norm
add up in `clipped`, and those of a square count twice in `moments`."""
REDUCED_IN_BF16 = {
    "gradients": 4 * UNIT_ROUNDOFF,
    "exact": 3 * UNIT_ROUNDOFF,
    "bias": UNIT_ROUNDOFF,
}
"""Those of bf16 that are wider where gradients are also summed in it, over up to 8 ranks."""
HALVED_IN_BF16 = {
    "gradients": 4 * UNIT_ROUNDOFF,
    "exact": 4 * UNIT_ROUNDOFF,
    "bias": UNIT_ROUNDOFF,
}
"""Those of bf16 that are wider where halves of a microbatch are interleaved."""
OF_SHARED_SEQUENCES = {"bias": UNIT_ROUNDOFF}
"""Those of bf16 that are wider where ranks share sequences."""
OF_SHARED_KEYS = {"gradients": 4 * UNIT_ROUNDOFF}
"""And where these gather keys and values."""
IN_OTHER_TILES = {"gradients": 2.0**-4, "bias": 2.0**-6}
"""Those of bf16 that are wider where tokens of shared experts are in other tiles of fp8."""
OF_SHARED_SEQUENCES_IN_FP8 = IN_OTHER_TILES | {"exact": 2.0**-7}
"""Those that are wider where ranks share sequences and experts compute in fp8, in fp32 too."""
QUANTITIES = tuple(BOUNDS[Precision.fp32])
FLOOR = 1e-4
"""The error of a near-zero gradient is measured against this fraction of the full gradient's RMS."""
FEWEST = 64
"""Elements of the norms for which `bias` is derived. A mean of fewer, as in the norm of a narrow vector of
latent attention, spreads more, by the root of this over their number, and is divided by that."""
LEAST_GAP = 2e-7
"""Least gap between the scores of the last selected and the first rejected expert; rounding might swap
closer ones."""
LEAST_EPS = 1e-6
"""Least eps of AdamW in fp32 cases. Its first step divides a gradient by its own size plus eps: at 1e-8, an
element whose gradient is all rounding moves by up to the full learning rate in either direction."""
LEAST_CHANGE = 0.1
"""In bf16, a step that changes a weight by less than this fraction is measured against the fraction: times
the bound, that is fp32's own rounding of the weight."""


def bounds_of(precision: Precision, recipe: Recipe) -> dict[str, float]:
    """Returns the bounds of a case in a precision."""
    layout = recipe.parallelism
    wider: list[dict[str, float]] = []
    if precision is Precision.bf16:
        wider += [REDUCED_IN_BF16] * (layout.reduce_precision is ReducePrecision.bf16)
        wider += [HALVED_IN_BF16] * layout.interleave
        wider += [OF_SHARED_SEQUENCES] * (layout.sharing > 1) + [OF_SHARED_KEYS] * (layout.context > 1)
        if recipe.training.expert_precision is ExpertPrecision.fp8 and layout.expert > 1:
            wider.append(IN_OTHER_TILES)
    if recipe.training.expert_precision is not ExpertPrecision.same and layout.sharing > 1:
        wider.append(OF_SHARED_SEQUENCES_IN_FP8)
    bounds = dict(BOUNDS[precision])
    for each in wider:
        bounds |= {quantity: max(bound, bounds[quantity]) for quantity, bound in each.items()}
    return bounds
