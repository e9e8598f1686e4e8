"""Multi-head latent attention: keys and values of all heads come from one narrow vector per token.

DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1). That vector and one key per token that has
its position for all heads, are all that generation keeps: of DeepSeek-V3 576 elements per token and layer,
in place of 40,960 of keys and values.

Shapes: B batch, S new positions, P past positions, T = B x S tokens, D model, H heads, C width of the vector
of keys and values, N elements of a query or key without position, W elements that RoPE rotates, R = N + W,
V elements of a value, O = N + V.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model.attention import (
    AttentionPlan,
    KeyValue,
    block_attention,
    document_attention,
    dot_product_attention,
    rotate,
    within,
    yarn_scale,
)
from train.model.largest_logits import LargestLogits
from train.model.norms import RmsNorm
from train.model.recompute import remade
from train.recipe import sizes
from train.recipe.schema import Model, Recompute


class LatentAttention(nn.Module):
    """Latent attention of one layer. Rows of the weights are those of DeepSeek-V3 in Hugging Face.

    Of the grades of recomputation, `gates` makes heads again from the narrow vectors (DeepSeek-V3, section
    3.2.3).
    """

    def __init__(self, model: Model, device: torch.device | str | None = None) -> None:
        super().__init__()
        assert model.latent is not None
        self.heads, self.latent = model.n_heads, model.latent
        self.scale = sizes.head_width(model) ** -0.5
        if model.yarn is not None:  # DeepSeek scales queries and keys as a whole, not only where they turn
            self.scale *= yarn_scale(model.yarn) ** 2
        latent, queries = model.latent, sizes.query_width(model)
        if latent.q_rank is None:
            self.q_proj = nn.Linear(model.d_model, queries, bias=False, device=device)
        else:
            self.q_a_proj = nn.Linear(model.d_model, latent.q_rank, bias=False, device=device)
            self.q_a_norm = RmsNorm(latent.q_rank, eps=model.norm_eps, device=device)
            self.q_b_proj = nn.Linear(latent.q_rank, queries, bias=False, device=device)
        shared, heads = (
            latent.kv_rank + latent.rope_width,
            model.n_heads * (latent.nope_width + latent.v_width),
        )
        self.kv_a_proj = nn.Linear(model.d_model, shared, bias=False, device=device)
        self.kv_a_norm = RmsNorm(latent.kv_rank, eps=model.norm_eps, device=device)
        self.kv_b_proj = nn.Linear(latent.kv_rank, heads, bias=False, device=device)
        self.out_proj = nn.Linear(sizes.attended_width(model), model.d_model, bias=False, device=device)
        self.logits: LargestLogits | None = None
        """Watches the logits of plans that have a `sight`."""

    def forward(
        self, x_BSD: Tensor, plan: AttentionPlan, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attends from the new positions to the past ones and themselves.

        Returns:
            The output [B, S, D], and for later calls of all positions the vectors [B, 1, P + S, C] and the
            rotated keys [B, 1, P + S, W].
        """
        turns = (plan.cos_SR, plan.sin_SR)
        source = x_BSD
        if self.latent.q_rank is not None:
            source = remade(Recompute.elementwise, self._norm, self.q_a_norm, self.q_a_proj(x_BSD))
        c_BSC, k_BSW = remade(Recompute.elementwise, self._compress, self.kv_a_proj(x_BSD), *turns)
        kept = (c_BSC.unsqueeze(1), k_BSW.unsqueeze(1))
        if past is not None:
            kept = (torch.cat([past[0], kept[0]], dim=2), torch.cat([past[1], kept[1]], dim=2))
            out_BSHV = self._attend_to_kept(self._queries(self._project(source), *turns), *kept, plan.bias)
        else:
            if plan.context is not None:
                c_BSC, k_BSW = _of_whole(c_BSC, k_BSW, plan)
            q_BSHR, k_BSHR, v_BSHR = remade(Recompute.gates, self._heads, source, c_BSC, k_BSW, *turns)
            if self.logits is not None and plan.sight is not None:
                if plan.reach is None:
                    self.logits.see(q_BSHR, k_BSHR, plan.sight, self.scale)
                else:
                    self.logits.see_reach(q_BSHR, k_BSHR, plan.sight, plan.reach, self.scale)
            out_BSHV = self._attend(q_BSHR, k_BSHR, v_BSHR, plan)[..., : self.latent.v_width]
        return self.out_proj(out_BSHV.flatten(2)), kept

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        normed: Tensor = norm(x)
        return normed.to(x.dtype)

    def _compress(
        self, latent_BSL: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns what keys and values are made of, and the key that all heads share."""
        c_BSC, k_BSW = latent_BSL.split([self.latent.kv_rank, self.latent.rope_width], dim=-1)
        return self._norm(self.kv_a_norm, c_BSC), _rotate_pairs(k_BSW.unsqueeze(2), cos_SR, sin_SR).squeeze(2)

    def _project(self, source: Tensor) -> Tensor:
        """Returns queries that are not rotated, [B, S, H, R]."""
        projection = self.q_proj if self.latent.q_rank is None else self.q_b_proj
        q: Tensor = projection(source).unflatten(-1, (self.heads, -1))
        return q

    def _queries(self, q_BSHR: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None) -> Tensor:
        q_BSHN, q_BSHW = q_BSHR.split([self.latent.nope_width, self.latent.rope_width], dim=-1)
        return torch.cat([q_BSHN, _rotate_pairs(q_BSHW, cos_SR, sin_SR)], dim=-1)

    def _heads(
        self, source: Tensor, c_BSC: Tensor, k_BSW: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of all heads, each [B, S, H, R]; where ranks share sequences, keys
        and values of more tokens than queries.
        """
        kv_BSHO = self.kv_b_proj(c_BSC).unflatten(-1, (self.heads, -1))
        heads: tuple[Tensor, Tensor, Tensor] = remade(
            Recompute.elementwise, self._join, self._project(source), kv_BSHO, k_BSW, cos_SR, sin_SR
        )
        return heads

    def _join(
        self, q_BSHR: Tensor, kv_BSHO: Tensor, k_BSW: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotates queries, gives the shared key to each head, and pads values with zeros.

        Fused kernels take values that are as wide as keys, and others cost more than zeros do.
        """
        latent = self.latent
        k_BSHN, v_BSHV = kv_BSHO.split([latent.nope_width, latent.v_width], dim=-1)
        k_BSHR = torch.cat([k_BSHN, k_BSW.unsqueeze(2).expand(-1, -1, self.heads, -1)], dim=-1)
        q_BSHR = self._queries(q_BSHR, cos_SR, sin_SR)
        # A view would keep all of kv alive until the backward pass.
        v_BSHR = functional.pad(v_BSHV, (0, q_BSHR.shape[-1] - latent.v_width)).contiguous()
        return q_BSHR, k_BSHR, v_BSHR

    def _attend(self, q_BSHR: Tensor, k_BSHR: Tensor, v_BSHR: Tensor, plan: AttentionPlan) -> Tensor:
        """Returns what each head found, [B, S, H, R]."""
        if plan.documents is not None:
            q_THR, k_THR, v_THR = (part.flatten(0, 1) for part in (q_BSHR, k_BSHR, v_BSHR))
            keys = None if plan.reach is None else plan.reach.keys
            out_THR = document_attention(q_THR, k_THR, v_THR, *plan.documents, self.scale, keys)
            return out_THR.view_as(q_BSHR)
        q, k, v = (part.transpose(1, 2) for part in (q_BSHR, k_BSHR, v_BSHR))
        if plan.blocks is not None:
            return block_attention(q, k, v, plan.blocks, self.scale).transpose(1, 2)
        return dot_product_attention(q, k, v, plan.bias, plan.bias is None, self.scale).transpose(1, 2)

    def _attend_to_kept(self, q_BSHR: Tensor, c_B1PC: Tensor, k_B1PW: Tensor, bias: Tensor | None) -> Tensor:
        """Attends to past positions as they are kept, without making their keys and values: [B, S, H, V].

        The products that would make them are done to the queries and to what attention returns instead
        (DeepSeek-V2, section 2.1.2): all heads share one key, and its first C elements are the value.
        """
        latent = self.latent
        up_HOC = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        k_HNC, v_HVC = up_HOC.split([latent.nope_width, latent.v_width], dim=1)
        q_BSHN, q_BSHW = q_BSHR.split([latent.nope_width, latent.rope_width], dim=-1)
        q_BHSC = torch.einsum("bshn,hnc->bhsc", q_BSHN, k_HNC)
        q_BHSL = torch.cat([q_BHSC, q_BSHW.transpose(1, 2)], dim=-1)
        kept_B1PL = torch.cat([c_B1PC, k_B1PW], dim=-1)
        if bias is not None:
            bias = bias.expand(-1, self.heads, -1, -1).flatten(1, 2).unsqueeze(1)
        # The heads of a token are queries of one head.
        found_B1QL = dot_product_attention(
            q_BHSL.flatten(1, 2).unsqueeze(1), kept_B1PL, kept_B1PL, bias, False, self.scale
        )
        found_BHSC = found_B1QL[..., : latent.kv_rank].unflatten(2, (self.heads, -1)).squeeze(1)
        return torch.einsum("bhsc,hvc->bshv", found_BHSC, v_HVC)


def _of_whole(c_BSC: Tensor, k_BSW: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Gathers vectors and rotated keys of whole sequences, few as they are, of which every rank makes heads.

    Returns:
        [B, P, C] and [B, P, W], P tokens of a whole sequence; or with B = 1, one after the other, those that
        the documents of this rank's tokens reach, if they are attended to one by one.
    """
    assert plan.context is not None
    whole = plan.context.gather(c_BSC.unsqueeze(2), k_BSW.unsqueeze(2))
    if plan.reach is not None:
        c_P1C, k_P1W = (within(part, plan.reach) for part in whole)
        return c_P1C.movedim(1, 0), k_P1W.movedim(1, 0)
    return whole[0].squeeze(2), whole[1].squeeze(2)


def _rotate_pairs(x_BSHW: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None) -> Tensor:
    """Rotates each pair of neighbours by its position's angle, and puts first what was first in each pair.

    DeepSeek's weights have the two of a pair side by side. The order makes no difference to products of
    queries and keys.
    """
    assert cos_SR is not None and sin_SR is not None, "latent attention has RoPE"
    by_place = x_BSHW.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return rotate(by_place, cos_SR, sin_SR)
