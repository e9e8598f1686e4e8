"""`config.json`: what transformers 4 and 5 read from ours, and what ours reads from theirs. Needs neither."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.hf.architectures import FAMILIES, family_for, family_of
from train.hf.check import NEWER_MODELS, SMALL_MODELS
from train.hf.config import Config
from train.hf.rope import views
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Balance, GroupScore, Model, Moe, Score, Yarn

THETA = 123456.0
FIRST = {family_for(model).model_type: model for model in reversed((SMALL_MODELS | NEWER_MODELS).values())}


def _as_read(model: Model) -> Model:
    """The model with the base of these tests, as an import reads it: no config has a loss by sequence."""
    balance = Balance.bias if model.moe and model.moe.balance is Balance.both else None
    moe = replace(model.moe, balance=balance) if model.moe and balance else model.moe
    return replace(model, rope_theta=THETA, yarn=None, moe=moe)


MODELS = {family.model_type: _as_read(FIRST[family.model_type]) for family in FAMILIES}
DBRX, LLAMA, QWEN3 = (MODELS[kind] for kind in ("dbrx", "llama", "qwen3"))
EXPERTS = Moe(experts=4, top_k=2)
DEEPSEEKS = ("deepseek_v3", "deepseek_v2")
ROTARY = [kind for kind in MODELS if kind != "mpt"]


def written(model: Model) -> dict[str, Any]:
    """Our config of a model, as it is read from its file."""
    family = family_for(model)
    tree: dict[str, Any] = json.loads(
        json.dumps({"model_type": family.model_type} | family.from_model(model))
    )
    return tree


def read(config: Config) -> Model:
    return family_of(config).to_model(config)


def without_base(config: dict[str, Any]) -> dict[str, Any]:
    """The same config without RoPE's base."""
    left = {key: value for key, value in config.items() if key not in {"rope_theta", "rope_parameters"}}
    if "attn_config" in left:
        left["attn_config"] = {k: v for k, v in left["attn_config"].items() if k != "rope_theta"}
    return left


def with_old_base(config: dict[str, Any], theta: float) -> dict[str, Any]:
    """The same config as transformers 4 writes it."""
    left = without_base(config)
    if "attn_config" in left:
        return left | {"attn_config": left["attn_config"] | {"rope_theta": theta}}
    return left | {"rope_theta": theta, "rope_scaling": None}


def with_new_base(config: dict[str, Any], theta: float) -> dict[str, Any]:
    """The same config as transformers 5 writes it."""
    return without_base(config) | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


def test_there_is_a_model_of_every_architecture() -> None:
    assert list(MODELS) == [family.model_type for family in FAMILIES]
    assert {kind: written(model)["model_type"] for kind, model in MODELS.items()} == {k: k for k in MODELS}


@pytest.mark.parametrize("kind", ROTARY)
def test_both_versions_find_the_base_in_an_export(kind: str) -> None:
    config = written(MODELS[kind])
    old = config["attn_config"] if kind == "dbrx" else config
    assert old["rope_theta"] == THETA
    share = {"partial_rotary_factor": 0.5} if kind == "glm4_moe" else {}
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA} | share
    assert [read(view) for view in (config, *views(config))] == [MODELS[kind]] * 3


@pytest.mark.parametrize("kind", MODELS)
def test_numbers_have_the_types_on_which_transformers_5_insists(kind: str) -> None:
    """An int is refused there where a float is declared, also a whole one such as 8; so is MPT's 0.0."""
    moe = MODELS[kind].moe
    moe = moe and replace(moe, jitter_eps=0, weight_scale=1)
    if kind != "deepseek_v2":  # which does not normalise
        moe = moe and replace(moe, normalize_weights_p=1)
    if kind not in ("dots1", "glm4_moe", "deepseek_v3"):  # which have no weight of a balance loss
        moe = moe and replace(moe, balance_loss_weight=1)
    model = replace(MODELS[kind], moe=moe, rope_theta=10000, init_std=1)
    if kind in {"dbrx", "olmoe", "mpt"}:
        model = replace(model, clip_qkv=8)
    config = dict(numbers(written(model)))
    counts = {"d_model", "hidden_size", "max_seq_len", "max_position_embeddings", "vocab_size"}
    counts |= {"n_layers", "n_heads", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    counts |= {"kv_n_heads", "ffn_hidden_size", "intermediate_size", "expansion_ratio", "alibi_bias_max"}
    counts |= {"head_dim", "moe_intermediate_size", "decoder_sparse_step", "shared_expert_intermediate_size"}
    counts |= {"n_routed_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"}
    counts |= {"max_window_layers", "moe_layer_freq", "num_nextn_predict_layers", "q_lora_rank"}
    counts |= {"kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    counts |= {"moe_num_experts", "moe_top_k", "num_local_experts", "num_experts", "num_experts_per_tok"}
    counts |= {"attn_pdrop"} if kind == "mpt" else set()
    assert {key for key, value in config.items() if isinstance(value, int)} == counts & config.keys()
    assert config.keys() - counts >= {"initializer_range"}
    assert read(written(model)) == (replace(model, rope_theta=5e5) if kind == "mpt" else model)


def numbers(tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


@pytest.mark.parametrize("kind", ROTARY)
def test_both_spellings_are_read_as_the_same_model(kind: str) -> None:
    config = written(MODELS[kind])
    assert read(with_old_base(config, THETA)) == read(with_new_base(config, THETA)) == MODELS[kind]
    default = 1e6 if kind == "mixtral" else 1e4
    assert read(without_base(config)).rope_theta == default
    assert read(with_new_base(config, THETA) | {"rope_parameters": {"rope_type": "default"}}) == read(
        without_base(config)
    )
    whole = {} if kind == "glm4_moe" else {"partial_rotary_factor": 1.0}
    for nothing in (None, {}, {"type": "default"}, {"rope_type": "default"} | whole):
        assert read(with_old_base(config, THETA) | {"rope_scaling": nothing}) == MODELS[kind]


@pytest.mark.parametrize("kind", ROTARY)
def test_what_a_version_does_not_read_is_seen(kind: str) -> None:
    """An import in one spelling is not copied into an export, where another version would read a default."""
    config, model = written(MODELS[kind]), MODELS[kind]
    assert [read(view) == model for view in views(config)] == [True, True]
    assert [read(view) == model for view in views(with_new_base(config, THETA))] == [False, True]
    # Of the older spellings, transformers 5 does not read DBRX's.
    assert [read(view) == model for view in views(with_old_base(config, THETA))] == [True, kind != "dbrx"]
    scaling = {"rope_scaling": {"rope_type": "default"}}  # Which transformers 5 takes for rope_parameters.
    old, new = views(with_new_base(config, THETA) | scaling)
    assert read(old) != model and read(new) != model


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0}},
            "rope_parameters.rope_type is 'llama3'; only 'default'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.type is 'linear'; only 'default'",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is 2.0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25; only 1"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}},
            "rope_parameters differs by layer (full_attention)",
        ),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters.rope_theta is 10000"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, "rope_scaling.rope_theta is 5"),
        (
            {"rope_parameters": {"rope_theta": "10000"}},
            "rope_parameters.rope_theta is '10000', not a positive",
        ),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta is 0, not a positive number"),
    ],
)
def test_positions_that_we_do_not_have_are_refused_by_name(
    kind: str, change: dict[str, Any], words: str
) -> None:
    config = with_old_base(written(MODELS[kind]), THETA) | change
    if kind == "glm4_moe" and "partial_rotary_factor" in words:
        config["partial_rotary_factor"] = 0.25  # which is a GLM's, but not with another in a section
        assert read(config | {"rope_parameters": None}).rope_share == 0.25
        config["rope_scaling"] = {"partial_rotary_factor": 0.5}
        words = "partial_rotary_factor is 0.25, rope"
    with pytest.raises(UserError) as caught:
        read(config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


YARN = replace(LLAMA, yarn=Yarn(factor=4, original_tokens=32))


@pytest.mark.parametrize("kind", ["dbrx", "mixtral", "olmoe"])
def test_dense_layers_among_experts_are_refused_by_name(kind: str) -> None:
    model = replace(MODELS[kind], moe=replace(EXPERTS, dense_layers=1))
    with pytest.raises(
        UserError, match=rf"{kind} needs [^;]*experts in every layer \(model.moe.dense_layers=0"
    ):
        written(model)


def test_biases_and_heads_rotated_in_part_are_exported_by_few() -> None:
    assert read(written(QWEN3) | {"use_sliding_window": None}) == QWEN3
    for change, need in (
        ({"qkv_bias": True}, "model.qkv_bias=false"),
        ({"rope_share": 0.5}, "model.rope_share=1"),
    ):
        with pytest.raises(UserError) as caught:
            written(replace(QWEN3, **change))
        reasons = dict(each.split(" needs ", 1) for each in str(caught.value).partition(": ")[2].split("; "))
        assert {kind for kind, words in reasons.items() if need in words.split(", ")} >= {
            "llama",
            "qwen3",
            "dots1",
        }
        assert need not in reasons["glm4_moe"]
    for factor in ("0.5", 0, 1.5, True):
        with pytest.raises(
            UserError, match=f"^partial_rotary_factor is {factor!r}, not a fraction of a head$"
        ):
            read(written(MODELS["glm4_moe"]) | {"partial_rotary_factor": factor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_only_layers": [0, 2]}, "mlp_only_layers is [0, 2]; only the first layers"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
    ],
)
def test_layers_that_we_do_not_have_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(written(MODELS["qwen3_moe"]) | change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"score": Score.softmax}, "model.moe.score=sigmoid"),
        ({"group_score": GroupScore.max}, "model.moe.group_score=top2_sum"),
        ({"shared_gate": True}, "model.moe.shared_gate=false"),
        ({"shared_hidden_size": None}, "model.moe.shared_hidden_size of whole experts"),
        ({"shared_hidden_size": 60}, "model.moe.shared_hidden_size of whole experts"),
        ({"dense_layers": 0, "every_n_layers": 2}, "model.moe.every_n_layers=1"),
        ({"normalize_weights_p": 2.0}, "model.moe.normalize_weights_p=1 or null"),
    ],
)
def test_experts_that_no_architecture_has_are_refused_by_name(moe: dict[str, Any], words: str) -> None:
    model = MODELS["dots1"]
    assert model.moe is not None
    with pytest.raises(UserError) as caught:
        written(replace(model, moe=replace(model.moe, **moe)))
    assert words in str(caught.value).partition("dots1 needs ")[2]


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4096, "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
    ],
)
def test_windows_of_dots_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"sliding_window is [0-9]+; only null can be expressed"):
        read(written(MODELS["dots1"]) | change)


PUBLISHED_V3 = {
    "model_type": "deepseek_v3",
    **{"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1},
    **{"first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02},
    **{"intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840},
    **{"moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1},
    **{"pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    **{"rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
        **{"original_max_position_embeddings": 4096, "type": "yarn"},
    },
    **{"seq_aux": True, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc"},
    **{"use_cache": True, "v_head_dim": 128, "vocab_size": 129280},
}
"""DeepSeek-V3's, without the section on fp8."""


def test_the_recipe_of_deepseek_v3_is_the_published_model() -> None:
    """After the extension of its context, and with what a checkpoint's config does not say of training."""
    overrides = ["model.yarn={factor: 40, original_tokens: 4096}", "model.max_sequence_tokens=163840"]
    overrides += ["model.mtp=true"]  # which the 671B of the recipe's name leave out
    ours = load_recipe(Path(__file__).parents[3] / "yamls" / "deepseek-v3.yaml", overrides).model
    theirs = read(PUBLISHED_V3)
    assert ours.moe is not None and theirs.moe is not None
    training = ("balance", "balance_scope", "balance_loss_weight", "bias_update_rate")
    moe = replace(ours.moe, **{name: getattr(theirs.moe, name) for name in training})
    assert replace(ours, moe=moe, init_std=theirs.init_std) == theirs
    again = written(theirs)
    differing = {key for key, value in PUBLISHED_V3.items() if again.get(key, value) != value}
    assert differing == {"rope_scaling"}
    assert read(again) == theirs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8'; convert the weights"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; only 4"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; only 1e-06"),
        ({"topk_method": "random"}, "topk_method is 'random'; only"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1"),
        ({"rope_interleave": False}, "rope_interleave is False; only True"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True; only False"),
        ({"kv_lora_rank": None}, "kv_lora_rank is None, not a positive number"),
    ],
)
def test_what_deepseek_may_have_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    refused = []
    for kind in DEEPSEEKS:
        try:
            read(written(MODELS[kind]) | change)
        except UserError as error:
            refused.append(words in str(error))
    only_one = change.keys() & {"rope_interleave", "norm_topk_prob"}  # V3 only, V2 only
    assert refused == ([True] if only_one else [True, True])


def test_yarn_of_latent_attention_is_in_deepseeks_words() -> None:
    for factor in (None, 0.1 * 0.707 * math.log(4) + 1):
        yarn = Yarn(factor=4, original_tokens=32, attention_factor=factor)
        model = replace(MODELS["deepseek_v2"], yarn=yarn)
        config = written(model)
        words = [config["rope_scaling"][key] for key in ("mscale", "mscale_all_dim")]
        assert words == pytest.approx([1.0 if factor is None else 0.707] * 2)
        assert "attention_factor" not in config["rope_scaling"]
        found = read(config).yarn
        assert found is not None and found.attention_factor == pytest.approx(factor)
        for change in ({"mscale": 2.0}, {"mscale_all_dim": None}, {"attention_factor": 1.0}):
            both = {key: config[key] | change for key in ("rope_scaling", "rope_parameters")}
            with pytest.raises(UserError, match=r"only the last two can be expressed, if they are equal"):
                read(config | both)
    with pytest.raises(UserError, match=r"deepseek_v2 needs model\.yarn\.attention_factor other than 1"):
        written(replace(model, yarn=replace(yarn, attention_factor=1.0)))


def test_both_spellings_of_yarn_are_read_as_the_same_model() -> None:
    config = written(YARN)
    assert read(config) == YARN
    assert [read(view) == YARN for view in views(config)] == [True, True]
    without = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    assert read(without | {"rope_scaling": config["rope_scaling"]}) == YARN
    assert read(without | {"rope_parameters": config["rope_parameters"]}) == YARN
    # DeepSeek's spelling: a ratio of two factors.
    scaling = config["rope_scaling"] | {"mscale": 2.0, "mscale_all_dim": 1.0}
    found = read(without | {"rope_scaling": scaling}).yarn
    assert found is not None and found.attention_factor == pytest.approx(
        (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": None}, "rope_scaling.factor is None, not a number"),
        (
            {"original_max_position_embeddings": None},
            "original_max_position_embeddings is None, not a number",
        ),
        ({"factor": 2.0}, "rope_parameters and rope_scaling have different yarn; they must"),
        ({"truncate": False}, "rope_scaling.truncate is False, which cannot be expressed"),
        ({"rope_type": "longrope"}, "rope_scaling.rope_type is 'longrope'; only 'default' and 'yarn' can"),
    ],
)
def test_yarn_that_we_do_not_have_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    config = written(YARN)
    config["rope_scaling"] = config["rope_scaling"] | change
    with pytest.raises(UserError) as caught:
        read(config)
    assert words in str(caught.value)


def test_yarn_that_versions_read_differently_is_neither_read_nor_written() -> None:
    config = written(YARN) | {"max_position_embeddings": 96}
    with pytest.raises(UserError, match="factor is 4, but max_position_embeddings=96 is not that many times"):
        read(config)
    with pytest.raises(
        UserError, match=r"llama needs model\.max_sequence_tokens = model\.yarn\.original_tokens"
    ):
        written(replace(YARN, max_sequence_tokens=96))


def test_bases_that_differ_are_named_with_their_places() -> None:
    """As transformers 5 writes a DBRX that it read from an older config."""
    config = with_old_base(written(DBRX), THETA) | {"rope_parameters": {"rope_theta": 1e4}}
    words = (
        r"^attn_config.rope_theta is 123456.0, rope_parameters.rope_theta is 10000.0; they must be the same$"
    )
    with pytest.raises(UserError, match=words):
        read(config)
