"""`config.json` of models whose queries, keys and values have biases: Qwen2, Qwen2-MoE, GLM-4.5."""

from dataclasses import replace

from train.hf.config import (
    deepseek_moe_keys,
    llama_like,
    llama_like_config,
    need,
    only,
    qwen_moe,
    qwen_moe_keys,
)
from train.hf.deepseek import experts_of, has_mtp, refuse_quantized
from train.hf.rope import PARTIAL, Config
from train.recipe.errors import UserError
from train.recipe.schema import Balance, Model, QkNormOver, Score


def qwen2_to_model(config: Config) -> Model:
    """Reads a dense Qwen2 or Qwen2.5 config: LLaMA's, with biases."""
    only(config, use_sliding_window=False)
    return llama_like(config, rms_norm_eps=1e-6, rope_theta=10000.0, kv_heads=32, qkv_bias=True)


def qwen2_from_model(model: Model) -> dict[str, object]:
    """Writes a Qwen2 config for a dense model."""
    config = llama_like_config(model) | {"sliding_window": None, "use_sliding_window": False}
    return {key: value for key, value in config.items() if key != "attention_bias"}


def qwen2_moe_to_model(config: Config) -> Model:
    """Reads a Qwen2-MoE config: layers as Qwen3-MoE's, with a shared expert that has a gate."""
    if config.get("head_dim") is not None:
        raise UserError(f"head_dim is {config['head_dim']!r}; transformers 4 divides the width by the heads")
    model = qwen_moe(config, kv_heads=16)
    assert model.moe is not None
    shared = need(config, "shared_expert_intermediate_size")
    moe = replace(model.moe, shared_hidden_size=shared, shared_gate=True)
    return replace(model, moe=moe, qkv_bias=bool(config.get("qkv_bias", True)))


def qwen2_moe_from_model(model: Model) -> dict[str, object]:
    """Writes a Qwen2-MoE config."""
    assert model.moe is not None
    return (
        qwen2_from_model(model)
        | qwen_moe_keys(model)
        | {"shared_expert_intermediate_size": model.moe.shared_hidden_size, "qkv_bias": model.qkv_bias}
    )


def glm4_moe_to_model(config: Config) -> Model:
    """Reads a GLM-4.5 config: heads that are rotated in part, DeepSeek-V3's experts."""
    refuse_quantized(config)
    moe = experts_of(
        config,
        score=Score.sigmoid,
        normalize_weights_p=1 if config.get("norm_topk_prob", True) else None,
        weight_scale=float(config.get("routed_scaling_factor", 1.0)),
        dense_layers=int(config.get("first_k_dense_replace", 1) or 0),
        groups=int(config.get("n_group") or 1),
        top_groups=int(config.get("topk_group") or 1),
        balance=Balance.bias,
    )
    biased = bool(config.get("attention_bias", False))
    model = llama_like(
        config, rms_norm_eps=1e-5, rope_theta=10000.0, kv_heads=8, moe=moe, qkv_bias=biased, share=0.5
    )
    model = replace(model, mtp=has_mtp(config))
    if config.get("use_qk_norm", False):
        return replace(model, qk_norm=True, qk_norm_over=QkNormOver.each_head)
    return model


def glm4_moe_from_model(model: Model) -> dict[str, object]:
    """Writes a GLM-4.5 config."""
    own = {
        PARTIAL: float(model.rope_share),
        "attention_bias": model.qkv_bias,
        "use_qk_norm": model.qk_norm,
        "num_nextn_predict_layers": int(model.mtp),
    }
    return llama_like_config(model) | deepseek_moe_keys(model) | own
