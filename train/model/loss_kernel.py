"""The loss of a chunk's logits on a GPU in one kernel, which needs no memory but theirs.

As operations of torch's, softmax in fp32, two maxima, casts and masks pass over the logits some twelve times
and hold them twice more in fp32. Here a program reads its row twice and overwrites it once.

Shapes: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types of logits that the kernel takes; it computes in fp32."""
MOST_COLUMNS = 8192
"""Columns that a program has in registers: 16 for each of its threads."""
WARPS = 16


def losses_in_place(
    logits_CV: Tensor, targets_C: Tensor, ignore: int, z_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns each token's cross-entropy and z-loss in fp32; ``with_grad`` overwrites logits by gradients.

    Args:
        logits_CV: contiguous.
        targets_C: token ids.
        ignore: target of a token whose losses and gradient are 0.
        z_weight: of the squared log-sum-exp; 0: there is no z-loss.
        with_grad: whether the gradient of the losses' sum is wanted.
    """
    assert logits_CV.is_contiguous() and targets_C.is_contiguous()
    losses_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    penalties_C = torch.empty_like(losses_C) if z_weight else None
    columns = min(MOST_COLUMNS, triton.next_power_of_2(logits_CV.shape[1]))
    cross_entropy[(len(logits_CV),)](
        *(logits_CV, targets_C, losses_C, losses_C if penalties_C is None else penalties_C),
        *(logits_CV.shape[1], z_weight, ignore, z_weight > 0, with_grad, columns),
        num_warps=WARPS,
    )
    return losses_C, penalties_C


@triton.jit
def cross_entropy(  # type: ignore[no-untyped-def]  # Triton reads these annotations, and knows only its own.
    logits,
    targets,
    losses,
    penalties,
    vocabulary,
    z_weight,
    IGNORE: tl.constexpr,
    WITH_Z: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row of :func:`losses_in_place`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    target = tl.load(targets + row)
    has_loss = target != IGNORE
    columns = tl.arange(0, COLUMNS)
    of_target = tl.load(logits + tl.where(has_loss, target, 0)).to(tl.float32)
    # The target's own share is left out: next to a probability near 1 the others' would lose all digits, and
    # they are its gradient.
    largest = of_target
    others = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        places = start + columns
        x = tl.load(logits + places, mask=places < vocabulary, other=-float("inf")).to(tl.float32)
        x = tl.where(places == target, -float("inf"), x)
        new_largest = tl.maximum(largest, tl.max(x, 0))
        others = others * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
        largest = new_largest
    total = others + tl.exp(of_target - largest)
    loss = tl.log(total) + (largest - of_target)
    tl.store(losses + row, tl.where(has_loss, loss, 0.0))
    slope = tl.full((), 0.0, tl.float32)
    if WITH_Z:
        log_sum = tl.log(total) + largest
        tl.store(penalties + row, tl.where(has_loss, z_weight * log_sum * log_sum, 0.0))
        slope = 2 * z_weight * log_sum
    if WITH_GRAD:
        for start in range(0, vocabulary, COLUMNS):
            places = start + columns
            x = tl.load(logits + places, mask=places < vocabulary, other=0.0).to(tl.float32)
            share = tl.exp(x - largest)
            gradient = tl.where(places == target, -others, share) / total
            if WITH_Z:
                gradient += slope * share / total
            gradient = tl.where(has_loss, gradient, 0.0)
            tl.store(logits + places, gradient.to(logits.dtype.element_ty), mask=places < vocabulary)
