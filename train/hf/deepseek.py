"""DeepSeek-V2's and V3's `config.json`: latent attention, shared experts, groups (:mod:`train.hf.config`)."""

from dataclasses import replace
from typing import Any

from train.hf.config import deepseek_moe_keys, llama_like, llama_like_config, need, only
from train.hf.rope import Config
from train.recipe.errors import UserError
from train.recipe.schema import Balance, BalanceScope, GroupScore, Latent, Model, Moe, Score


def v3_to_model(config: Config) -> Model:
    """Reads a DeepSeek-V3 config: latent attention, experts scored by sigmoids."""
    only(config, scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)
    model = _to_model(
        config,
        experts_of(
            config,
            score=Score.sigmoid,
            normalize_weights_p=1 if config.get("norm_topk_prob", True) else None,
            weight_scale=float(config.get("routed_scaling_factor", 2.5)),
            dense_layers=int(config.get("first_k_dense_replace", 3) or 0),
            groups=int(config.get("n_group", 8) or 1),
            top_groups=int(config.get("topk_group", 4) or 1),
            balance=Balance.bias,
        ),
    )
    return replace(model, mtp=has_mtp(config))


def v3_from_model(model: Model) -> dict[str, object]:
    """Writes a DeepSeek-V3 config."""
    return _config(model) | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "num_nextn_predict_layers": int(model.mtp),
    }


def v2_to_model(config: Config) -> Model:
    """Reads a DeepSeek-V2 config: latent attention, experts scored by softmax, maybe of a few groups."""
    only(config, scoring_func="softmax", norm_topk_prob=False)
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(
            f"topk_method is {method!r}; only 'greedy' and 'group_limited_greedy' can be expressed"
        )
    limits = method == "group_limited_greedy"
    return _to_model(
        config,
        experts_of(
            config,
            normalize_weights_p=None,
            weight_scale=float(config.get("routed_scaling_factor", 1.0)),
            dense_layers=int(config.get("first_k_dense_replace") or 0),
            groups=need(config, "n_group") if limits else 1,
            top_groups=need(config, "topk_group") if limits else 1,
            group_score=GroupScore.max,
            balance_loss_weight=float(config.get("aux_loss_alpha", 0.001)),
            balance_scope=BalanceScope.sequence if config.get("seq_aux", True) else BalanceScope.microbatch,
        ),
    )


def v2_from_model(model: Model) -> dict[str, object]:
    """Writes a DeepSeek-V2 config."""
    moe = model.moe
    assert moe is not None
    return _config(model) | {
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy" if moe.groups == 1 else "group_limited_greedy",
        "aux_loss_alpha": float(moe.balance_loss_weight),
        "seq_aux": moe.balance_scope is BalanceScope.sequence,
    }


def experts_of(config: Config, **rest: Any) -> Moe:
    """Reads the sizes of experts in DeepSeek's words; ``rest`` are the keys in which models differ."""
    width = need(config, "moe_intermediate_size")
    only(config, moe_layer_freq=1)
    return Moe(
        experts=need(config, "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        expert_hidden_size=None if width == need(config, "intermediate_size") else width,
        shared_hidden_size=width * need(config, "n_shared_experts"),
        **rest,
    )


def has_mtp(config: Config) -> bool:
    """Returns whether a config in DeepSeek's words declares one layer of multi-token prediction.

    More than one are not of `model.mtp`'s depth: they are left out.
    """
    return config.get("num_nextn_predict_layers") == 1


def refuse_quantized(config: Config) -> None:
    """Refuses weights in fp8."""
    if config.get("quantization_config") is not None:
        method = dict(config["quantization_config"]).get("quant_method")
        raise UserError(f"quantization_config.quant_method is {method!r}; convert the weights to bf16 first")


def _to_model(config: Config, moe: Moe) -> Model:
    refuse_quantized(config)
    heads = need(config, "num_attention_heads")
    # Norms within attention have this eps whatever the config says.
    only(config, num_key_value_heads=heads, rms_norm_eps=1e-6, mlp_bias=False)
    query_rank = config.get("q_lora_rank", 1536)
    latent = Latent(
        kv_rank=need(config, "kv_lora_rank"),
        q_rank=query_rank if query_rank is None else need({"q_lora_rank": query_rank}, "q_lora_rank"),
        nope_width=need(config, "qk_nope_head_dim"),
        rope_width=need(config, "qk_rope_head_dim"),
        v_width=need(config, "v_head_dim"),
    )
    model = llama_like(
        config, rms_norm_eps=1e-6, rope_theta=10000.0, kv_heads=heads, head_dim=1, moe=moe, latent=True
    )
    return replace(model, head_width=None, latent=latent)


def _config(model: Model) -> dict[str, object]:
    latent = model.latent
    assert latent is not None
    own = {
        "moe_layer_freq": 1,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_width,
        "qk_rope_head_dim": latent.rope_width,
        "v_head_dim": latent.v_width,
    }
    return llama_like_config(model) | deepseek_moe_keys(model) | own
