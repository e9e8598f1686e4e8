"""The mixture-of-experts layer: MegaBlocks' dMoE with our own router (:mod:`train.model.router`).

MegaBlocks permutes tokens; their exchange between ranks (:mod:`train.model.exchange`) and the experts'
products (:mod:`train.model.experts`) are ours.

Shapes: B batch, S sequence, T = B x S tokens, D model, F hidden, L layers, E experts, K experts per token.
"""

# ruff: noqa: N815  (shape suffixes)

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model import megablocks_ops
from train.model.context import Context
from train.model.recompute import remade
from train.model.router import Router, Routing
from train.model.shared_expert import SharedExpert
from train.recipe.errors import UserError
from train.recipe.schema import Balance, BalanceScope, Moe, Recompute, Score

megablocks_ops.install()

from megablocks.layers.arguments import Arguments  # noqa: E402  (needs the modules that install provides)
from megablocks.layers.dmoe import dMoE  # noqa: E402

from train.model.exchange import Deliverable, ExchangingExperts  # noqa: E402
from train.model.experts import Experts  # noqa: E402


class MoEAux(NamedTuple):
    """The parts of a layer's losses, returned with its output; nothing is kept on the module."""

    mean_score_E: Tensor
    """fp32: each expert's score, averaged over the tokens, sigmoids as shares of their sum (DeepSeek-V3, eq.
    19); carries the balance loss's gradient."""
    z_loss: Tensor
    """Scalar, fp32, unweighted: mean of the squared log-sum-exp of the router's logits."""
    expert_tokens_E: Tensor
    """int64: tokens per expert in this call, on this rank; sums to T x K."""
    sequence_balance: Tensor | None
    """Scalar, fp32, unweighted: see :func:`sequence_balance`; None for other balance scopes."""


class Sent(NamedTuple):
    """Part of a microbatch, routed and on its way to its experts."""

    shipment: Deliverable
    shared_BSD: Tensor | None
    """The shared expert's output."""
    aux: MoEAux


class MoE(dMoE):
    """MegaBlocks' dropless MoE of GLU experts, named as in Hugging Face's DBRX.

    Expert weights are ``experts.mlp.{w1,v1,w2}``, each [E x F, D]; those of a shared expert and of its gate
    ``shared.{w1,v1,w2}.weight`` and ``shared_gate.weight``. They are created uninitialised;
    :func:`train.model.init.initialize` fills them. ``sequence_T`` numbers the sequences that the tokens of a
    microbatch belong to, for the balance loss of each sequence, and is set before each; None: the rows.
    ``first_B`` is the number of each whole row's first, and ``context`` are the ranks that share these rows.

    Args:
        d_model: width D.
        ffn_hidden_size: hidden size F of one expert, unless the recipe's experts have their own.
        moe: the recipe's settings.
        device: where weights are created; ``meta`` allocates nothing.
    """

    def __init__(
        self, d_model: int, ffn_hidden_size: int, moe: Moe, device: torch.device | str | None = None
    ) -> None:
        of_experts = moe.expert_hidden_size is not None
        ffn_hidden_size = moe.expert_hidden_size or ffn_hidden_size
        if moe.experts * ffn_hidden_size < 128:
            name = "expert_hidden_size" if of_experts else "ffn_hidden_size"
            raise UserError(
                f"MegaBlocks needs experts x {name} of at least 128",
                key=f"model.{'moe.' if of_experts else ''}{name}",
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
        self.sequence_T: Tensor | None = None
        self.first_B: Tensor | None = None
        self.context: Context | None = None
        self.shared = self.shared_gate = None
        if moe.shared_hidden_size is not None:
            self.shared = SharedExpert(d_model, moe.shared_hidden_size, device)
            if moe.shared_gate:
                self.shared_gate = nn.Linear(d_model, 1, bias=False, device=device)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, MoEAux]:
        """Runs every token through its K experts.

        Returns:
            The output [B, S, D], in autocast's precision if autocast is on, and what the layer's losses
            are made of.
        """
        routing, x_BSD = self._route(x_BSD)
        out_BSD = self.experts(x_BSD, routing.scores_TE, routing.weights_TK, routing.experts_TK)
        shared_BSD = self._shared(x_BSD)
        if shared_BSD is not None:
            out_BSD = out_BSD + shared_BSD
        return out_BSD, self._aux(routing, x_BSD.shape[0])

    def send(self, x_BSD: Tensor, rows: slice) -> Sent:
        """Routes some of a microbatch's sequences, and sends their tokens to their experts' ranks.

        Args:
            x_BSD: the tokens.
            rows: which sequences of the microbatch they are.
        """
        routing, x_BSD = self._route(x_BSD, rows)
        shipment = self.experts.send(x_BSD.flatten(0, 1), routing.weights_TK, routing.experts_TK)
        return Sent(shipment, self._shared(x_BSD), self._aux(routing, x_BSD.shape[0], rows))

    def receive(self, parts: list[Sent]) -> tuple[list[Tensor], MoEAux]:
        """Runs the tokens that were sent through their experts; the parts are of equal size.

        Returns:
            Each part's output [T, D], and what the layer's losses are made of, over all parts.
        """
        outs = self.experts(*(part.shipment for part in parts))
        for place, part in enumerate(parts):
            if part.shared_BSD is not None:
                outs[place] = outs[place] + part.shared_BSD.flatten(0, 1)
        means, z_losses, tokens, of_sequences = zip(*(part.aux for part in parts), strict=True)
        return outs, MoEAux(
            torch.stack(means).mean(dim=0),
            torch.stack(z_losses).mean(),
            torch.stack(tokens).sum(dim=0),
            None if of_sequences[0] is None else torch.stack(of_sequences).mean(),
        )

    def _init_experts_mlp(self, args: Arguments) -> ExchangingExperts:
        return ExchangingExperts(args)

    def _route(self, x_BSD: Tensor, rows: slice = slice(None)) -> tuple[Routing, Tensor]:
        """Returns the router's decision, and the tokens in the experts' precision."""
        routing = self.router(x_BSD.flatten(0, 1), rows)
        device = x_BSD.device.type
        if torch.is_autocast_enabled(device):
            # Cast before the permutation, which then moves half the bytes.
            x_BSD = remade(Recompute.elementwise, Tensor.to, x_BSD, torch.get_autocast_dtype(device))
        return routing, x_BSD

    def _shared(self, x_BSD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        shared_BSD: Tensor = self.shared(x_BSD)
        return shared_BSD if self.shared_gate is None else self.shared_gate(x_BSD).sigmoid() * shared_BSD

    def _aux(self, routing: Routing, batch: int, rows: slice = slice(None)) -> MoEAux:
        """Returns what the layer's losses are made of, of these rows of the microbatch."""
        moe = self.router.moe
        tokens_E = megablocks_ops.histogram(routing.experts_TK.flatten(), moe.experts).long()
        z_loss = torch.logsumexp(routing.logits_TE, dim=-1).square().mean()
        probabilities_TE = routing.scores_TE
        if moe.score is Score.sigmoid:
            probabilities_TE = probabilities_TE / probabilities_TE.sum(dim=-1, keepdim=True)
        of_sequences = None
        if self.training and by_sequence(moe):
            sequence_T = self.sequence_T
            if sequence_T is None:
                numbers_B = torch.arange(batch, device=tokens_E.device)
                sequence_T = numbers_B.repeat_interleave(len(probabilities_TE) // batch)
            else:
                assert self.first_B is not None
                sequence_T = sequence_T.view(-1, len(probabilities_TE) // batch)[rows].flatten()
                sequence_T = sequence_T - self.first_B[rows][0]  # of the whole row, if ranks share it
            of_sequences = sequence_balance(probabilities_TE, moe.top_k, sequence_T, self.context)
        return MoEAux(probabilities_TE.mean(dim=0), z_loss, tokens_E, of_sequences)


def by_sequence(moe: Moe) -> bool:
    """Returns whether the balance loss is that of each sequence."""
    return moe.balance is not Balance.bias and moe.balance_scope is BalanceScope.sequence


def sequence_balance(
    probabilities_TE: Tensor, top_k: int, sequence_T: Tensor, context: Context | None = None
) -> Tensor:
    """The balance loss of each sequence, averaged over tokens (DeepSeek-V3, eq. 17-20, unweighted).

    A sequence's loss is E x sum over experts of (share of its K x tokens highest scores) x (mean score); 1 if
    both are even. Weighted by the sequence's tokens it is a sum over tokens, each multiplied by the shares of
    its sequence: so the mean over microbatches and ranks is that of the global batch, however that is split
    or packed.

    Args:
        probabilities_TE: scores that add up to 1 for each token; they carry the gradient.
        top_k: K.
        sequence_T: int64, from 0 to at most T - 1: each token's sequence, counted over all ranks' T.
        context: the ranks that share the sequences; None: no others.

    Returns:
        A scalar in the scores' precision.
    """
    tokens, experts = probabilities_TE.shape
    with torch.no_grad():
        highest_TK = probabilities_TE.topk(top_k, dim=-1).indices
        places = (sequence_T[:, None] * experts + highest_TK).flatten()
        sequences = tokens * (1 if context is None else context.ranks)
        counts_NE = megablocks_ops.histogram(places, sequences * experts).view(sequences, experts)
        if context is not None:
            counts_NE = context.sum(counts_NE)
        # Every token has counted K experts.
        lengths_N = counts_NE.sum(dim=1) // top_k
        shares_TE = counts_NE[sequence_T].to(probabilities_TE) / (top_k * lengths_N[sequence_T, None])
    return experts / tokens * (shares_TE * probabilities_TE).sum()


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
