"""The schema's part for the decoder: width, depth, attention, experts."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.keys import OnStart, key


class Score(str, Enum):
    """Function that makes an expert's score of its logit."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class GroupScore(str, Enum):
    """Score of a group of experts."""

    top2_sum = "top2_sum"
    max = "max"


class Balance(str, Enum):
    """Load balancing of the experts."""

    loss = "loss"
    bias = "bias"
    both = "both"


class BalanceScope(str, Enum):
    """The tokens over which the balance loss counts an expert's share."""

    microbatch = "microbatch"
    rank = "rank"
    expert_group = "expert_group"
    global_batch = "global_batch"
    sequence = "sequence"


class Position(str, Enum):
    """Position encoding."""

    rope = "rope"
    alibi = "alibi"


class Norm(str, Enum):
    """Normalisation before attention and feed-forward."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class QkNormOver(str, Enum):
    """Elements of queries and keys that are normalised together."""

    all_heads = "all_heads"
    each_head = "each_head"


class Ffn(str, Enum):
    """Feed-forward network of a dense layer or of an expert."""

    glu = "glu"
    mlp = "mlp"


@dataclass(frozen=True)
class Moe:
    """Mixture of experts in place of the dense feed-forward network, in every layer or in some."""

    experts: int = key(16, above=0, on_start=OnStart.equal)
    """Experts E per layer. DBRX: 16."""
    top_k: int = key(4, above=0)
    """Experts K that each token uses. DBRX: 4."""
    dense_layers: int = key(0, at_least=0, on_start=OnStart.equal)
    """The first so many layers are dense. DeepSeek-V3: 3."""
    every_n_layers: int = key(1, above=0, on_start=OnStart.equal)
    """Of the other layers only every n-th has experts: layers n, 2n and so on, counted from 1."""
    expert_hidden_size: Optional[int] = key(None, above=0, on_start=OnStart.equal)
    """Hidden size F of an expert; null: `model.ffn_hidden_size`. Qwen3-30B-A3B: 768, DeepSeek-V3: 2,048."""
    shared_hidden_size: Optional[int] = key(None, above=0, on_start=OnStart.equal)
    """Hidden size of a shared expert: a dense GLU for every token, added to the mixture's output (Dai et al.
    2024, DeepSeekMoE, section 3.2); n of them side by side are one of n times the size. null: none."""
    shared_gate: bool = key(False, on_start=OnStart.equal)
    """The shared expert's output is multiplied by the sigmoid of a linear function of the token, as in
    Qwen2-MoE; without, as in DeepSeek."""
    score: Score = key(Score.softmax, on_start=OnStart.reported)
    """`softmax` over the experts (Shazeer et al. 2017) or a `sigmoid` of each (DeepSeek-V3, eq. 15)."""
    normalize_weights_p: Optional[float] = key(1.0, above=0)
    """Order p of the norm by which the K selected weights are divided; null: not normalised. DBRX: 1. With
    softmax scores, 1 is the softmax of the K selected logits (top-k before the softmax, as in Mixtral): the
    sum over all E cancels. null is the top-k of the softmax over all E."""
    weight_scale: float = key(1.0, above=0, on_start=OnStart.reported)
    """Factor of the selected weights, after they are normalised; DeepSeek-V3's routed_scaling_factor: 2.5."""
    groups: int = key(1, above=0, on_start=OnStart.reported)
    """Groups of E / groups consecutive experts, of which a token uses the best `top_groups`: where a group is
    a node, a token is sent to few nodes (DeepSeek-V2, section 2.2.2). 1: no limit. DeepSeek-V3: 8."""
    top_groups: int = key(1, above=0, on_start=OnStart.reported)
    """Groups that a token's experts may come from. DeepSeek-V3: 4."""
    group_score: GroupScore = key(GroupScore.top2_sum, on_start=OnStart.reported)
    """Score of a group: the sum of its two highest scores (`top2_sum`, DeepSeek-V3, with the bias) or the
    highest (`max`, DeepSeek-V2)."""
    jitter_eps: float = key(0.0, at_least=0, below=1, remedy="must lie in [0, 1); 0.01 is usual")
    """Router inputs are multiplied by noise from [1 - eps, 1 + eps] in training. 0: none, like DBRX."""
    balance: Balance = key(Balance.loss, same_on_fork=True)
    """`loss` (Shazeer et al. 2017; Fedus et al. 2021, eq. 4), `bias`: instead of a loss, a bias on the
    selection of experts (Wang et al. 2024; DeepSeek-V3, section 2.1.2), or `both`, as in DeepSeek-V3."""
    balance_loss_weight: float = key(0.05, at_least=0, read_when="model.moe.balance == loss or both")
    """Weight of the balance loss, averaged over layers. DBRX: 0.05; DeepSeek-V3, of its sequences: 0.0001."""
    balance_scope: BalanceScope = key(BalanceScope.microbatch, read_when="model.moe.balance == loss or both")
    """Tokens over which experts' shares are counted: `microbatch` of one rank (MegaBlocks and so, as far as
    is known, DBRX; the result depends on the microbatch size), `rank` (a rank's whole batch), `expert_group`
    (one microbatch of every rank in the expert-parallel group) or `global_batch`, which is the same under
    every layout and microbatch size and lets experts specialise by domain (Qiu et al. 2025, arXiv
    2501.11873). `rank` and `global_batch` cost an extra forward pass when gradients are accumulated.
    `sequence` balances each sequence by itself (DeepSeek-V3, eq. 17-20), or each document of it with
    `training.document_masking`, weighted by tokens: the same under every layout, microbatch size and packing.
    It counts the highest scores, without bias and groups; all others count the selected experts."""
    bias_update_rate: float = key(0.001, at_least=0, read_when="model.moe.balance == bias or both")
    """Change of the balancing bias per optimizer step, where scores are 1/2 on average, as sigmoids of an
    untrained router are. DeepSeek-V3: 0.001. For softmax scores, which are 1/E on average, it is multiplied
    by 2/E: 0.001 changes the bias by 0.2% of a mean score, whatever the scores and the number of experts."""
    z_loss_weight: float = key(0.0, at_least=0)
    """Weight of the router z-loss (Zoph et al. 2022, eq. 5), averaged over layers. ST-MoE: 0.001."""
    forced_balance: bool = False
    """For benchmarks of speed only: experts are dealt out in turn instead of selected, so that all get
    equally many tokens. Figures of such a run say "forced balance", and it cannot be exported."""


@dataclass(frozen=True)
class Yarn:
    """RoPE's long wavelengths are stretched for longer sequences (Peng et al. 2023, arXiv 2309.00071)."""

    factor: float = key(above=1)
    """Factor s by which wavelengths longer than the original sequences are stretched. DeepSeek-V3: 40."""
    original_tokens: int = key(above=0)
    """Length of the sequences that the model was trained on before. DeepSeek-V3: 4,096."""
    beta_fast: float = key(32.0, above=0)
    """Wavelengths that turn more often than that in an original sequence stay as they are."""
    beta_slow: float = key(1.0, above=0)
    """Wavelengths that turn less often than that are stretched in full; those between, in part."""
    attention_factor: Optional[float] = key(None, above=0)
    """Factor of queries and keys after their rotation, with `model.latent` also of what is not rotated; null:
    0.1 ln(factor) + 1 (eq. 22). DeepSeek-V3: null; DeepSeek-V2, of mscale 0.707: 1.2608."""


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values of all heads are products of one narrow vector per token,
    which generation keeps in their place (DeepSeek-V2, DeepSeek-AI 2024, section 2.1).
    """

    kv_rank: int = key(above=0, on_start=OnStart.equal)
    """Width of the vector that keys and values are made of (kv_lora_rank). DeepSeek-V2 and V3: 512."""
    q_rank: Optional[int] = key(None, above=0, on_start=OnStart.equal)
    """Width of the vector that queries are made of (q_lora_rank); null: they are made of the stream, as in
    DeepSeek-V2-Lite. DeepSeek-V2 and V3: 1,536."""
    nope_width: int = key(above=0, on_start=OnStart.equal)
    """Elements of a head's queries and keys that have no position (qk_nope_head_dim). DeepSeek-V3: 128."""
    rope_width: int = key(above=0, on_start=OnStart.equal)
    """Elements that RoPE rotates, in pairs of neighbours; of keys all heads share them (qk_rope_head_dim).
    DeepSeek-V3: 64."""
    v_width: int = key(above=0, on_start=OnStart.equal)
    """Elements of a head's values (v_head_dim). DeepSeek-V3: 128."""


@dataclass(frozen=True)
class TransferBase:
    """Sizes of the small model with which learning rate, initial scale, eps and decay were found."""

    d_model: int = key(above=0)
    """Its width."""
    n_layers: int = key(above=0)
    """Its layers."""
    n_heads: int = key(above=0)
    """Its attention heads, as wide as this model's."""
    hidden_size: int = key(above=0)
    """Hidden size of its experts, or of its feed-forward network if it has none. Dense layers of a mixture
    and shared experts are taken to grow with the width."""
    top_k: int = key(1, above=0)
    """Experts that a token uses in it; 1 for a dense model."""


@dataclass(frozen=True)
class Model:
    """The decoder. Names follow DBRX in Hugging Face."""

    d_model: int = key(above=0)
    """Width D of the residual stream."""
    n_layers: int = key(above=0)
    """Decoder layers L."""
    n_heads: int = key(above=0)
    """Attention heads H."""
    n_kv_heads: int = key(above=0)
    """Key-value heads (Ainslie et al. 2023); n_heads means plain multi-head attention."""
    head_width: Optional[int] = key(None, above=0)
    """Width R of an attention head; null: d_model / n_heads. Qwen3-30B-A3B: 128, with H x R twice d_model."""
    ffn_hidden_size: int = key(above=0)
    """Hidden size F of a dense feed-forward network, and of each expert unless
    `model.moe.expert_hidden_size` says otherwise. DBRX: 1.75 d_model per expert."""
    vocab_size: int = key(above=0)
    """Rows of the embedding, at least the tokenizer's vocabulary size. DBRX pads 100,278 to 100,352."""
    max_sequence_tokens: int = key(above=0, on_start=OnStart.reported)
    """Longest sequence that the model is meant for; exported, and an upper bound of data.sequence_tokens."""
    ffn: Ffn = Ffn.glu
    """`glu`: w2(silu(w1 x) * v1 x) (Shazeer 2020). `mlp`: w2 gelu(w1 x), for MPT; dense only."""
    position: Position = key(Position.rope, on_start=OnStart.reported)
    """`rope` (Su et al. 2021) or `alibi` (Press et al. 2021), for MPT."""
    rope_theta: float = key(500000.0, above=0, read_when="model.position == rope", on_start=OnStart.reported)
    """Base of RoPE's wavelengths. DBRX: 500,000."""
    rope_share: float = key(1.0, above=0, at_most=1, read_when="model.position == rope")
    """Fraction of a head that RoPE rotates, its first elements; the rest has no position. GLM-4.5: 0.5."""
    yarn: Optional[Yarn] = key(None, on_start=OnStart.reported)
    """Stretches RoPE for sequences longer than the model was trained on; null: not stretched."""
    norm: Norm = Norm.layernorm
    """`layernorm` without bias (DBRX, MPT) or `rmsnorm` (LLaMA)."""
    norm_eps: float = key(1e-5, above=0, on_start=OnStart.reported)
    """Added to the variance. DBRX, MPT, LLaMA 2: 1e-5."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, before they are normalised and clipped. Qwen2, GLM-4.5: true."""
    clip_qkv: Optional[float] = key(None, above=0, on_start=OnStart.reported)
    """Queries, keys and values are clipped to [-c, c]. DBRX: 8. null: not clipped."""
    qk_norm: bool = False
    """Queries and keys are RMS-normalised, before clipping and rotation (Dehghani et al. 2023)."""
    qk_norm_over: QkNormOver = key(QkNormOver.all_heads, read_when="model.qk_norm == True")
    """`all_heads` together (Muennighoff et al. 2024, OLMoE, section 4.2.5), or `each_head` by itself with a
    weight that all heads share (Yang et al. 2025, Qwen3, section 2)."""
    latent: Optional[Latent] = key(None, on_start=OnStart.free)
    """Multi-head latent attention, with n_kv_heads equal to n_heads; null: queries, keys and values are
    products of the stream."""
    tie_embeddings: bool = False
    """Share the weights of embedding and output projection. DBRX: false; MPT: true."""
    init_std: float = key(0.02, above=0, on_start=OnStart.free)
    """Standard deviation of initial weights; projections into the residual stream are divided by
    sqrt(2 n_layers) (Radford et al. 2019)."""
    transfer_base: Optional[TransferBase] = key(None, on_start=OnStart.free)
    """Initial scale, learning rate, eps and decay are good for a model of these sizes; each weight's are
    scaled to this one's (Tensor Programs V, CompleteP and their extension to mixtures: docs/optimizers.md).
    null: the same for every weight at any size. Multiplies no activation: exports are as without."""
    logit_z_loss_weight: float = key(0.0, at_least=0, on_start=OnStart.free)
    """Weight of the mean squared log-sum-exp of the output logits, which keeps them from drifting (Chowdhery
    et al. 2022, PaLM, section 5). PaLM: 1e-4. 0: none."""
    moe: Optional[Moe] = key(None, on_start=OnStart.free)
    """Mixture of experts; null for a dense model."""
    mtp: bool = key(False, on_start=OnStart.reported, same_on_fork=True)
    """Multi-token prediction of depth 1 (DeepSeek-V3, section 2.2): one more layer, like the last, predicts
    the token after the next one from a position's hidden state and the next token's embedding. Only training
    runs it: validation and generation leave it out, and exports but those as DeepSeek-V3 or GLM-4.5. Its
    experts count in the balance loss."""
    mtp_loss_weight: float = key(0.3, at_least=0, read_when="model.mtp == True", on_start=OnStart.free)
    """Weight of multi-token prediction's cross-entropy. DeepSeek-V3: 0.3, then 0.1 for the last third."""
