"""The router: scores experts for each token, selects K of them, and holds the bias that balances them.

It replaces MegaBlocks' router, which takes the softmax in the input's precision, keeps logits and scores in
module-level lists until they are cleared, and has no loss-free balancing.

Shapes: B batch, T tokens, D model, E experts, K experts per token, L layers.
"""

# ruff: noqa: N815  (shape suffixes)

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model.router_noise import uniform_noise
from train.recipe.schema import Balance, Moe


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
        biased = moe.balance is Balance.bias
        bias_E = torch.zeros(moe.experts, dtype=torch.float32, device=device) if biased else None
        self.register_buffer("expert_bias", bias_E)
        self.jitter: Jitter | None = None

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes tokens. The bias affects only which experts are selected; weights are unbiased scores."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            if self.training and self.moe.jitter_eps > 0:
                x_TD = x_TD * (1.0 + self.moe.jitter_eps * (2.0 * self._noise(x_TD) - 1.0))
            logits_TE = functional.linear(x_TD, self.layer.weight.to(x_TD.dtype))
            scores_TE = logits_TE.softmax(dim=-1)
            if self.expert_bias is None:
                weights_TK, experts_TK = scores_TE.topk(self.moe.top_k, dim=-1)
            else:
                experts_TK = (scores_TE.detach() + self.expert_bias).topk(self.moe.top_k, dim=-1).indices
                weights_TK = scores_TE.gather(-1, experts_TK)
            if self.moe.normalize_weights_p is not None:
                norm_T1 = torch.linalg.vector_norm(
                    weights_TK, ord=self.moe.normalize_weights_p, dim=-1, keepdim=True
                )
                weights_TK = weights_TK / norm_T1
            return Routing(logits_TE, scores_TE, weights_TK, experts_TK)

    def _noise(self, x_TD: Tensor) -> Tensor:
        """Noise in [0, 1), from the positions in training if known, else from torch's generator."""
        if self.jitter is None:
            return torch.rand_like(x_TD)
        tokens, width = x_TD.shape
        return uniform_noise(self.jitter.positions_B, tokens, width, self.jitter.key).to(x_TD.dtype)


@torch.no_grad()
def update_bias(model: nn.Module, total_counts_LE: Tensor, rate: float) -> None:
    """Updates the routers' bias, once per optimizer step: loss-free balancing (DeepSeek-V3, section 2.1.2).

    Raises the bias of experts below their layer's mean load, and lowers it for those above.

    Args:
        model: a model with L MoE layers, balanced by bias.
        total_counts_LE: tokens per expert in the whole batch, over microbatches and ranks.
        rate: size of the update, ``bias_update_rate``.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, counts_E in zip(routers, total_counts_LE, strict=True):
        assert router.expert_bias is not None, "only a router balanced by bias has one"
        tokens_E = counts_E.to(router.expert_bias)
        router.expert_bias += rate * torch.sign(tokens_E.mean() - tokens_E)
