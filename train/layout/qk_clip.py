"""QK-clip: heads whose attention logits grow too large get smaller queries and keys.

MuonClip (Kimi Team 2025, arXiv 2507.20534, section 2.1, algorithm 1). After each update, a head whose largest
logit in the batch was above the threshold has its queries' and keys' weights multiplied, each by the root of
threshold / largest, so that its logits are what is allowed. Other heads compute what they did.

Where query heads share a key head, that is multiplied by the root for the largest of their logits, and each
of the queries by what is left for its own logits. With latent attention only a head's own parts can be
multiplied: query and key without position by the root each, the query with position, whose key all heads
share, by all of it.

Shapes: L layers, H query heads, G key heads, R width of a head, N elements of a latent head without position,
W with it, V elements of a value.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.model.attention import Attention
from train.model.decoder import Decoder
from train.model.init import own_part
from train.model.latent_attention import LatentAttention
from train.recipe import sizes

ALPHA = 0.5
"""Share of queries in the correction; keys have the rest. The paper's."""


def clip_heads(optimizer: torch.optim.Optimizer, decoder: Decoder, threshold: float) -> None:
    """Makes an optimizer clip heads after each of its steps; those of a skipped update stay as they are.

    Args:
        optimizer: of the decoder's weights.
        decoder: sharded where it is; from here on it watches its logits in training.
        threshold: largest logit that a head may have.
    """
    attentions, own_layers = decoder.watch_logits(), decoder.layer_numbers

    @torch.no_grad()
    def clip(*_given: Any) -> None:
        found = [attention.logits.of_heads_H for attention in attentions if attention.logits is not None]
        seen = [largest_H for largest_H in found if largest_H is not None]
        if len(seen) < len(attentions):  # as in the step by which torch fills in an optimizer's state
            return
        # Of all layers, as the stages of a pipeline have others.
        every_LH = seen[0].new_full((sizes.layers(decoder.cfg), len(seen[0])), -math.inf)
        every_LH[own_layers] = torch.stack(seen)
        every_LH = over_ranks(every_LH)
        decoder.largest_logit = every_LH.amax()
        largest_LH = every_LH[own_layers]
        decoder.forget_logits()
        scales_LH = torch.where(largest_LH > threshold, threshold / largest_LH, 1.0)
        for attention, scale_H in zip(attentions, scales_LH, strict=True):
            factors = factors_of(attention, scale_H)
            if all(weight.grad is not None for weight in factors):
                for weight, factor in factors.items():
                    local, start, _ = own_part(weight)
                    own = factor[start : start + len(local)]
                    local.mul_(own if local.ndim == 1 else own[:, None])

    optimizer.register_step_post_hook(clip)


def over_ranks(largest_LH: Tensor) -> Tensor:
    """Returns the largest logits over all ranks; every rank calls it."""
    if dist.is_initialized():
        dist.all_reduce(largest_LH, op=dist.ReduceOp.MAX)
    return largest_LH


def factors_of(attention: Attention | LatentAttention, scale_H: Tensor) -> dict[Tensor, Tensor]:
    """Returns, for each weight, the factor of each of its rows that scales a head's logits by ``scale_H``."""
    if isinstance(attention, LatentAttention):
        latent, root_H1 = attention.latent, scale_H[:, None].sqrt()
        ones_HV = torch.ones_like(root_H1).expand(-1, latent.v_width)
        own_HN, turned_HW = (
            root_H1.expand(-1, latent.nope_width),
            scale_H[:, None].expand(-1, latent.rope_width),
        )
        queries = attention.q_proj if latent.q_rank is None else attention.q_b_proj
        return {
            queries.weight: torch.cat([own_HN, turned_HW], dim=1).flatten(),
            attention.kv_b_proj.weight: torch.cat([own_HN, ones_HV], dim=1).flatten(),
        }
    heads, key_heads, value_heads = attention.heads
    key_G = scale_H.view(key_heads, -1).amin(dim=1) ** (1 - ALPHA)
    query_H = scale_H / key_G.repeat_interleave(heads // key_heads)
    of_heads = torch.cat([query_H, key_G, scale_H.new_ones(value_heads)])
    factors: dict[Tensor, Tensor] = {attention.Wqkv.weight: of_heads.repeat_interleave(attention.head_width)}
    if attention.Wqkv.bias is not None:
        factors[attention.Wqkv.bias] = factors[attention.Wqkv.weight]
    return factors
