"""The mixture-of-experts layer: MegaBlocks' dMoE with our own router (:mod:`train.model.router`).

MegaBlocks permutes tokens and exchanges them between ranks; the experts' products are ours
(:mod:`train.model.experts`).

Shapes: B batch, S sequence, T = B x S tokens, D model, F hidden, L layers, E experts, K experts per token.
"""

# ruff: noqa: N815  (shape suffixes)

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from train.model import megablocks_ops
from train.model.router import Router
from train.recipe.errors import UserError
from train.recipe.schema import Moe

megablocks_ops.install()

from megablocks.layers.arguments import Arguments  # noqa: E402  (needs the modules that install provides)
from megablocks.layers.dmoe import dMoE  # noqa: E402

from train.model.experts import Experts  # noqa: E402


class MoEAux(NamedTuple):
    """What a layer's losses are made of, returned with its output; nothing is kept on the module."""

    mean_score_E: Tensor
    """fp32: each expert's score, averaged over the tokens; carries the balance loss's gradient."""
    z_loss: Tensor
    """Scalar, fp32, unweighted: mean of the squared log-sum-exp of the router's logits."""
    expert_tokens_E: Tensor
    """int64: tokens per expert in this call, on this rank; sums to T x K."""


class MoE(dMoE):
    """MegaBlocks' dropless MoE of GLU experts, named as in Hugging Face's DBRX.

    Expert weights are ``experts.mlp.{w1,v1,w2}``, each [E x F, D]. They are created uninitialised;
    :func:`train.model.init.initialize` fills them.

    Args:
        d_model: width D.
        ffn_hidden_size: hidden size F of one expert.
        moe: the recipe's settings.
        device: where weights are created; ``meta`` allocates nothing.
    """

    def __init__(
        self, d_model: int, ffn_hidden_size: int, moe: Moe, device: torch.device | str | None = None
    ) -> None:
        if moe.experts * ffn_hidden_size < 128:
            raise UserError(
                "MegaBlocks needs experts x ffn_hidden_size of at least 128",
                key="model.ffn_hidden_size",
                remedy=f"set it to at least {-(-128 // moe.experts)}",
            )
        # MegaBlocks initialises full weight matrices several times while it is built: on meta this is free.
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
            init_method=_skip_init,
            output_layer_init_method=_skip_init,
        )
        super().__init__(args)
        self.experts.mlp = Experts(args)
        target = torch.device(device) if device is not None else torch.get_default_device()
        self.experts.to_empty(device=target)
        args.device = target
        self.router = Router(d_model, moe, device)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, MoEAux]:
        """Runs every token through its K experts.

        Returns:
            The output [B, S, D], in autocast's precision if autocast is on, and what the layer's losses
            are made of.
        """
        routing = self.router(x_BSD.reshape(-1, x_BSD.shape[-1]))
        device = x_BSD.device.type
        if torch.is_autocast_enabled(device):
            # Cast before the permutation, which then moves half the bytes.
            x_BSD = x_BSD.to(torch.get_autocast_dtype(device))
        out_BSD = self.experts(x_BSD, routing.scores_TE, routing.weights_TK, routing.experts_TK)
        tokens_E = megablocks_ops.histogram(routing.experts_TK.flatten(), self.router.moe.experts).long()
        z_loss = torch.logsumexp(routing.logits_TE, dim=-1).square().mean()
        return out_BSD, MoEAux(routing.scores_TE.mean(dim=0), z_loss, tokens_E)


def balance_loss(mean_scores_LE: Tensor, expert_tokens_LE: Tensor) -> Tensor:
    """E x sum over experts of (share of the T x K choices) x (mean score), averaged over the layers.

    Fedus et al. 2021, eq. 4. Scalar in the scores' precision, unweighted; 0 without MoE layers. The counts
    may be those of more tokens than the scores are.
    """
    layers, experts = mean_scores_LE.shape
    if layers == 0:
        return mean_scores_LE.new_zeros(())
    share_LE = expert_tokens_LE / expert_tokens_LE.sum(dim=1, keepdim=True)
    return experts * (share_LE.to(mean_scores_LE.dtype) * mean_scores_LE).sum(dim=1).mean()


def _skip_init(_weight: Tensor) -> None:
    """Does nothing, in place of MegaBlocks' initialisation."""
