"""Conversion between Hugging Face's `config.json` and a recipe's model, a pair of functions per architecture.

A config that our decoder cannot express is refused, naming key and value; keys that do not change the
function (dropout of zero, caching, versions, remote code) are ignored.

What is written is read alike by transformers 4.5x and 5: RoPE's base stands where each looks for it
(:mod:`train.hf.rope`), and numbers have the types that 5 insists on. It refuses an int where a float is
declared (`moe_normalize_expert_weights`, OLMoE's and MPT's `clip_qkv`), and a float as MPT's `attn_pdrop`.
"""

from dataclasses import replace

from train.hf.rope import Config, rope_base, rope_keys, rope_share, rope_yarn
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Balance, Ffn, Model, Moe, Norm, Position, QkNormOver, Score

NEVER_CLIPPED = 1e30
"""Written for `clip_qkv: null`, as DBRX in transformers 4.51 fails without a number."""


def dbrx_to_model(config: Config) -> Model:
    """Reads a DBRX config, with `attn_config` for attention and `ffn_config` for experts.

    With a single expert the model is dense regardless of its router: the softmax of one score is 1.
    """
    attn, ffn = dict(config.get("attn_config") or {}), dict(config.get("ffn_config") or {})
    only(config, resid_pdrop=0, emb_pdrop=0, tie_word_embeddings=False)
    only(attn, attn_pdrop=0)
    only(ffn, ffn_act_fn={"name": "silu"})
    clip = attn.get("clip_qkv")
    return Model(
        d_model=need(config, "d_model"),
        n_layers=need(config, "n_layers"),
        n_heads=need(config, "n_heads"),
        n_kv_heads=need(attn, "kv_n_heads"),
        ffn_hidden_size=need(ffn, "ffn_hidden_size"),
        vocab_size=need(config, "vocab_size"),
        max_sequence_tokens=need(config, "max_seq_len"),
        rope_theta=rope_base(config, 10000.0),
        clip_qkv=None if clip is None or clip >= NEVER_CLIPPED else float(clip),
        init_std=float(config.get("initializer_range", 0.02)),
        moe=None if need(ffn, "moe_num_experts") == 1 else _dbrx_experts(ffn),
    )


def _dbrx_experts(ffn: Config) -> Moe:
    return Moe(
        experts=need(ffn, "moe_num_experts"),
        top_k=need(ffn, "moe_top_k"),
        normalize_weights_p=ffn.get("moe_normalize_expert_weights", 1),
        jitter_eps=float(ffn.get("moe_jitter_eps") or 0),
        balance_loss_weight=float(ffn.get("moe_loss_weight", 0.01)),
    )


def dbrx_from_model(model: Model) -> dict[str, object]:
    """Writes a DBRX config; a dense model becomes a single expert."""
    moe = model.moe
    return {
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "vocab_size": model.vocab_size,
        "max_seq_len": model.max_sequence_tokens,
        "attn_config": {
            "attn_pdrop": 0.0,
            "clip_qkv": NEVER_CLIPPED if model.clip_qkv is None else float(model.clip_qkv),
            "kv_n_heads": model.n_kv_heads,
            "rope_theta": float(model.rope_theta),
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": sizes.expert_width(model),
            "moe_num_experts": moe.experts if moe else 1,
            "moe_top_k": moe.top_k if moe else 1,
            "moe_normalize_expert_weights": _float(moe.normalize_weights_p) if moe else 1.0,
            "moe_jitter_eps": float(moe.jitter_eps) if moe else 0.0,
            "moe_loss_weight": float(moe.balance_loss_weight) if moe else 0.0,
        },
        **rope_keys(model),
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": float(model.init_std),
        "output_router_logits": False,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def llama_to_model(config: Config) -> Model:
    """Reads a config of LLaMA 1, 2 or any other model of their class without biases and scaled positions."""
    only(config, mlp_bias=False)
    return llama_like(
        config, rms_norm_eps=1e-6, rope_theta=10000.0, kv_heads=config.get("num_attention_heads")
    )


def llama_from_model(model: Model) -> dict[str, object]:
    """Writes a LLaMA config for a dense model."""
    return llama_like_config(model) | {"mlp_bias": False}


def mixtral_to_model(config: Config) -> Model:
    """Reads a Mixtral config: LLaMA's attention; top-k weights always add up to 1."""
    only(config, sliding_window=None)
    return llama_like(
        config,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        kv_heads=8,
        moe=Moe(
            experts=need(config, "num_local_experts"),
            top_k=need(config, "num_experts_per_tok"),
            normalize_weights_p=1,
            jitter_eps=float(config.get("router_jitter_noise", 0)),
            balance_loss_weight=float(config.get("router_aux_loss_coef", 0.001)),
        ),
    )


def mixtral_from_model(model: Model) -> dict[str, object]:
    """Writes a Mixtral config for a mixture of experts with LLaMA's attention."""
    assert model.moe is not None
    return llama_like_config(model) | {
        "intermediate_size": sizes.expert_width(model),
        "num_local_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "router_jitter_noise": float(model.moe.jitter_eps),
        "router_aux_loss_coef": float(model.moe.balance_loss_weight),
        "output_router_logits": False,
        "sliding_window": None,
    }


def olmoe_to_model(config: Config) -> Model:
    """Reads an OLMoE config: LLaMA's attention with normalised queries and keys."""
    clip = config.get("clip_qkv")
    model = llama_like(
        config,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        kv_heads=config.get("num_attention_heads"),
        moe=Moe(
            experts=need(config, "num_experts"),
            top_k=need(config, "num_experts_per_tok"),
            normalize_weights_p=1 if config.get("norm_topk_prob", False) else None,
            balance_loss_weight=float(config.get("router_aux_loss_coef", 0.01)),
        ),
    )
    return replace(model, qk_norm=True, clip_qkv=None if clip is None else float(clip))


def olmoe_from_model(model: Model) -> dict[str, object]:
    """Writes an OLMoE config for a mixture of experts with normalised queries and keys."""
    assert model.moe is not None
    return llama_like_config(model) | {
        "intermediate_size": sizes.expert_width(model),
        "num_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "norm_topk_prob": model.moe.normalize_weights_p == 1,
        "router_aux_loss_coef": float(model.moe.balance_loss_weight),
        "output_router_logits": False,
        "clip_qkv": _float(model.clip_qkv),
    }


def qwen3_to_model(config: Config) -> Model:
    """Reads a dense Qwen3 config: LLaMA's, with each head's queries and keys normalised."""
    only(config, use_sliding_window=False)
    model = llama_like(config, rms_norm_eps=1e-6, rope_theta=10000.0, kv_heads=32, head_dim=128)
    return replace(model, qk_norm=True, qk_norm_over=QkNormOver.each_head)


def qwen3_from_model(model: Model) -> dict[str, object]:
    """Writes a Qwen3 config for a dense model whose heads' queries and keys are normalised."""
    return llama_like_config(model) | {
        "head_dim": sizes.head_width(model),
        "sliding_window": None,
        "use_sliding_window": False,
    }


def qwen3_moe_to_model(config: Config) -> Model:
    """Reads a Qwen3-MoE config, whose first layers may be dense, and others between those of experts."""
    return replace(qwen_moe(config, kv_heads=4), qk_norm=True, qk_norm_over=QkNormOver.each_head)


def qwen_moe(config: Config, *, kv_heads: int) -> Model:
    """Reads what the mixtures of Qwen2 and Qwen3 share; ``kv_heads`` is their class's default."""
    only(config, use_sliding_window=False)
    dense = list(config.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise UserError(f"mlp_only_layers is {dense}; only the first layers, [0, 1, ...], can be expressed")
    width, every = need(config, "moe_intermediate_size"), int(config.get("decoder_sparse_step", 1))
    # Where every layer has experts, nothing reads the width of dense layers.
    dense_width = need(config, "intermediate_size") if dense or every > 1 else width
    return llama_like(
        config,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        kv_heads=kv_heads,
        ffn_hidden_size=dense_width,
        moe=Moe(
            # transformers 5 writes the count under the second name, and reads both.
            experts=need(config, "num_experts" if "num_experts" in config else "num_local_experts"),
            top_k=need(config, "num_experts_per_tok"),
            expert_hidden_size=None if width == dense_width else width,
            dense_layers=len(dense),
            every_n_layers=every,
            normalize_weights_p=1 if config.get("norm_topk_prob", False) else None,
            balance_loss_weight=float(config.get("router_aux_loss_coef", 0.001)),
        ),
    )


def qwen3_moe_from_model(model: Model) -> dict[str, object]:
    """Writes a Qwen3-MoE config."""
    return qwen3_from_model(model) | qwen_moe_keys(model)


def qwen_moe_keys(model: Model) -> dict[str, object]:
    """Writes the keys of experts that the mixtures of Qwen2 and Qwen3 share."""
    assert model.moe is not None
    return {
        "moe_intermediate_size": sizes.expert_width(model),
        "num_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "norm_topk_prob": model.moe.normalize_weights_p == 1,
        "router_aux_loss_coef": float(model.moe.balance_loss_weight),
        "output_router_logits": False,
        "decoder_sparse_step": model.moe.every_n_layers,
        "mlp_only_layers": list(range(model.moe.dense_layers)),
    }


def dots1_to_model(config: Config) -> Model:
    """Reads a dots.llm1 config: Qwen3's attention, DeepSeek-V3's experts."""
    windows = "sliding_attention" in (config.get("layer_types") or [])
    if windows or (
        config.get("sliding_window", 4096) is not None
        and config.get("max_window_layers", 62) < need(config, "num_hidden_layers")
    ):
        raise UserError(f"sliding_window is {config.get('sliding_window', 4096)}; only null can be expressed")
    width = need(config, "moe_intermediate_size")
    moe = Moe(
        experts=need(config, "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        expert_hidden_size=None if width == need(config, "intermediate_size") else width,
        shared_hidden_size=width * need(config, "n_shared_experts"),
        dense_layers=int(config.get("first_k_dense_replace") or 0),
        score=Score.sigmoid,
        normalize_weights_p=1 if config.get("norm_topk_prob", False) else None,
        weight_scale=float(config.get("routed_scaling_factor", 1.0)),
        groups=int(config.get("n_group") or 1),
        top_groups=int(config.get("topk_group") or 1),
        balance=Balance.bias,
    )
    model = llama_like(config, rms_norm_eps=1e-6, rope_theta=10000.0, kv_heads=32, moe=moe)
    return replace(model, qk_norm=True, qk_norm_over=QkNormOver.each_head)


def dots1_from_model(model: Model) -> dict[str, object]:
    """Writes a dots.llm1 config for experts that are scored by sigmoids, with a shared one."""
    no_windows = {"sliding_window": None, "max_window_layers": model.n_layers}
    return llama_like_config(model) | deepseek_moe_keys(model) | no_windows


def deepseek_moe_keys(model: Model) -> dict[str, object]:
    """Writes what a DeepSeek-like config says of experts that are chosen by groups, and of a shared one."""
    moe = model.moe
    assert moe is not None and moe.shared_hidden_size is not None
    return {
        "moe_intermediate_size": sizes.expert_width(model),
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared_hidden_size // sizes.expert_width(model),
        "first_k_dense_replace": moe.dense_layers,
        "norm_topk_prob": moe.normalize_weights_p == 1,
        "routed_scaling_factor": float(moe.weight_scale),
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
    }


def mpt_to_model(config: Config) -> Model:
    """Reads an MPT config with ALiBi."""
    attn = dict(config.get("attn_config") or {})
    only(config, no_bias=True, expansion_ratio=4, logit_scale=None, resid_pdrop=0, emb_pdrop=0)
    only(attn, attn_pdrop=0, qk_ln=False, prefix_lm=False, softmax_scale=None, alibi_bias_max=8)
    only(attn, attn_type="multihead_attention")
    if not attn.get("alibi", True):
        raise UserError("attn_config.alibi is False, and learned positions cannot be expressed")
    clip = attn.get("clip_qkv")
    return Model(
        d_model=need(config, "d_model"),
        n_layers=need(config, "n_layers"),
        n_heads=need(config, "n_heads"),
        n_kv_heads=need(config, "n_heads"),
        ffn_hidden_size=4 * need(config, "d_model"),
        vocab_size=need(config, "vocab_size"),
        max_sequence_tokens=need(config, "max_seq_len"),
        ffn=Ffn.mlp,
        position=Position.alibi,
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        clip_qkv=float(clip) if clip else None,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        init_std=float(config.get("initializer_range", 0.02)),
    )


def mpt_from_model(model: Model) -> dict[str, object]:
    """Writes an MPT config for a dense model."""
    return {
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "vocab_size": model.vocab_size,
        "max_seq_len": model.max_sequence_tokens,
        "expansion_ratio": 4,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "clip_qkv": _float(model.clip_qkv),
        },
        "layer_norm_epsilon": float(model.norm_eps),
        "learned_pos_emb": False,
        "no_bias": True,
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": float(model.init_std),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


def llama_like(
    config: Config,
    *,
    rms_norm_eps: float,
    rope_theta: float,
    kv_heads: int | None,
    head_dim: int | None = None,
    ffn_hidden_size: int | None = None,
    moe: Moe | None = None,
    latent: bool = False,
    qkv_bias: bool | None = None,
    share: float | None = None,
) -> Model:
    """Reads the keys shared by LLaMA and its relatives; the arguments are their classes' defaults.

    ``head_dim`` of None divides the width by the heads, ``ffn_hidden_size`` is of a class that has its own,
    ``latent`` of one with latent attention. ``qkv_bias`` of None is of a class whose `attention_bias`
    the output has too, which is refused; ``share`` of None, of one that rotates whole heads.
    """
    d_model, n_heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    only(config, hidden_act="silu", attention_dropout=0)
    if qkv_bias is None:
        only(config, attention_bias=False)
    head_width = int(config.get("head_dim") or head_dim or d_model // n_heads)
    return Model(
        d_model=d_model,
        n_layers=need(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or kv_heads or n_heads),
        head_width=None if head_width * n_heads == d_model else head_width,
        ffn_hidden_size=ffn_hidden_size or need(config, "intermediate_size"),
        vocab_size=need(config, "vocab_size"),
        max_sequence_tokens=need(config, "max_position_embeddings"),
        rope_theta=rope_base(config, rope_theta, scaled=True, partial=share is not None),
        rope_share=1.0 if share is None else rope_share(config, share),
        yarn=rope_yarn(config, latent=latent),
        norm=Norm.rmsnorm,
        norm_eps=float(config.get("rms_norm_eps", rms_norm_eps)),
        qkv_bias=bool(qkv_bias),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
        moe=moe,
    )


def llama_like_config(model: Model) -> dict[str, object]:
    """Writes the keys shared by LLaMA and its relatives."""
    return ({} if model.head_width is None else {"head_dim": model.head_width}) | {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_sequence_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": float(model.norm_eps),
        "rope_theta": float(model.rope_theta),
        **rope_keys(model),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": float(model.init_std),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


def need(config: Config, key: str) -> int:
    """Returns a required count, which has no reliable default."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key} is {value!r}, not a positive number")
    return value


def only(config: Config, **expressible: object) -> None:
    """Refuses values that our decoder cannot express; a missing key has its default."""
    for key, value in expressible.items():
        given = config.get(key, value)
        if given != value and given is not None:
            raise UserError(f"{key} is {given!r}; only {value!r} can be expressed")


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
