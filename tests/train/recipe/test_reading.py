"""Recipes: merging, one-line errors, and a use for every key."""

import ast
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from train.recipe.aliases import ALIASES
from train.recipe.catalogue import schema_keys
from train.recipe.errors import JoinedUserError, UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.rules import validate
from train.recipe.schema import Balance
from train.recipe.topology import Topology

ROOT = Path(__file__).resolve().parents[3]
SMOKE = str(ROOT / "yamls/smoke.yaml")
DECLARING = {
    "schema.py",
    "architecture.py",
    "optimization.py",
    "preparation.py",
    "reliability.py",
    "rules.py",
    "layout_rules.py",
}
"""Modules of the schema and its rules: what only they name is not read."""


def test_resolved_recipe_reads_back_to_itself(tmp_path: Path) -> None:
    overrides = [
        "schedule.kind=wsd",
        "schedule.decay_tokens=1000",
        "model.moe.balance=bias",
        "optimizer.betas=[0.8,0.9]",
    ]
    recipe = load_recipe(SMOKE, overrides)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.model.moe is not None and recipe.model.moe.balance is Balance.bias


def test_extends_merges_over_the_base_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text(
        f"extends: {SMOKE}\nname: child\nmodel: {{n_layers: 7, moe: {{top_k: 2}}}}\n"
    )
    base, child = load_recipe(SMOKE), load_recipe(tmp_path / "child.yaml", ["model.moe.top_k=3"])
    assert (child.name, child.model.n_layers, child.model.d_model) == ("child", 7, base.model.d_model)
    assert child.model.moe is not None and child.model.moe.top_k == 3
    assert load_recipe(tmp_path / "child.yaml", ["model.moe=null"]).model.moe is None


def test_a_mixture_replaces_that_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text(f"extends: {SMOKE}\ndata: {{domains: {{prose: 1.0}}}}\n")
    assert load_recipe(tmp_path / "child.yaml").data.domains == {"prose": 1.0}
    assert load_recipe(SMOKE, ["data.domains={code: 1.0}"]).data.domains == {"code": 1.0}
    one = ["data.domains.code=0.3", "data.domains.prose=0.7"]
    assert load_recipe(SMOKE, one).data.domains == {"code": 0.3, "prose": 0.7}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.moe.topk=2", "command line: model.moe.topk: unknown key; did you mean `model.moe.top_k`?"),
        ("optimizer.betas=[0.9]", f"{SMOKE}: optimizer.betas: is [0.9]; two numbers in [0, 1)"),
        ("optimizer.qk_clip=100", f"{SMOKE}: optimizer.qk_clip: is not built for model.clip_qkv, which"),
        ("model.d_model=wide", "command line: model.d_model: Value 'wide' of type 'str'"),
        (
            "optimizer.kind=sgd",
            "command line: optimizer.kind: Invalid value 'sgd', expected one of [adamw, lion, muon]",
        ),
        (
            "schedule.decay_tokens=5",
            "command line: schedule.decay_tokens: nothing reads this key unless schedule.kind == wsd",
        ),
        (
            "data.sources=[{domain: code, kind: chat, path: a, dataset: d, version: 1, origin: o, "
            "licence: l}]",
            f"{SMOKE}: training.loss_mean: is positions, but data.sources has conversations",
        ),
        (
            "optimizer.momentum=0.9",
            "command line: optimizer.momentum: nothing reads this key unless optimizer.kind == muon",
        ),
        ("optimizer={kind: lion, eps: 1e-6}", "unless optimizer.kind == adamw or muon; remove it, or set "),
        (
            "model.moe.bias_update_rate=1",
            "command line: model.moe.bias_update_rate: nothing reads this key unless",
        ),
        ("clip_norm", "`clip_norm` is not key=value"),
        ("model.moe.top_k=17", f"{SMOKE}: model.moe.top_k: top_k=17 exceeds experts=16"),
        (
            "training.microbatch_sequences=5",
            f"{SMOKE}: training.microbatch_sequences: 8 sequences of each rank",
        ),
        ("model.n_heads=3", f"{SMOKE}: model.n_heads: d_model=128 is not divisible by n_heads=3"),
        ("model.n_kv_heads=3", f"{SMOKE}: model.n_kv_heads: n_heads=4 is not divisible by n_kv_heads=3"),
        (
            "model.vocab_size=1000",
            f"{SMOKE}: model.vocab_size: 1000 rows, but the tokenizer makes ids up to 4095",
        ),
        ("data.domains.code=0.6", f"{SMOKE}: data.domains: shares add up to 1.1"),
        (
            "data.validation_domains=[music]",
            f"{SMOKE}: data.validation_domains: music is not in the installed corpus",
        ),
        (
            "data.validation_domains=[code]",
            f"{SMOKE}: data.validation_domains: code is already in data.domains",
        ),
        ("data.cache_bytes=9", f"{SMOKE}: data.cache_bytes: limits the cache of data.remote, which is null"),
        ("data.remote=s3://x", f"{SMOKE}: data.corpus: builds shards, but data.remote says where they are"),
        (
            "data.sequence_tokens=1024",
            f"{SMOKE}: data.sequence_tokens: 1024 exceeds model.max_sequence_tokens=512",
        ),
        ("training.duration_tokens=100", f"{SMOKE}: training.duration_tokens: 100 is less than one batch"),
        ("data.skips[-1].end_position=3", "command line: data.skips: is a list, whose items have numbers"),
        ("data.sources[web].path=/x", "command line: data.sources: is a list, whose items have numbers"),
        ("data.domains=[code]", "command line: data.domains: has keys, and no list of items"),
        (
            "data.domains={code: {share: 1}}",
            f"{SMOKE}: data.domains.code: is {{'share': '1'}}; give a single",
        ),
        ("seed=99999999999999999999", f"{SMOKE}: seed: is 99999999999999999999; must fit into 64 bits"),
        ("seed=4294967296", f"{SMOKE}: seed: is 4294967296; must lie in [0, 4e+09]"),
        ("name=' a'", f"{SMOKE}: name: ' a' is not a folder name: it begins or ends with a blank"),
        ("schedule.warmup_tokens=99000000", f"{SMOKE}: schedule.warmup_tokens: 99000000 exceeds"),
        ("optimizer.learning_rate=-1", f"{SMOKE}: optimizer.learning_rate: is -1.0; must be above 0"),
        ("training.clip_norm=.nan", f"{SMOKE}: training.clip_norm: is nan; must be above 0"),
        ("model.ffn=mlp", f"{SMOKE}: model.ffn: experts are GLUs"),
        (
            "model.moe={dense_layers: 3, every_n_layers: 6}",
            f"{SMOKE}: model.moe.dense_layers: dense_layers=3 and every_n_layers=6 leave none of n_layers=4",
        ),
        (
            "model={head_width: 20, rope_share: 0.25}",
            f"{SMOKE}: model.rope_share: rotates 5 of head_width=20 elements, and RoPE rotates pairs",
        ),
        ("model.head_width=33", f"{SMOKE}: model.head_width: head_width=33 is odd, and RoPE rotates pairs"),
        (
            "model={n_kv_heads: 4, latent: {kv_rank: 16, nope_width: 16, rope_width: 7, v_width: 16}}",
            f"{SMOKE}: model.latent.rope_width: rope_width=7 is odd, and RoPE rotates pairs",
        ),
        (
            "model={n_kv_heads: 4, latent: {kv_rank: 16, nope_width: 8, rope_width: 8, v_width: 24}}",
            f"{SMOKE}: model.latent.v_width: v_width=24 exceeds nope_width + rope_width = 16",
        ),
        (
            "model={n_kv_heads: 1, latent: {kv_rank: 16, nope_width: 8, rope_width: 8, v_width: 8}}",
            f"{SMOKE}: model.n_kv_heads: n_kv_heads=1 differs from n_heads=4, but every latent head has",
        ),
        (
            "model={n_kv_heads: 4, qkv_bias: true, "
            "latent: {kv_rank: 4, nope_width: 8, rope_width: 8, v_width: 8}}",
            f"{SMOKE}: model.qkv_bias: is not for model.latent; remove it: its products have no biases",
        ),
        (
            "model={n_kv_heads: 4, qk_norm: true, "
            "latent: {kv_rank: 4, nope_width: 8, rope_width: 8, v_width: 8}}",
            f"{SMOKE}: model.qk_norm: is not for model.latent; remove it: the vectors of q_rank and kv_rank",
        ),
        (
            "model.qk_norm_over=each_head",
            "command line: model.qk_norm_over: nothing reads this key unless model.qk_norm == True",
        ),
        (
            "model.yarn={factor: 4, original_tokens: 512}",
            f"{SMOKE}: model.max_sequence_tokens: 512 does not exceed model.yarn.original_tokens=512",
        ),
        (
            "model.yarn={factor: 4, original_tokens: 128, beta_slow: 40}",
            f"{SMOKE}: model.yarn.beta_slow: beta_slow=40.0 is not below beta_fast=32.0",
        ),
        (
            "model={position: alibi, yarn: {factor: 4, original_tokens: 128}}",
            f"{SMOKE}: model.yarn: stretches RoPE, but model.position is not rope",
        ),
        (
            "parallelism.expert=2",
            f"{SMOKE}: parallelism: 1 ranks are not divisible by replicate=1 x expert=2",
        ),
        ("model.moe.groups=3", f"{SMOKE}: model.moe.groups: experts=16 is not divisible by groups=3"),
        ("model.moe.top_groups=2", f"{SMOKE}: model.moe.top_groups: top_groups=2 exceeds groups=1"),
        ("model.moe.groups=8", f"{SMOKE}: model.moe.top_groups: 1 groups have 2 experts, but top_k=4"),
        ("model.moe={groups: 16, top_groups: 4}", f"{SMOKE}: model.moe.group_score: top2_sum needs two"),
        ("model.moe.shared_gate=true", f"{SMOKE}: model.moe.shared_gate: is the gate of a shared expert"),
        ("model.moe.forced_balance=true", f"{SMOKE}: name: 'smoke' hides that model.moe.forced_balance"),
        (
            "model.moe={balance: bias, balance_scope: sequence}",
            "model.moe.balance_scope: nothing reads this key unless model.moe.balance == loss or both; "
            "remove it, or set model.moe.balance=loss",
        ),
        (
            "parallelism.exchange_precision=fp8",
            f"{SMOKE}: parallelism.exchange_precision: is of the exchange of tokens, but with",
        ),
        ("training.offload=true", f"{SMOKE}: training.offload: is true, but no layer recomputes `layer`"),
        (
            "training.offload=true; training.recompute=layer; training.compile=blocks",
            f"{SMOKE}: training.offload: is true, but training.compile is blocks",
        ),
        ("parallelism.interleave=true", f"{SMOKE}: parallelism.interleave: hides the exchange of tokens"),
        (
            "training.expert_precision=fp8",
            f"{SMOKE}: model.ffn_hidden_size: 224 is not divisible by 128, the numbers that share a scale in "
            "fp8; make it a multiple of 128, or remove training.expert_precision",
        ),
        (
            "model.moe.expert_hidden_size=60; training.expert_precision=mxfp8",
            f"{SMOKE}: model.moe.expert_hidden_size: 60 is not divisible by 32",
        ),
        (
            "model.moe=null; training.expert_precision=fp8",
            f"{SMOKE}: training.expert_precision: is fp8, but the model is dense",
        ),
        (
            "training.compile=blocks; training.expert_precision=fp8",
            f"{SMOKE}: training.expert_precision: is not built for compiled layers",
        ),
        ("parallelism.context=2", f"{SMOKE}: parallelism.context: 1 ranks are not divisible by context=2"),
        ("name=a/b", f"{SMOKE}: name: 'a/b' is not a folder name"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_remedy(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe = load_recipe(SMOKE, override.split("; "))
        validate(recipe, Topology(), SMOKE)
    line = str(caught.value.at(SMOKE))
    assert "\n" not in line
    assert expected in line


INTERLEAVED = ["parallelism.expert=2", "parallelism.interleave=true", "training.microbatch_sequences=2"]


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("training.microbatch_sequences=1", "halves microbatches, but"),
        ("training.compile=blocks", "is not built for compiled layers"),
        ("seed=1", None),
    ],
)
def test_only_even_microbatches_that_are_not_compiled_are_interleaved(
    override: str, refusal: str | None
) -> None:
    recipe = load_recipe(SMOKE, [*INTERLEAVED, override])
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        validate(recipe, Topology(world_size=2), SMOKE)


def test_steps_are_compared_bit_for_bit_only_if_they_are_deterministic() -> None:
    recipe = load_recipe(SMOKE, ["guard.recheck_interval_batches=100", "training.deterministic=false"])
    with pytest.raises(UserError, match=r"guard\.recheck_interval_batches: .*\.deterministic is false"):
        validate(recipe, Topology(), SMOKE)


@pytest.mark.parametrize(("d_model", "is_refused"), [(192, True), (256, False)])
def test_tokens_of_whole_tiles_are_sent_in_fp8(d_model: int, is_refused: bool) -> None:
    overrides = ["parallelism={expert: 2, exchange_precision: fp8}", "training.microbatch_sequences=2"]
    recipe = load_recipe(SMOKE, [*overrides, f"model.d_model={d_model}"])
    refusal = r"model\.d_model: 192 is not divisible by 128, the numbers of a token"
    with pytest.raises(UserError, match=refusal) if is_refused else nullcontext():
        validate(recipe, Topology(world_size=2), SMOKE)


@pytest.mark.parametrize(
    ("expert", "local", "refusal"),
    [
        (4, 4, "sends tokens once per node of 4 ranks, but groups of expert=4 lie within one; remove it"),
        (
            4,
            3,
            "cuts groups of expert=4 into nodes of 3 ranks, which does not divide them; use a divisor of 4",
        ),
        (4, 1, "is 1; must be above 1"),
        (4, 2, None),
    ],
)
def test_tokens_are_sent_once_per_node_where_groups_span_whole_nodes(
    expert: int, local: int, refusal: str | None
) -> None:
    expected = f"parallelism.exchange_node_ranks: {refusal}"
    with nullcontext() if refusal is None else pytest.raises(UserError, match=re.escape(expected)):
        layout = f"parallelism={{expert: {expert}, exchange_node_ranks: {local}}}"
        recipe = load_recipe(SMOKE, [layout, "training.microbatch_sequences=1"])
        validate(recipe, Topology(world_size=4), SMOKE)


BY_GROUP = ["model.moe.balance_scope=expert_group", "training.microbatch_sequences=1"]


@pytest.mark.parametrize(
    ("overrides", "ranks", "refusal"),
    [
        (["parallelism.context=4"], 4, None),
        (
            ["parallelism.context=8", "training.global_batch_sequences=3"],
            24,
            "1 sequences of each group are not",
        ),
        (
            ["parallelism.context=2", "training.global_batch_sequences=1"],
            4,
            "1 is not divisible by 2 groups of 2",
        ),
        (["parallelism.context=3"], 3, "cuts sequences into 6 chunks, but 512 tokens are not"),
        (["parallelism.context=2", "model.mtp=true"], 2, None),
        (["parallelism.context=2", "training.compile=blocks"], 2, "is not built for compiled layers"),
        ([*INTERLEAVED, "parallelism.context=2"], 2, None),
        (["parallelism.context=2", "parallelism.expert=1", *BY_GROUP], 2, None),
        (["parallelism.context=4", "parallelism.expert=2", *BY_GROUP], 4, None),
        (
            [
                "parallelism.context=2",
                "parallelism.expert=3",
                "model.moe.experts=24",
                "training.global_batch_sequences=3",
                *BY_GROUP,
            ],
            6,
            "cut through",
        ),
    ],
)
def test_ranks_share_sequences_that_they_can_cut_evenly(
    overrides: list[str], ranks: int, refusal: str | None
) -> None:
    recipe = load_recipe(SMOKE, overrides)
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        validate(recipe, Topology(world_size=ranks), SMOKE)


IN_PHASES = [
    "data.phases=[{tokens: 4800, weights: {code: 1.0}},"
    " {tokens: 4800, weights: {code: 1.0}, sequence_tokens: 12}]",
    *("data.sequence_tokens=6", "training.duration_tokens=9600", "schedule.warmup_tokens=0"),
    "training.microbatch_sequences=2",
]
FIRST, SECOND = "data.phases[0].context", "data.phases[1].context"


@pytest.mark.parametrize(
    ("overrides", "ranks", "refusal"),
    [
        ([f"{SECOND}=2"], 2, ""),
        (["parallelism.context=2", f"{FIRST}=1"], 2, ""),
        (["parallelism.context=2"], 2, "parallelism.context: cuts sequences into 4 chunks, but 6 tokens"),
        ([f"{FIRST}=2"], 2, f"{FIRST}: cuts sequences into 4 chunks, but 6 tokens are not divisible by that"),
        ([f"{SECOND}=3"], 2, f"{SECOND}: 2 ranks are not divisible by context=3; use a divisor of 2"),
        ([f"{SECOND}=2", "parallelism.tensor=2"], 4, f"is not built for {SECOND}=2; remove either"),
        ([f"{SECOND}=2", "training.compile=blocks"], 2, f"{SECOND}: is not built for compiled layers"),
        (
            ["parallelism.context=3", f"{SECOND}=1"],
            9,
            "4 sequences of 12 tokens are not divisible by 9 ranks",
        ),
        ([f"{SECOND}=0"], 2, f"{SECOND}: is 0; must be above 0"),
    ],
)
def test_the_layout_of_each_phase_is_checked(overrides: list[str], ranks: int, refusal: str) -> None:
    recipe = load_recipe(SMOKE, [*IN_PHASES, *overrides])
    with pytest.raises(UserError) if refusal else nullcontext() as caught:
        validate(recipe, Topology(world_size=ranks), SMOKE)
    if caught is not None:
        lines = [str(each) for each in getattr(caught.value, "errors", [caught.value])]
        assert any(refusal in line for line in lines), lines


@pytest.mark.parametrize(
    ("overrides", "ranks", "refusal"),
    [
        (["parallelism.tensor=2", "parallelism.expert=2"], 4, None),
        ([*INTERLEAVED, "parallelism.tensor=2"], 2, None),
        (["parallelism.tensor=4"], 2, "2 ranks are not divisible by replicate=1 x tensor=4"),
        (["parallelism.tensor=4", "parallelism.replicate=2"], 4, "divisible by replicate=2 x tensor=4"),
        (["parallelism.tensor=3"], 3, "cuts sequences into 3 parts, but 512 tokens are not"),
        (["parallelism.tensor=8"], 8, "splits heads over 8 ranks, but model.n_kv_heads="),
        (["parallelism.tensor=2", "model.mtp=true"], 2, None),
        (
            ["parallelism.tensor=2", "optimizer.qk_clip=9", "model.clip_qkv=null"],
            2,
            "is not built for optimizer.qk_clip",
        ),
        (["parallelism.tensor=2", "model.qkv_bias=true"], 2, "is not built for model.qkv_bias"),
        (["parallelism.tensor=2", "model.qk_norm=true"], 2, "is not built for model.qk_norm_over=all_heads"),
        (["parallelism.tensor=2", "training.compile=blocks"], 2, "is not built for training.compile=blocks"),
        (["parallelism.tensor=2", "optimizer.kind=muon"], 2, "is not built for optimizer.kind=muon"),
        (["parallelism.tensor=2", "optimizer.moments=bf16"], 2, "is not built for optimizer.moments=bf16"),
        (["parallelism.tensor=2", "parallelism.context=2"], 4, "is not built for parallelism.context=2"),
    ],
)
def test_ranks_share_dense_weights_that_they_can_split(
    overrides: list[str], ranks: int, refusal: str | None
) -> None:
    recipe = load_recipe(SMOKE, ["training.microbatch_sequences=1", *overrides])
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        validate(recipe, Topology(world_size=ranks), SMOKE)


STAGES = ["parallelism.pipeline=2", "model.tie_embeddings=false"]


@pytest.mark.parametrize(
    ("overrides", "ranks", "refusal"),
    [
        (["parallelism.expert=2"], 4, None),
        (["parallelism.pipeline_layers=[1,3]"], 2, None),
        (["parallelism.pipeline_chunks=2"], 2, None),
        (["parallelism.expert=2"], 2, "2 ranks are not divisible by replicate=1 x expert=2 x pipeline=2"),
        (["parallelism.pipeline=8"], 8, "cuts the model into 8 parts, but it has 4 layers"),
        (["parallelism.pipeline_layers=[2,1]"], 2, "gives 2 parts 3 layers, but there are 2 parts and 4"),
        (["parallelism.pipeline_layers=[4]"], 2, "gives 1 parts 4 layers"),
        (["parallelism.pipeline=1", "parallelism.pipeline_chunks=2"], 1, "but parallelism.pipeline is 1"),
        (["parallelism.pipeline_chunks=2", "training.global_batch_sequences=3"], 2, "but a batch has 3"),
        (["model.mtp=true"], 2, None),
        (["model.tie_embeddings=true"], 2, None),
        (["parallelism.context=2"], 4, "is not built for parallelism.context=2"),
        (["parallelism.tensor=2"], 4, None),
        (["parallelism.tensor=2"], 2, "2 ranks are not divisible by replicate=1 x tensor=2 x pipeline=2"),
        (["training.compile=blocks"], 2, "is not built for training.compile=blocks"),
        (["parallelism.gathered_layers=1", "optimizer.moments=bf16"], 2, None),
        (["optimizer.qk_clip=9", "model.clip_qkv=null", "checkpoint.memory_interval_batches=1"], 2, None),
        (
            ["parallelism.gathered_layers=1", "parallelism.pipeline_chunks=2"],
            2,
            "is not built for parallelism.gathered_layers=1 in several chunks",
        ),
        (["training.recompute=layer", "training.offload=true"], 2, "is not built for training.offload"),
        (["guard.recheck_interval_batches=9"], 2, "is not built for guard.recheck_interval_batches"),
    ],
)
def test_stages_share_what_a_pipeline_can_cut(overrides: list[str], ranks: int, refusal: str | None) -> None:
    recipe = load_recipe(SMOKE, [*STAGES, "training.microbatch_sequences=1", *overrides])
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        validate(recipe, Topology(world_size=ranks), SMOKE)


@pytest.mark.parametrize(("ranks", "is_refused"), [(18, True), (16, False)])
def test_experts_whose_rows_do_not_shard_evenly_are_refused(ranks: int, is_refused: bool) -> None:
    """The recipe check fails first, not FSDP2 in the middle of a start on all GPUs."""
    overrides = ["parallelism.expert=2", f"training.global_batch_sequences={ranks}"]
    recipe = load_recipe(SMOKE, [*overrides, "training.microbatch_sequences=1"])
    if not is_refused:
        validate(recipe, Topology(0, ranks, 0, 1), SMOKE)
        return
    with pytest.raises(UserError, match=r"parallelism\.replicate: .* do not shard evenly over 18 ranks"):
        validate(recipe, Topology(0, ranks, 0, 1), SMOKE)


def test_a_base_recipes_key_is_let_go_when_a_later_layer_chooses_otherwise(tmp_path: Path) -> None:
    (tmp_path / "wsd.yaml").write_text(f"extends: {SMOKE}\nschedule: {{kind: wsd, decay_tokens: 1000}}\n")
    assert load_recipe(tmp_path / "wsd.yaml", ["schedule.kind=cosine"]).schedule.kind.value == "cosine"
    with pytest.raises(UserError, match="nothing reads"):
        load_recipe(tmp_path / "wsd.yaml", ["schedule.kind=cosine", "schedule.decay_tokens=9"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "is not YAML"),
        ("- a\n- b\n", "is not a mapping"),
        ("extends: other.yaml\n", "no such recipe"),
        ("extends: self.yaml\n", "extends itself"),
        ("seed: 1\n", "name: is missing"),
        ("data: &again [*again]\n", "nested too deeply, or contains itself"),
        ("[" * 500, "nested too deeply, or contains itself"),
        ("extends: folder\n", "is a folder, not a recipe"),
        ("extends: link.yaml\n", "is a link to gone.yaml, which is no file; "),
        ('name: t\ndata: {shards: "a\\0b"}\n', r"data.shards: 'a\x00b' has a NUL character; write"),
        ('name: t\ndata: {domains: {"a\\0b": 1}}\n', r"data.domains: 'a\x00b' has a NUL character; write"),
        ("name: t\nmodel:\n", "model: is empty; "),
        ("name:\n", "name: is empty; it means: Name of the run"),
        ("name: t\nmodel: {moe: 3}\n", "model.moe: has keys of its own, and no value; model.moe.KEY=VALUE"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "self.yaml").write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.yaml").symlink_to("gone.yaml")
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "self.yaml")
    assert (
        expected in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    )


def test_bytes_of_the_command_line_that_are_no_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.shards: .*udcff.* has bytes that are not UTF-8"):
        load_recipe("yamls/smoke.yaml", [os.fsdecode(b"data.shards=/data/\xff")])


def test_the_command_line_answers_within_seconds_and_without_torch() -> None:
    begin = time.monotonic()
    code = (
        "import sys; sys.argv = ['train/main.py', 'yamls/smoke.yaml', 'model.moe.top_k=99'];"
        "import runpy\n"
        "try: runpy.run_path('train/main.py', run_name='__main__')\n"
        "except SystemExit as e: print('status', e.code, 'torch' in sys.modules)"
    )
    # runpy leaves sys.path[0] alone; main.py replaces it as it would the script's own folder.
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "status 2 False"
    assert result.stderr.strip().count("\n") == 0 and "top_k=99 exceeds" in result.stderr
    assert time.monotonic() - begin < 30  # A bound against hanging, not a measurement.


def test_every_key_of_the_schema_is_read_somewhere() -> None:
    """A key that no code reads would be accepted and ignored."""
    read: set[str] = set()
    for folder in ("train", "data", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.parent.name == "recipe" and file.name in DECLARING:
                continue
            read |= {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
    unread = [key for key in schema_keys() if key.rsplit(".", 1)[-1] not in read]
    assert unread == []


def mistakes(path: str | Path, overrides: list[str]) -> list[str]:
    """Returns the lines of everything that is wrong with a recipe."""
    with pytest.raises(UserError) as caught:
        validate(load_recipe(path, overrides), Topology(), str(path))
    error = caught.value
    return [str(each) for each in (error.errors if isinstance(error, JoinedUserError) else (error,))]


def test_all_mistakes_are_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("extends: base.yaml\nmodel: {d_modell: 3, n_layers: many}\nsede: 4\n")
    (tmp_path / "base.yaml").write_text(f"extends: {SMOKE}\ntrain: 3\n")
    found = mistakes(file, ["model.n_heads=x", "optimizer.lr=3", "data.phases[4].tokens=3"])
    keys = ["train", "model.d_modell", "model.n_layers", "sede", "model.n_heads", "optimizer.lr"]
    assert [line.split(": ")[1] for line in found] == [*keys, "data.phases[4]"]
    assert "did you mean `model.d_model`" in found[1] and "here it is optimizer.learning_rate" in found[5]
    assert found[0].startswith(str(tmp_path / "base.yaml")) and found[6].startswith("command line")
    # Nine keys of a source.
    file.write_text("name: x\ndata: {sources: [{kind: text}]}\n")
    found = mistakes(file, [])
    assert all(line.endswith("to the recipe") and ": is missing; add" in line for line in found)
    assert [line.split(": ")[1] for line in found if "sources" in line] == [
        f"data.sources[0].{name}" for name in ("domain", "path", "dataset", "version", "origin", "licence")
    ]
    # Violated rules, of several sections, also those that rest on another.
    found = mistakes(SMOKE, ["model.n_heads=3", "model.moe.top_k=99", "data.validation_domains=[music]"])
    assert [line.split(": ")[1] for line in found] == [
        *("model.n_heads", "model.n_kv_heads", "model.moe.top_k", "data.validation_domains")
    ]
    assert len(mistakes(SMOKE, ["seed=-1", "training.clip_norm=-1"])) == 2
    assert len(mistakes(SMOKE, ["schedule.decay_tokens=1", "model.moe.bias_update_rate=1"])) == 2
    from train.main import main

    assert main([SMOKE, "seed=-1", "training.clip_norm=-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_keys_of_other_frameworks_are_answered_with_ours() -> None:
    for theirs, ours in ALIASES.items():
        assert theirs not in schema_keys() and re.split(r"[, :]", ours)[0] in schema_keys(), theirs
    for override, ours in (
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("max_duration=10ba", "training.duration_tokens, in tokens"),
        ("global_train_batch_size=8", "training.global_batch_sequences"),
        ("max_seq_len=9", "data.sequence_tokens, and at least as large model.max_sequence_tokens"),
    ):
        key = override.partition("=")[0]
        assert mistakes(SMOKE, [override]) == [f"command line: {key}: unknown key; here it is {ours}"]


def test_one_item_of_a_list_is_changed_on_the_command_line(tmp_path: Path) -> None:
    source = "{domain: d, kind: text, path: a, dataset: x, version: 1, origin: o, licence: l}"
    file = tmp_path / "r.yaml"
    lists = f"corpus: null, sources: [{source}, {source}], skips: [{{first_position: 1, end_position: 2}}]"
    file.write_text(f"extends: {SMOKE}\ndata: {{{lists}}}\n")
    overrides = ["data.sources[1].path=/b#c", "data.skips.0.end_position=2e3", "optimizer.betas[1]=0.8"]
    recipe = load_recipe(file, [*overrides, "data.sources[0].licence=3.10"])
    assert [(each.path, each.licence) for each in recipe.data.sources] == [("a", "3.10"), ("/b#c", "l")]
    assert recipe.data.skips[0].end_position == 2000 and recipe.optimizer.betas == [0.9, 0.8]
    (line,) = mistakes(file, ["data.sources[2].path=x"])
    assert "data.sources[2]: is not there: the recipe has 2 of data.sources, numbered from 0" in line
    (line,) = mistakes(file, ["data.sources[0].pth=x"])
    assert "data.sources[0].pth: unknown key; did you mean `data.sources[].path`?" in line


def test_one_phase_is_changed_on_the_command_line() -> None:
    dbrx = Path(__file__).resolve().parents[3] / "yamls/dbrx.yaml"
    before, after = (load_recipe(dbrx, given) for given in ([], ["data.phases[1].tokens=1000000000"]))
    assert [phase.tokens for phase in after.data.phases[::2]] == [
        phase.tokens for phase in before.data.phases[::2]
    ]
    assert after.data.phases[1].tokens == 1_000_000_000 != before.data.phases[1].tokens
