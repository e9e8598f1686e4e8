"""The mixture-of-experts layer: MegaBlocks' dMoE with a router of our own.

MegaBlocks permutes tokens, runs the experts and, across ranks, exchanges tokens. The router is ours, because
MegaBlocks' takes the softmax in the input's precision, keeps logits and scores in module-level lists
until somebody clears them, and knows no balancing without a loss.

Shapes: B batch, S sequence, T = B x S tokens, D model, F hidden, E experts, K experts per token.
"""

# ruff: noqa: N815  (shape suffixes)

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model import megablocks_ops
from train.model.router_noise import uniform_noise
from train.recipe.errors import UserError
from train.recipe.schema import Balance, Moe

megablocks_ops.install()

from megablocks.layers.arguments import Arguments  # noqa: E402  (needs the leaf operations)
from megablocks.layers.dmoe import dMoE  # noqa: E402


class MoEAux(NamedTuple):
    """What a layer tells beside its output; nothing of it outlives the step."""

    balance_loss: Tensor
    """Scalar, fp32, not weighted: E x sum over experts of (share of the choices) x (mean score)."""
    z_loss: Tensor
    """Scalar, fp32, not weighted: mean of the squared log-sum-exp of the router's logits."""
    expert_tokens_E: Tensor
    """int64: choices of each expert in this call, on this rank; sums to T x K."""


class Routing(NamedTuple):
    """The router's decision."""

    logits_TE: Tensor
    scores_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


class Jitter(NamedTuple):
    """What the router's noise is drawn for; set before each microbatch."""

    seed: int
    layer: int
    positions_B: Tensor


class Router(nn.Module):
    """Scores experts for each token and picks K of them, in fp32 whatever the surrounding precision.

    Args:
        d_model: width D of a token.
        moe: the recipe's settings.
        device: where the weights are made; ``meta`` allocates nothing.
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
        """Routes tokens. The bias moves the choice alone; weights come from the unbiased scores."""
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
        """Uniform in [0, 1): by place in training where that is known, else from torch's generator."""
        if self.jitter is None:
            return torch.rand_like(x_TD)
        seed, layer, positions_B = self.jitter
        return uniform_noise(positions_B, *x_TD.shape, seed=seed, layer=layer).to(x_TD.dtype)


class MoE(dMoE):
    """MegaBlocks' dropless MoE of GLU experts, named as in Hugging Face's DBRX.

    Expert weights are ``experts.mlp.{w1,v1,w2}``, each [E x F, D]. They are made uninitialised;
    :func:`train.model.init.initialize` fills them.

    Args:
        d_model: width D.
        ffn_hidden_size: hidden size F of one expert.
        moe: the recipe's settings.
        device: where weights are made; ``meta`` allocates nothing.
    """

    reduce_counts: Callable[[Tensor], Tensor] | None
    """A layout's sum of ``expert_tokens_E`` over its ranks, so that the balance loss sees the whole batch."""

    def __init__(
        self, d_model: int, ffn_hidden_size: int, moe: Moe, device: torch.device | str | None = None
    ) -> None:
        if moe.experts * ffn_hidden_size < 128:
            raise UserError(
                "MegaBlocks needs experts x ffn_hidden_size of at least 128",
                key="model.ffn_hidden_size",
                remedy=f"set it to at least {-(-128 // moe.experts)}",
            )
        # MegaBlocks draws whole weight matrices more than once while it is built: let it draw on meta.
        args = Arguments(
            hidden_size=d_model,
            ffn_hidden_size=ffn_hidden_size,
            bias=False,
            return_bias=False,
            activation_fn=functional.silu,
            moe_num_experts=moe.experts,
            moe_top_k=moe.top_k,
            moe_loss_weight=0.0,
            memory_optimized_mlp=True,
            mlp_type="glu",
            mlp_impl="grouped",
            fp16=False,
            device=torch.device("meta"),
            init_method=_leave,
            output_layer_init_method=_leave,
        )
        super().__init__(args)
        target = torch.device(device) if device is not None else torch.get_default_device()
        self.experts.to_empty(device=target)
        args.device = target
        self.router = Router(d_model, moe, device)
        self.reduce_counts = None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, MoEAux]:
        """Runs every token through its K experts.

        Returns:
            The output [B, S, D], in autocast's precision where autocast is on, and what the trainer needs.
        """
        routing = self.router(x_BSD.reshape(-1, x_BSD.shape[-1]))
        device = x_BSD.device.type
        if torch.is_autocast_enabled(device):
            # Before the permutation, which then moves half the bytes.
            x_BSD = x_BSD.to(torch.get_autocast_dtype(device))
        out_BSD = self.experts(x_BSD, routing.scores_TE, routing.weights_TK, routing.experts_TK)
        tokens_E = torch.bincount(routing.experts_TK.flatten(), minlength=self.router.moe.experts)
        return out_BSD, MoEAux(*self._losses(routing, tokens_E), tokens_E)

    def _losses(self, routing: Routing, tokens_E: Tensor) -> tuple[Tensor, Tensor]:
        """Balance loss (Fedus et al. 2021, eq. 4, with shares of all T x K choices) and z-loss."""
        if self.reduce_counts is not None:
            tokens_E = self.reduce_counts(tokens_E)
        share_E = tokens_E / tokens_E.sum()
        mean_score_E = routing.scores_TE.mean(dim=0)
        balance_loss = share_E.numel() * torch.dot(share_E.to(mean_score_E.dtype), mean_score_E)
        z_loss = torch.logsumexp(routing.logits_TE, dim=-1).square().mean()
        return balance_loss, z_loss


@torch.no_grad()
def update_bias(model: nn.Module, total_counts_LE: Tensor, rate: float) -> None:
    """Balances experts without a loss (DeepSeek-V3, section 2.1.2), once per optimizer step.

    Experts below their layer's mean load get a higher bias, experts above it a lower one.

    Args:
        model: a model with L layers of :class:`MoE`, balanced by bias.
        total_counts_LE: choices of each expert in the whole batch, over microbatches and ranks.
        rate: the step, ``bias_update_rate``.
    """
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    for router, counts_E in zip(routers, total_counts_LE, strict=True):
        assert router.expert_bias is not None, "only a router balanced by bias has one"
        tokens_E = counts_E.to(router.expert_bias)
        router.expert_bias += rate * torch.sign(tokens_E.mean() - tokens_E)


def _leave(_weight: Tensor) -> None:
    """MegaBlocks' initialisation: none."""
