"""Architectures of Hugging Face that we read and write: their tables of names, and needs of a model.

The rules of a table are those of :mod:`train.hf.mapping`.

Shapes: D d_model, F ffn_hidden_size, E experts.
"""

from collections.abc import Callable, Iterator

from train.hf import biased, config, deepseek
from train.hf.config import Config
from train.hf.mapping import Architecture, Link, Need, PerExpert, Qkv, Same, Table
from train.hf.rope import has_mscale, is_same_yarn_in_both
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Balance, Ffn, GroupScore, Model, Moe, Norm, Position, QkNormOver, Score


def family_for(model: Model) -> Architecture:
    """Returns the first architecture that expresses a model exactly.

    Raises:
        UserError: if there is none; it names the unmet requirements.
    """
    if model.moe is not None and model.moe.forced_balance:
        raise UserError(
            "forced balance: the experts of this model were dealt out to its tokens, not selected; "
            "a model that was trained with model.moe.forced_balance is for benchmarks of speed only"
        )
    obstacles = {family.model_type: family.obstacles(model) for family in FAMILIES}
    for family in FAMILIES:
        if not obstacles[family.model_type]:
            return family
    reasons = "; ".join(f"{name} needs {', '.join(needs)}" for name, needs in obstacles.items())
    raise UserError(f"no transformers architecture expresses this model exactly: {reasons}")


def family_of(config: Config) -> Architecture:
    """Returns the architecture that a `config.json` names.

    Raises:
        UserError: if it is not supported.
    """
    model_type = str(config.get("model_type", "none"))
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"model_type {model_type!r} is not one of {known}")


def _dbrx_extra(model: Model) -> Iterator[Link]:
    """Yields a zero router for dense layers, which become a single expert, and a copy of a tied head."""
    if model.moe is None:
        for layer in range(model.n_layers):
            router = f"transformer.blocks.{layer}.ffn.router.layer.weight"
            yield Link(router, (1, model.d_model), None)
    if model.tie_embeddings:
        yield Link(
            "lm_head.weight", (model.vocab_size, model.d_model), "transformer.wte.weight", is_copy=True
        )


def _of_experts(what: str, holds: Callable[[Moe], bool]) -> Need:
    """Makes a requirement on the experts of a model that has some."""
    return f"model.moe.{what}", lambda model: model.moe is None or holds(model.moe)


def _shares_whole_experts(model: Model) -> bool:
    shared = model.moe.shared_hidden_size if model.moe else None
    return shared is not None and shared % sizes.expert_width(model) == 0


def _no_biases(model: Model) -> Iterator[Link]:
    """Yields biases of zeros for experts that are balanced by a loss only."""
    if not any(sizes.biases(model)):
        for layer in range(sizes.layers(model)):
            if model.moe is not None and sizes.has_experts(model, layer):
                yield Link(
                    f"model.layers.{layer}.mlp.gate.e_score_correction_bias", (model.moe.experts,), None
                )


def _deepseek_extra(model: Model) -> Iterator[Link]:
    """Yields zero biases, and the copies that `model.mtp` has of embedding and output projection."""
    yield from _no_biases(model)
    if model.mtp:
        shape, layer = (model.vocab_size, model.d_model), f"model.layers.{model.n_layers}."
        head = "transformer.wte.weight" if model.tie_embeddings else "lm_head.weight"
        yield Link(layer + "embed_tokens.weight", shape, "transformer.wte.weight", is_copy=True)
        yield Link(layer + "shared_head.head.weight", shape, head, is_copy=True)


PLAIN_ROUTING: tuple[Need, ...] = (
    _of_experts("balance=loss", lambda moe: moe.balance is Balance.loss),
    _of_experts("score=softmax", lambda moe: moe.score is Score.softmax),
    _of_experts("weight_scale=1", lambda moe: moe.weight_scale == 1),
    _of_experts("top_groups=groups", lambda moe: moe.top_groups == moe.groups),
)
"""Experts selected by their softmax scores only."""
NONE_SHARED = _of_experts("shared_hidden_size=null", lambda moe: moe.shared_hidden_size is None)
PLAIN_HEADS: Need = ("model.latent=null", lambda model: model.latent is None)
WHOLE_ROPE: Need = ("model.rope_share=1", lambda model: model.rope_share == 1)
NO_QKV_BIAS: Need = ("model.qkv_bias=false", lambda model: not model.qkv_bias)
PLAIN_QK: Need = ("model.qk_norm=false", lambda model: not model.qk_norm)
EXPERTS_EVERYWHERE: Need = (
    "experts in every layer (model.moe.dense_layers=0, every_n_layers=1)",
    lambda model: model.moe is None or sizes.expert_layers(model) == model.n_layers,
)
DIVIDED_HEADS: Need = (
    "model.head_width=d_model / n_heads",
    lambda model: sizes.query_width(model) == model.d_model,
)

DBRX = Architecture(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    layer="transformer.blocks.{n}.",
    table={
        name: Same(name)
        for name in (
            "transformer.wte.weight",
            "transformer.norm_f.weight",
            "lm_head.weight",
            "norm_attn_norm.norm_1.weight",
            "norm_attn_norm.norm_2.weight",
            "norm_attn_norm.attn.Wqkv.weight",
            "norm_attn_norm.attn.out_proj.weight",
            "ffn.router.layer.weight",
            "ffn.experts.mlp.w1",
            "ffn.experts.mlp.v1",
            "ffn.experts.mlp.w2",
        )
    }
    | {
        "ffn.w1.weight": Same("ffn.experts.mlp.w1"),
        "ffn.v1.weight": Same("ffn.experts.mlp.v1"),
        "ffn.w2.weight": Same("ffn.experts.mlp.w2", transposed=True),
    },
    needs=(
        ("model.position=rope", lambda model: model.position is Position.rope),
        ("model.norm=layernorm", lambda model: model.norm is Norm.layernorm),
        ("model.norm_eps=1e-5", lambda model: model.norm_eps == 1e-5),
        ("model.ffn=glu", lambda model: model.ffn is Ffn.glu),
        PLAIN_HEADS,
        PLAIN_QK,
        NO_QKV_BIAS,
        WHOLE_ROPE,
        DIVIDED_HEADS,
        EXPERTS_EVERYWHERE,
        ("model.yarn=null", lambda model: model.yarn is None),
        *PLAIN_ROUTING,
        NONE_SHARED,
    ),
    to_model=config.dbrx_to_model,
    from_model=config.dbrx_from_model,
    extra=_dbrx_extra,
)

LLAMA_NAMES: Table = {
    "transformer.wte.weight": Same("model.embed_tokens.weight"),
    "transformer.norm_f.weight": Same("model.norm.weight"),
    "lm_head.weight": Same("lm_head.weight"),
    "norm_attn_norm.norm_1.weight": Same("input_layernorm.weight"),
    "norm_attn_norm.norm_2.weight": Same("post_attention_layernorm.weight"),
    "norm_attn_norm.attn.Wqkv.weight": Qkv(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "norm_attn_norm.attn.out_proj.weight": Same("self_attn.o_proj.weight"),
}

ROPE_AND_GLU: tuple[Need, ...] = (
    ("model.position=rope", lambda model: model.position is Position.rope),
    ("model.norm=rmsnorm", lambda model: model.norm is Norm.rmsnorm),
    ("model.ffn=glu", lambda model: model.ffn is Ffn.glu),
    ("model.max_sequence_tokens = model.yarn.original_tokens x factor", is_same_yarn_in_both),
)
LLAMA_NEEDS = (*ROPE_AND_GLU, PLAIN_HEADS, NO_QKV_BIAS, WHOLE_ROPE)
QK_NORM_NAMES: Table = {
    "norm_attn_norm.attn.q_norm.weight": Same("self_attn.q_norm.weight"),
    "norm_attn_norm.attn.k_norm.weight": Same("self_attn.k_norm.weight"),
}
BIAS_NAMES: Table = {
    "norm_attn_norm.attn.Wqkv.bias": Qkv(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    )
}
QK_NORM_OF_HEADS: Need = (
    "model.qk_norm over each head",
    lambda model: model.qk_norm and model.qk_norm_over is QkNormOver.each_head,
)
NO_EXPERTS: Need = ("model.moe=null", lambda model: model.moe is None)
HAS_EXPERTS: Need = ("model.moe", lambda model: model.moe is not None)
NORMALISED_OR_NOT: Need = (
    "model.moe.normalize_weights_p=1 or null",
    lambda model: model.moe is None or model.moe.normalize_weights_p in {1, None},
)
MIXTURE_NEEDS: tuple[Need, ...] = (HAS_EXPERTS, NORMALISED_OR_NOT, *PLAIN_ROUTING, NONE_SHARED)
NO_CLIP: Need = ("model.clip_qkv=null", lambda model: model.clip_qkv is None)

LLAMA = Architecture(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer="model.layers.{n}.",
    table={
        **LLAMA_NAMES,
        "ffn.w1.weight": Same("mlp.gate_proj.weight"),
        "ffn.v1.weight": Same("mlp.up_proj.weight"),
        "ffn.w2.weight": Same("mlp.down_proj.weight"),
    },
    needs=(*LLAMA_NEEDS, NO_CLIP, PLAIN_QK, NO_EXPERTS),
    to_model=config.llama_to_model,
    from_model=config.llama_from_model,
    ignored=(".rotary_emb.inv_freq",),
)

MIXTRAL = Architecture(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    layer="model.layers.{n}.",
    table={
        **LLAMA_NAMES,
        "ffn.router.layer.weight": Same("block_sparse_moe.gate.weight"),
        "ffn.experts.mlp.w1": PerExpert("block_sparse_moe.experts.{e}.w1.weight"),
        "ffn.experts.mlp.v1": PerExpert("block_sparse_moe.experts.{e}.w3.weight"),
        "ffn.experts.mlp.w2": PerExpert("block_sparse_moe.experts.{e}.w2.weight", transposed=True),
    },
    needs=(
        *LLAMA_NEEDS,
        NO_CLIP,
        PLAIN_QK,
        EXPERTS_EVERYWHERE,
        ("model.moe", lambda model: model.moe is not None),
        (
            "model.moe.normalize_weights_p=1",
            lambda model: model.moe is None or model.moe.normalize_weights_p == 1,
        ),
        *PLAIN_ROUTING,
        NONE_SHARED,
    ),
    to_model=config.mixtral_to_model,
    from_model=config.mixtral_from_model,
)

OLMOE = Architecture(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    layer="model.layers.{n}.",
    table={
        **LLAMA_NAMES,
        **QK_NORM_NAMES,
        "ffn.router.layer.weight": Same("mlp.gate.weight"),
        "ffn.experts.mlp.w1": PerExpert("mlp.experts.{e}.gate_proj.weight"),
        "ffn.experts.mlp.v1": PerExpert("mlp.experts.{e}.up_proj.weight"),
        "ffn.experts.mlp.w2": PerExpert("mlp.experts.{e}.down_proj.weight", transposed=True),
    },
    needs=(
        *LLAMA_NEEDS,
        (
            "model.qk_norm over all heads",
            lambda model: model.qk_norm and model.qk_norm_over is QkNormOver.all_heads,
        ),
        DIVIDED_HEADS,
        EXPERTS_EVERYWHERE,
        *MIXTURE_NEEDS,
    ),
    to_model=config.olmoe_to_model,
    from_model=config.olmoe_from_model,
)

QWEN3 = Architecture(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer="model.layers.{n}.",
    table={**LLAMA.table, **QK_NORM_NAMES},
    needs=(*LLAMA_NEEDS, NO_CLIP, QK_NORM_OF_HEADS, NO_EXPERTS),
    to_model=config.qwen3_to_model,
    from_model=config.qwen3_from_model,
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer="model.layers.{n}.",
    table={**LLAMA.table, **OLMOE.table},
    needs=(*LLAMA_NEEDS, NO_CLIP, QK_NORM_OF_HEADS, *MIXTURE_NEEDS),
    to_model=config.qwen3_moe_to_model,
    from_model=config.qwen3_moe_from_model,
)

BIASED_NEEDS = (*ROPE_AND_GLU, PLAIN_HEADS, WHOLE_ROPE, NO_CLIP, PLAIN_QK)

QWEN2 = Architecture(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer="model.layers.{n}.",
    table={**LLAMA.table, **BIAS_NAMES},
    needs=(*BIASED_NEEDS, ("model.qkv_bias", lambda model: model.qkv_bias), NO_EXPERTS),
    to_model=biased.qwen2_to_model,
    from_model=biased.qwen2_from_model,
)

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    layer="model.layers.{n}.",
    table={
        **LLAMA.table,
        **OLMOE.table,
        **BIAS_NAMES,
        "ffn.shared.w1.weight": Same("mlp.shared_expert.gate_proj.weight"),
        "ffn.shared.v1.weight": Same("mlp.shared_expert.up_proj.weight"),
        "ffn.shared.w2.weight": Same("mlp.shared_expert.down_proj.weight"),
        "ffn.shared_gate.weight": Same("mlp.shared_expert_gate.weight"),
    },
    needs=(
        *BIASED_NEEDS,
        DIVIDED_HEADS,
        HAS_EXPERTS,
        NORMALISED_OR_NOT,
        *PLAIN_ROUTING,
        _of_experts("shared_hidden_size", lambda moe: moe.shared_hidden_size is not None),
        _of_experts("shared_gate=true", lambda moe: moe.shared_gate),
    ),
    to_model=biased.qwen2_moe_to_model,
    from_model=biased.qwen2_moe_from_model,
)

SHARED_EXPERT_NAMES: Table = {
    "ffn.shared.w1.weight": Same("mlp.shared_experts.gate_proj.weight"),
    "ffn.shared.v1.weight": Same("mlp.shared_experts.up_proj.weight"),
    "ffn.shared.w2.weight": Same("mlp.shared_experts.down_proj.weight"),
}
BIASES: Table = {"ffn.router.expert_bias": Same("mlp.gate.e_score_correction_bias")}
MTP_NAMES: Table = {
    "enorm.weight": Same("enorm.weight"),
    "hnorm.weight": Same("hnorm.weight"),
    "eh_proj.weight": Same("eh_proj.weight"),
    "norm.weight": Same("shared_head.norm.weight"),
}
"""Weights that join the layer of multi-token prediction to the others."""
DEEPSEEK_EXPERTS: tuple[Need, ...] = (
    HAS_EXPERTS,
    _of_experts("every_n_layers=1", lambda moe: moe.every_n_layers == 1),
    _of_experts("shared_gate=false", lambda moe: not moe.shared_gate),
    ("model.moe.shared_hidden_size of whole experts", _shares_whole_experts),
)
SIGMOIDS: tuple[Need, ...] = (
    NORMALISED_OR_NOT,
    _of_experts("score=sigmoid", lambda moe: moe.score is Score.sigmoid),
    _of_experts(
        "group_score=top2_sum", lambda moe: moe.groups == 1 or moe.group_score is GroupScore.top2_sum
    ),
)

DOTS1 = Architecture(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    layer="model.layers.{n}.",
    table={
        **QWEN3_MOE.table,
        **SHARED_EXPERT_NAMES,
        **BIASES,
    },
    needs=(*LLAMA_NEEDS, NO_CLIP, QK_NORM_OF_HEADS, *DEEPSEEK_EXPERTS, *SIGMOIDS),
    to_model=config.dots1_to_model,
    from_model=config.dots1_from_model,
    extra=_no_biases,
)

GLM4_MOE = Architecture(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    layer="model.layers.{n}.",
    table={**DOTS1.table, **BIAS_NAMES, **MTP_NAMES},
    needs=(
        *ROPE_AND_GLU,
        PLAIN_HEADS,
        NO_CLIP,
        (
            "model.qk_norm over each head, or none",
            lambda model: not model.qk_norm or model.qk_norm_over is QkNormOver.each_head,
        ),
        *DEEPSEEK_EXPERTS,
        *SIGMOIDS,
    ),
    to_model=biased.glm4_moe_to_model,
    from_model=biased.glm4_moe_from_model,
    extra=_deepseek_extra,
    has_later_layers=True,
)

LATENT_NAMES: Table = {
    f"norm_attn_norm.attn.{ours}.weight": Same(f"self_attn.{theirs}.weight")
    for ours, theirs in {
        "q_proj": "q_proj",
        "q_a_proj": "q_a_proj",
        "q_a_norm": "q_a_layernorm",
        "q_b_proj": "q_b_proj",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_a_norm": "kv_a_layernorm",
        "kv_b_proj": "kv_b_proj",
    }.items()
}
LATENT_HEADS: tuple[Need, ...] = (
    ("model.latent", lambda model: model.latent is not None),
    # The norms within attention have it whatever the config says.
    ("model.norm_eps=1e-6", lambda model: model.norm_eps == 1e-6),
    ("model.yarn.attention_factor other than 1", has_mscale),
)

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    layer="model.layers.{n}.",
    table={**LLAMA.table, **OLMOE.table, **LATENT_NAMES, **SHARED_EXPERT_NAMES, **BIASES, **MTP_NAMES},
    needs=(*ROPE_AND_GLU, *LATENT_HEADS, *DEEPSEEK_EXPERTS, *SIGMOIDS),
    to_model=deepseek.v3_to_model,
    from_model=deepseek.v3_from_model,
    extra=_deepseek_extra,
    ignored=LLAMA.ignored,
    has_later_layers=True,
)

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    layer="model.layers.{n}.",
    table={**LLAMA.table, **OLMOE.table, **LATENT_NAMES, **SHARED_EXPERT_NAMES},
    needs=(
        *ROPE_AND_GLU,
        *LATENT_HEADS,
        ("model.d_model divisible by n_heads", lambda model: model.d_model % model.n_heads == 0),
        *DEEPSEEK_EXPERTS,
        _of_experts("score=softmax", lambda moe: moe.score is Score.softmax),
        _of_experts("normalize_weights_p=null", lambda moe: moe.normalize_weights_p is None),
        _of_experts("balance=loss", lambda moe: moe.balance is Balance.loss),
        _of_experts("group_score=max", lambda moe: moe.groups == 1 or moe.group_score is GroupScore.max),
    ),
    to_model=deepseek.v2_to_model,
    from_model=deepseek.v2_from_model,
    ignored=LLAMA.ignored,
)

MPT = Architecture(
    model_type="mpt",
    architecture="MptForCausalLM",
    layer="transformer.blocks.{n}.",
    table={
        "transformer.wte.weight": Same("transformer.wte.weight"),
        "transformer.norm_f.weight": Same("transformer.norm_f.weight"),
        "lm_head.weight": Same("lm_head.weight"),
        "norm_attn_norm.norm_1.weight": Same("norm_1.weight"),
        "norm_attn_norm.norm_2.weight": Same("norm_2.weight"),
        "norm_attn_norm.attn.Wqkv.weight": Same("attn.Wqkv.weight"),
        "norm_attn_norm.attn.out_proj.weight": Same("attn.out_proj.weight"),
        "ffn.w1.weight": Same("ffn.up_proj.weight"),
        "ffn.w2.weight": Same("ffn.down_proj.weight"),
    },
    needs=(
        ("model.position=alibi", lambda model: model.position is Position.alibi),
        ("model.norm=layernorm", lambda model: model.norm is Norm.layernorm),
        ("model.ffn=mlp", lambda model: model.ffn is Ffn.mlp),
        PLAIN_HEADS,
        PLAIN_QK,
        NO_QKV_BIAS,
        DIVIDED_HEADS,
        ("model.n_kv_heads=n_heads", lambda model: model.n_kv_heads == model.n_heads),
        (
            "model.ffn_hidden_size=4 x d_model",
            lambda model: model.ffn_hidden_size == 4 * model.d_model,
        ),
        NO_EXPERTS,
    ),
    to_model=config.mpt_to_model,
    from_model=config.mpt_from_model,
)

FAMILIES = (
    *(DBRX, LLAMA, MIXTRAL, OLMOE, MPT, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE),
    *(DOTS1, GLM4_MOE, DEEPSEEK_V3, DEEPSEEK_V2),
)
