"""A layer with experts on several ranks, in halves of a microbatch that hide each other's exchange.

====================================  =========================================
this rank computes                    meanwhile on the links
====================================  =========================================
half 1: attention, norms, router
half 2: attention, norms, router      half 1 to its experts
half 1: experts                       half 2 to its experts
half 2: experts                       half 1 back
half 1: sum of its experts' outputs   half 2 back
half 2: sum of its experts' outputs
====================================  =========================================

The backward pass is the same from bottom to top, and a recomputed layer runs both in turn. Only the last way
back has little to hide behind, and its counterpart in the backward pass; the other three exchanges of four
are hidden as far as the arithmetic goes. Like DualPipe's pairs of microbatches (DeepSeek-V3, section 3.2.1),
without a pipeline.

Sequences are independent outside the router's losses, which are of the whole microbatch: means of halves of
equal size, and sums of counts. So the halves change rounding only.

Shapes: B sequences, S tokens of each, T tokens of a half, D model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.model.attention import AttentionPlan
from train.model.moe import MoE, MoEAux


class Halves(NamedTuple):
    """Attention's plans of the first and the second half of a microbatch's sequences."""

    first: AttentionPlan
    second: AttentionPlan


def plan_halves(
    plan_of: Callable[[int, Tensor | None], AttentionPlan], sequences: int, document_ids_BS: Tensor | None
) -> Halves:
    """Plans attention for each half.

    Args:
        plan_of: the plan of a number of sequences with these documents.
        sequences: B, even.
        document_ids_BS: document of each token, or None.
    """
    if document_ids_BS is None:
        both = plan_of(sequences // 2, None)
        return Halves(both, both)
    first, second = (plan_of(len(half), half) for half in document_ids_BS.chunk(2))
    return Halves(first, second)


def interleaved(norm_attn_norm: nn.Module, moe: MoE, x_BSD: Tensor, plans: Halves) -> tuple[Tensor, MoEAux]:
    """Runs a layer's halves, the exchange of each behind the arithmetic of the other.

    Args:
        norm_attn_norm: the layer's attention and norms.
        moe: its experts, on several ranks.
        x_BSD: the residual stream; B is even.
        plans: attention's plans.

    Returns:
        The residual stream after the layer, and the MoE's losses and counts over both halves.
    """
    middle = len(x_BSD) // 2
    streams, sent = [], []
    for half_BSD, plan, rows in zip(
        x_BSD.chunk(2), plans, (slice(None, middle), slice(middle, None)), strict=True
    ):
        stream_BSD, normed_BSD = norm_attn_norm(half_BSD, plan)
        streams.append(stream_BSD)
        sent.append(moe.send(normed_BSD, rows))
    outs, aux = moe.receive(sent)
    halves = [
        stream_BSD + out_TD.view_as(stream_BSD) for stream_BSD, out_TD in zip(streams, outs, strict=True)
    ]
    return torch.cat(halves), aux
