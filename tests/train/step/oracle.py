"""Training steps in plain float64, written from the papers and the recipe's docstrings.

Nothing of train.model, train.layout, train.step or the loader is used: only the recipe's values, samples and
initial weights by name. So what all layouts share, and the parity gate therefore cannot see, is held to it.

Shapes: B sequences, S tokens, D model, H heads, G key-value heads, R head width, F hidden, E experts,
K experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from data.shards.packing import Sample
from train.recipe.schema import (
    Balance,
    BalanceScope,
    Ffn,
    LossMean,
    Norm,
    OptimizerKind,
    Position,
    Recipe,
    ScheduleKind,
)

NONE = -1
"""Target of a token that has none."""


@dataclass
class Sequences:
    """A global batch: tokens, documents and targets [B, S], of NONE where there is no target."""

    tokens: Tensor
    documents: Tensor
    targets: Tensor
    known: Tensor
    """Where a next token is known, target or not."""


@dataclass
class OracleFigures:
    """The results of one step; gradients before and after clipping."""

    language: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    mtp: float = 0.0
    logit_z: float = 0.0
    norm: float = 0.0
    counts: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)


def joined(picked: Sequence[Sequence[tuple[int, Sample]]]) -> Sequences:
    """Joins each sequence's samples, given with their numbers in the domain.

    The next token is the target, also of a document's last one; but not where a sample is followed by one
    that is not its neighbour. A document that continues in a neighbour stays one.
    """
    tokens, documents, targets, known = [], [], [], []
    for samples in picked:
        ids: list[int] = []
        names: list[tuple[int, int]] = []
        wanted: list[int] = []
        there: list[bool] = []
        run = 0
        for place, (number, sample) in enumerate(samples):
            is_next = place > 0 and number == samples[place - 1][0] + 1
            run += not is_next
            own = sample.tokens.tolist()
            bits = "1" * len(own)
            if sample.trained is not None:
                bits = "".join(f"{byte:08b}" for byte in sample.trained.tolist())
            learnt = [token if bit == "1" else NONE for token, bit in zip(own, bits, strict=True)]
            if place:
                wanted.append(learnt[0] if is_next else NONE)
                there.append(is_next)
            wanted += learnt[1:]
            there += [True] * (len(own) - 1)
            ids += own
            for document, length in zip(sample.documents.tolist(), sample.lengths.tolist(), strict=True):
                names += [(run, document)] * length
        wanted.append(NONE)
        there.append(False)
        order = {name: at for at, name in enumerate(dict.fromkeys(names))}
        tokens.append(ids)
        documents.append([order[name] for name in names])
        targets.append(wanted)
        known.append(there)
    return Sequences(*map(torch.tensor, (tokens, documents, targets, known)))


class Oracle:
    """The run's weights and moments, advanced by :meth:`step`."""

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor]) -> None:
        self.recipe = recipe
        self.weights = {n: w.double().requires_grad_("expert_bias" not in n) for n, w in weights.items()}
        self.first = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.steps = 0

    def step(self, batch: Sequences, theta: float, rate: float, microbatch: int) -> OracleFigures:
        """Trains on a global batch.

        Args:
            batch: its sequences.
            theta: RoPE's base.
            rate: learning rate.
            microbatch: sequences over which a balance loss of scope `microbatch` counts.
        """
        moe, found = self.recipe.model.moe, OracleFigures()
        language, mtp, logit_z, scores, choices, logits = self.forward(batch, theta)
        total = language + self.recipe.model.mtp_loss_weight * mtp
        total = total + self.recipe.model.logit_z_loss_weight * logit_z
        if scores:
            balance = self.balance(scores, choices, batch, microbatch)
            z = torch.stack([each.logsumexp(-1).square().mean() for each in logits]).mean()
            assert moe is not None
            weight = moe.balance_loss_weight if moe.balance is Balance.loss else 0.0
            total = total + weight * balance + moe.z_loss_weight * z
            found.balance, found.z = balance.item(), z.item()
        leaves = {n: w for n, w in self.weights.items() if w.requires_grad}
        gradients = torch.autograd.grad(total, list(leaves.values()))
        found.language, found.mtp, found.logit_z = language.item(), mtp.item(), logit_z.item()
        found.gradients = dict(zip(leaves, gradients, strict=True))
        found.norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        most = self.recipe.training.clip_norm
        factor = 1.0 if most is None else min(1.0, most / found.norm)
        found.clipped = {n: g * factor for n, g in found.gradients.items()}
        found.counts = [each.sum(dim=(0, 1)) for each in choices]
        with torch.no_grad():
            self.update(found, rate)
        return found

    def update(self, found: OracleFigures, rate: float) -> None:
        """AdamW (Loshchilov and Hutter 2019, algorithm 2) or Lion (Chen et al. 2023, algorithm 2)."""
        options, moe = self.recipe.optimizer, self.recipe.model.moe
        b1, b2 = options.betas
        self.steps += 1
        for name, g in found.clipped.items():
            w, m, v = self.weights[name], self.first[name], self.second[name]
            decay = options.weight_decay if w.ndim == 2 else 0.0
            if options.kind is OptimizerKind.lion:
                change = torch.sign(b1 * m + (1 - b1) * g)
                m.copy_(b2 * m + (1 - b2) * g)
            else:
                m.copy_(b1 * m + (1 - b1) * g)
                v.copy_(b2 * v + (1 - b2) * g * g)
                mean, square = m / (1 - b1**self.steps), v / (1 - b2**self.steps)
                change = mean / (square.sqrt() + options.eps)
            w.copy_(w - rate * (change + decay * w))
        for layer, counts in enumerate(found.counts):
            if moe is not None and moe.balance is Balance.bias:
                bias = self.weights[f"{self.layer_name(layer)}ffn.router.expert_bias"]
                # For softmax scores, which are 1/E on average, twice that.
                bias += moe.bias_update_rate * 2 / moe.experts * torch.sign(counts.mean() - counts)

    def balance(
        self, scores: list[Tensor], choices: list[Tensor], batch: Sequences, microbatch: int
    ) -> Tensor:
        """E x sum of (share of choices) x (mean score) (Fedus et al. 2021, equations 4 to 6)."""
        assert self.recipe.model.moe is not None
        E, parts = self.recipe.model.moe.experts, []
        for scores_BSE, chosen_BSE in zip(scores, choices, strict=True):
            for rows in torch.arange(len(batch.tokens)).split(microbatch):
                whole = self.recipe.model.moe.balance_scope is BalanceScope.global_batch
                counted = chosen_BSE if whole else chosen_BSE[rows]
                share_E = counted.sum(dim=(0, 1)) / counted.sum()
                parts.append(E * (share_E * scores_BSE[rows].mean(dim=(0, 1))).sum())
        return torch.stack(parts).mean()

    def forward(
        self, batch: Sequences, theta: float
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Means over positions that have a next token, or over those that are to learn it: cross-entropies of
        next tokens and of those after them, and the former's squared log-sum-exp (Chowdhery et al. 2022,
        section 5); of each MoE layer scores, choices and logits [B, S, E].
        """
        model, W = self.recipe.model, self.weights
        x = embedded = W["transformer.wte.weight"][batch.tokens]
        routed: list[list[Tensor]] = []
        for layer in range(model.n_layers):
            x = self.layer(x, self.layer_name(layer), batch, theta, routed)
        hidden = self.norm(x, "transformer.norm_f.weight")
        B, S = batch.tokens.shape
        over = B * (S - 1)
        if self.recipe.training.loss_mean is LossMean.targets:
            over = int((batch.targets != NONE).sum())
        language, logit_z = (each / over for each in self.cross_entropy(hidden, batch.targets))
        mtp = torch.zeros(())
        if model.mtp:
            at = self.layer_name(model.n_layers)
            # The last position's next token is not known; the first stands for it, and only routers see it.
            following = torch.cat([embedded[:, 1:], embedded[:, :1]], dim=1)
            both = self.norm(following, at + "enorm.weight"), self.norm(hidden, at + "hnorm.weight")
            joined = torch.cat(both, dim=-1) @ W[at + "eh_proj.weight"].T
            x = self.layer(joined, at, batch, theta, routed)
            mtp = self.cross_entropy(self.norm(x, at + "norm.weight"), self.two_ahead(batch))[0] / over
        scores, choices, logits = ([each[i] for each in routed] for i in range(3))
        return language, mtp, logit_z, scores, choices, logits

    def layer_name(self, layer: int) -> str:
        """Prefix of a layer's weights; multi-token prediction's comes after the last."""
        return "transformer.mtp." if layer == self.recipe.model.n_layers else f"transformer.blocks.{layer}."

    def layer(self, x: Tensor, at: str, batch: Sequences, theta: float, routed: list[list[Tensor]]) -> Tensor:
        """One layer; adds scores, choices and logits of its router."""
        model, W = self.recipe.model, self.weights
        half = at + "norm_attn_norm."
        x = x + self.attention(self.norm(x, half + "norm_1.weight"), half + "attn.", batch, theta)
        h = self.norm(x, half + "norm_2.weight")
        if model.moe is not None:
            out, *of_router = self.experts(h, at + "ffn.")
            routed.append(of_router)
            return x + out
        up = h @ W[at + "ffn.w1.weight"].T
        if model.ffn is Ffn.glu:
            up = up * torch.sigmoid(up) * (h @ W[at + "ffn.v1.weight"].T)
        else:
            up = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        return x + up @ W[at + "ffn.w2.weight"].T

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the squared log-sum-exp of the logits, summed over targets."""
        head = self.weights[
            "transformer.wte.weight" if self.recipe.model.tie_embeddings else "lm_head.weight"
        ]
        logits = hidden @ head.T
        logs = functional.log_softmax(logits, dim=-1)
        own = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        there = targets != NONE
        return -(own * there).sum(), (logits.logsumexp(-1).square() * there).sum()

    def two_ahead(self, batch: Sequences) -> Tensor:
        """The token after the next one, where it is a target, the next one is known and, of documents apart,
        both are in the same one.
        """
        B, S = batch.targets.shape
        found = torch.full_like(batch.targets, NONE)
        for b in range(B):
            for i in range(S - 2):
                if not batch.known[b, i] or batch.targets[b, i + 1] == NONE:
                    continue
                is_same = batch.documents[b, i] == batch.documents[b, i + 1] == batch.documents[b, i + 2]
                if is_same or not self.recipe.training.document_masking:
                    found[b, i] = batch.tokens[b, i + 2]
        return found

    def experts(self, h: Tensor, at: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every expert on every token, times its weight, which is zero for all but K."""
        moe, F, W = self.recipe.model.moe, self.recipe.model.ffn_hidden_size, self.weights
        assert moe is not None
        logits = h @ W[at + "router.layer.weight"].T
        scores = logits.softmax(dim=-1)
        selected = scores.detach()
        if moe.balance is Balance.bias:
            selected = selected + W[at + "router.expert_bias"]
        chosen = torch.zeros_like(scores).scatter_(
            -1, selected.argsort(-1, descending=True)[..., : moe.top_k], 1.0
        )
        weights = scores * chosen
        if moe.normalize_weights_p is not None:
            p = moe.normalize_weights_p
            weights = weights / (weights**p).sum(dim=-1, keepdim=True) ** (1 / p)
        out = torch.zeros_like(h)
        for e in range(moe.experts):
            w1, v1, w2 = (W[at + f"experts.mlp.{m}"][e * F : (e + 1) * F] for m in ("w1", "v1", "w2"))
            gate = h @ w1.T
            out = out + weights[..., e : e + 1] * ((gate * torch.sigmoid(gate) * (h @ v1.T)) @ w2)
        return out, scores, chosen, logits

    def attention(self, h: Tensor, at: str, batch: Sequences, theta: float) -> Tensor:
        """Causal attention within documents, one query head at a time."""
        model, W = self.recipe.model, self.weights
        H, G, R = model.n_heads, model.n_kv_heads, model.d_model // model.n_heads
        qkv = h @ W[at + "Wqkv.weight"].T
        if model.qkv_bias:
            qkv = qkv + W[at + "Wqkv.bias"]
        q, k, v = qkv.split([H * R, G * R, G * R], dim=-1)
        if model.qk_norm:
            q, k = self.rms(q, at + "q_norm.weight"), self.rms(k, at + "k_norm.weight")
        if model.clip_qkv is not None:
            q, k, v = (t.clamp(-model.clip_qkv, model.clip_qkv) for t in (q, k, v))
        S = h.shape[1]
        ago = torch.arange(S)[:, None] - torch.arange(S)[None, :]
        documents = (
            batch.documents if self.recipe.training.document_masking else torch.zeros_like(batch.documents)
        )
        hidden = (documents[:, :, None] != documents[:, None, :]) | (ago < 0)
        heads = []
        for head in range(H):
            group = head // (H // G)
            qh, kh, vh = (t[..., i * R : (i + 1) * R] for t, i in ((q, head), (k, group), (v, group)))
            if model.position is Position.rope:
                width = round(R * model.rope_share)
                qh, kh = (
                    torch.cat([turned(t[..., :width], theta), t[..., width:]], dim=-1) for t in (qh, kh)
                )
            weights = qh @ kh.mT / math.sqrt(R)
            if model.position is Position.alibi:
                weights = weights - 2.0 ** (-8 * (head + 1) / H) * ago
            heads.append(weights.masked_fill(hidden, -math.inf).softmax(dim=-1) @ vh)
        return torch.cat(heads, dim=-1) @ W[at + "out_proj.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm without bias, or RMSNorm."""
        model = self.recipe.model
        return self.rms(x if model.norm is Norm.rmsnorm else x - x.mean(dim=-1, keepdim=True), name)

    def rms(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019)."""
        return (
            x
            / (x.square().mean(dim=-1, keepdim=True) + self.recipe.model.norm_eps).sqrt()
            * self.weights[name]
        )


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE in complex numbers: r and r + R / 2 are the real and the imaginary part (Su et al. 2021)."""
    S, R = x.shape[-2:]
    angles = torch.arange(S).double()[:, None] * theta ** (-torch.arange(0, R, 2).double() / R)
    z = torch.complex(x[..., : R // 2], x[..., R // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def rate_at(recipe: Recipe, tokens: int, duration: int, scale: float) -> float:
    """Learning rate at the end of a batch: a line up, then half a cosine, or a plateau and a line down."""
    options, peak = recipe.schedule, recipe.optimizer.learning_rate * scale
    least, warm = options.final_share, options.warmup_tokens
    if tokens < warm:
        return peak * tokens / warm
    if options.kind is ScheduleKind.cosine:
        return peak * (
            least + (1 - least) * (1 + math.cos(math.pi * (tokens - warm) / (duration - warm))) / 2
        )
    left = duration - tokens
    if left > options.decay_tokens:
        return peak
    return peak * (least + (1 - least) * left / options.decay_tokens)
