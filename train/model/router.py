"""The router: scores experts for each token, selects K of them, and holds the bias that balances them.

It replaces MegaBlocks' router, which takes the softmax in the input's precision, keeps logits and scores in
module-level lists until they are cleared, and has no loss-free balancing.

Shapes: B batch, T tokens, D model, E experts, K experts per token, L layers, G groups of N experts, M of them
per token.
"""

# ruff: noqa: N815  (shape suffixes)

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model.recompute import remade
from train.model.router_noise import uniform_noise
from train.recipe.schema import Balance, GroupScore, Moe, Recompute, Score

LEAST_NORM = 1e-20
"""Added to the norm of sigmoid weights, all of which may be too small to be divided by each other."""


class Routing(NamedTuple):
    """The router's decision."""

    logits_TE: Tensor
    scores_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


class Jitter(NamedTuple):
    """The key and positions from which the router's noise is drawn; set before each microbatch."""

    key: Tensor
    positions_B: Tensor
    place_S: Tensor | None = None
    """Places of the tokens in each sequence; None: they are whole."""


class Router(nn.Module):
    """Scores experts for each token and selects K of them, in fp32 whatever the surrounding precision.

    Args:
        d_model: width D of a token.
        moe: the recipe's settings.
        device: where the weights are created; ``meta`` allocates nothing.
    """

    expert_bias: Tensor | None

    def __init__(self, d_model: int, moe: Moe, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.moe = moe
        self.layer = nn.Linear(d_model, moe.experts, bias=False, device=device)
        biased = moe.balance is not Balance.loss
        bias_E = torch.zeros(moe.experts, dtype=torch.float32, device=device) if biased else None
        self.register_buffer("expert_bias", bias_E)
        self.jitter: Jitter | None = None

    def forward(self, x_TD: Tensor, rows: slice = slice(None)) -> Routing:
        """Routes tokens. The bias affects only which experts are selected; weights are unbiased scores.

        Args:
            x_TD: the tokens of whole sequences.
            rows: which sequences of the microbatch they are.
        """
        moe = self.moe
        with torch.autocast(x_TD.device.type, enabled=False):
            if not self.training or self.moe.jitter_eps == 0:
                x_TD = remade(Recompute.elementwise, _in_fp32, x_TD)
            elif self.jitter is not None:
                x_TD = remade(Recompute.elementwise, self._jittered, x_TD, rows)
            else:  # torch's generator would draw other noise the second time
                x_TD = self._jittered(x_TD, rows)
            logits_TE = functional.linear(x_TD, self.layer.weight.to(x_TD.dtype))
            scores_TE = logits_TE.softmax(dim=-1) if moe.score is Score.softmax else logits_TE.sigmoid()
            if self.expert_bias is None and moe.groups == 1 and not moe.forced_balance:
                weights_TK, experts_TK = scores_TE.topk(moe.top_k, dim=-1)
            else:
                experts_TK = self._select(scores_TE.detach())
                weights_TK = scores_TE.gather(-1, experts_TK)
            if moe.normalize_weights_p is not None:
                norm_T1 = torch.linalg.vector_norm(
                    weights_TK, ord=moe.normalize_weights_p, dim=-1, keepdim=True
                )
                if moe.score is Score.sigmoid:
                    norm_T1 = norm_T1 + LEAST_NORM
                weights_TK = weights_TK / norm_T1
            if moe.weight_scale != 1:
                weights_TK = weights_TK * moe.weight_scale
            return Routing(logits_TE, scores_TE, weights_TK, experts_TK)

    def _select(self, scores_TE: Tensor) -> Tensor:
        """Returns the experts of each token, [T, K]."""
        if self.moe.forced_balance:
            return deal_out(len(scores_TE), self.moe, scores_TE.device)
        choice_TE = self.biased(scores_TE)
        if self.moe.groups > 1:
            choice_TE = self.within_groups(choice_TE)
        return choice_TE.topk(self.moe.top_k, dim=-1).indices

    def biased(self, scores_TE: Tensor) -> Tensor:
        """Returns the scores by which experts are selected."""
        return scores_TE if self.expert_bias is None else scores_TE + self.expert_bias

    def within_groups(self, biased_TE: Tensor) -> Tensor:
        """Returns the scores with -inf for experts outside each token's best groups."""
        best_TM = self.group_scores(biased_TE).topk(self.moe.top_groups, dim=-1).indices
        biased_TGN = biased_TE.unflatten(-1, (self.moe.groups, -1))
        is_outside_TG = torch.ones_like(biased_TGN[..., 0], dtype=torch.bool).scatter(-1, best_TM, False)
        return biased_TGN.masked_fill(is_outside_TG[..., None], -math.inf).flatten(-2)

    def group_scores(self, biased_TE: Tensor) -> Tensor:
        """Returns the scores of the groups of experts, [T, G] (DeepSeek-V2, section 2.2.2; V3, 2.1.2)."""
        biased_TGN = biased_TE.unflatten(-1, (self.moe.groups, -1))
        if self.moe.group_score is GroupScore.max:
            return biased_TGN.amax(dim=-1)
        return biased_TGN.topk(2, dim=-1).values.sum(dim=-1)

    def _jittered(self, x_TD: Tensor, rows: slice) -> Tensor:
        x_TD = _in_fp32(x_TD)
        return x_TD * (1.0 + self.moe.jitter_eps * (2.0 * self._noise(x_TD, rows) - 1.0))

    def _noise(self, x_TD: Tensor, rows: slice) -> Tensor:
        """Noise in [0, 1), from the positions in training if known, else from torch's generator."""
        if self.jitter is None:
            return torch.rand_like(x_TD)
        tokens, width = x_TD.shape
        key, positions_B, place_S = self.jitter
        return uniform_noise(positions_B[rows], tokens, width, key, place_S).to(x_TD.dtype)


def deal_out(tokens: int, moe: Moe, device: torch.device) -> Tensor:
    """Returns the experts that `forced_balance` gives to tokens, int64 [T, K].

    Of any E consecutive tokens every expert gets K. A token's experts lie as far apart as they can, in
    `top_groups` groups of equal distance: as evenly over ranks as a router's choices would lie on average.
    """
    in_group, of_group = moe.experts // moe.groups, -(-moe.top_k // moe.top_groups)
    token_T1 = torch.arange(tokens, device=device)[:, None]
    turn_K = torch.arange(moe.top_k, device=device)
    group_K = turn_K % moe.top_groups * moe.groups // moe.top_groups
    member_K = turn_K // moe.top_groups * in_group // of_group
    group_TK = (token_T1 + group_K) % moe.groups
    return group_TK * in_group + (token_T1 // moe.groups + member_K) % in_group


def bias_step(moe: Moe) -> float:
    """Returns the change of the bias per optimizer step: `bias_update_rate`, relative to a score of 1/2.

    DeepSeek-V3 chose 0.001 for sigmoid scores, of which an untrained router's are 1/2. Softmax scores are 1/E
    on average: there the same change would be a larger part of a score the more experts there are.
    """
    mean_score = 1 / moe.experts if moe.score is Score.softmax else 0.5
    return moe.bias_update_rate * mean_score / 0.5


def _in_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def update_bias(model: nn.Module, total_counts_LE: Tensor, rate: float) -> None:
    """Updates the routers' bias, once per optimizer step: loss-free balancing (DeepSeek-V3, section 2.1.2).

    Raises the bias of experts below their layer's mean load, and lowers it for those above.

    Args:
        model: a model with L MoE layers, balanced by bias.
        total_counts_LE: tokens per expert in the whole batch, over microbatches and ranks.
        rate: size of the update, from :func:`bias_step`.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, counts_E in zip(routers, total_counts_LE, strict=True):
        assert router.expert_bias is not None, "only a router balanced by bias has one"
        tokens_E = counts_E.to(router.expert_bias)
        router.expert_bias += rate * torch.sign(tokens_E.mean() - tokens_E)
