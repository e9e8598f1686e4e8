"""Decoding with a key-value cache: each position's keys and values are computed once.

Prompts of unequal length are left-padded, and the padding is masked. Positions count from the left edge of
the batch, which makes no difference to relative positions (RoPE, ALiBi).

Shapes: B sequences, S new positions, P past positions, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from train.model.attention import AttentionPlan, KeyValue, plan_attention
from train.model.decoder import Block, Decoder

PADDING = -1
"""Marks a padded position."""


class CachedDecoder:
    """A decoder with a batch of sequences, fed in pieces.

    Args:
        decoder: whole on one device.
        use_cache: False recomputes everything at each call, for comparison.
    """

    def __init__(self, decoder: Decoder, *, use_cache: bool = True) -> None:
        self.decoder = decoder.eval()
        self.use_cache = use_cache
        self.tokens_BN: Tensor | None = None
        """All tokens so far, PADDING to the left of a short prompt."""
        self._past: list[KeyValue] | None = None

    @torch.no_grad()
    def feed(self, new_BS: Tensor) -> Tensor:
        """Returns the logits [B, V] of the token after the new ones.

        Args:
            new_BS: tokens that continue those fed before; PADDING only on the left of the first piece.
        """
        assert self.tokens_BN is None or (new_BS != PADDING).all()
        self.tokens_BN = new_BS if self.tokens_BN is None else torch.cat([self.tokens_BN, new_BS], dim=1)
        if not self.use_cache:
            new_BS, self._past = self.tokens_BN, None
        batch, length = new_BS.shape
        past_length = 0 if self._past is None else self._past[0][0].shape[2]
        transformer = self.decoder.transformer
        x_BSD = transformer.wte(new_BS.clamp(min=0))
        device = x_BSD.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else x_BSD.dtype
        plan = plan_attention(
            self.decoder.cfg, batch, length, device=device, dtype=dtype, past_length=past_length
        )
        plan = hide_padding(plan, (self.tokens_BN == PADDING).sum(dim=1), past_length, length, dtype)
        fresh: list[KeyValue] = []
        for i, block in enumerate(transformer.blocks):
            assert isinstance(block, Block)
            half = block.norm_attn_norm
            past = None if self._past is None else self._past[i]
            attended_BSD, key_value = half.attn(half.norm_1(x_BSD), plan, past)
            x_BSD = x_BSD + attended_BSD
            x_BSD = x_BSD + block.ffn(half.norm_2(x_BSD))[0]
            fresh.append(key_value)
        self._past = fresh if self.use_cache else None
        last_BD = transformer.norm_f(x_BSD[:, -1])
        head = self.decoder.lm_head
        weight_VD = transformer.wte.weight if head is None else head.weight
        assert isinstance(weight_VD, Tensor)
        return torch.nn.functional.linear(last_BD, weight_VD)


def hide_padding(
    plan: AttentionPlan, padding_B: Tensor, past_length: int, length: int, dtype: torch.dtype
) -> AttentionPlan:
    """Masks padding for all positions except padding itself, as a fully masked row would be NaN."""
    if not padding_B.any():
        return plan
    device = padding_B.device
    query_S = torch.arange(past_length, past_length + length, device=device)
    key_P = torch.arange(past_length + length, device=device)
    bias = plan.bias
    if bias is None:
        unseen_SP = key_P[None, :] > query_S[:, None]
        bias = torch.zeros(unseen_SP.shape, dtype=dtype, device=device)
        bias = bias.masked_fill(unseen_SP, -math.inf)[None, None]
    padded_BP = key_P[None, :] < padding_B[:, None]
    hidden_BSP = padded_BP[:, None, :] & (key_P[None, :] != query_S[:, None])[None]
    return plan._replace(bias=bias.masked_fill(hidden_BSP[:, None], -math.inf))


def flush_right(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Left-pads prompts to one tensor [B, S]."""
    length = max(len(prompt) for prompt in prompts)
    rows = [[PADDING] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device)
