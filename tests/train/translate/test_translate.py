"""Recipes of other frameworks become ours: the same model, batch, length and update rule."""

from pathlib import Path

import pytest

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology
from train.translate.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
Output = pytest.CaptureFixture[str]

FOUNDRY = """
variables: {data_local: ./c4, data_remote: "s3://b/c4", global_seed: 17, max_seq_len: 2048, run_name: llm}
max_seq_len: ${variables.max_seq_len}
run_name: ${variables.run_name}
model:
  name: mpt_causal_lm
  init_device: meta
  d_model: 4096
  n_heads: 32
  n_layers: 32
  expansion_ratio: 4
  max_seq_len: ${max_seq_len}
  vocab_size: 50432
  no_bias: true
  attn_config: {attn_impl: flash, alibi: true}
tokenizer: {name: EleutherAI/gpt-neox-20b, kwargs: {model_max_length: 2048}}
train_loader: {name: text, dataset: {local: "${variables.data_local}", remote: "${variables.data_remote}",
  split: train, shuffle: true, max_seq_len: 2048, shuffle_seed: 17}, drop_last: true, num_workers: 8}
scheduler: {name: cosine_with_warmup, t_warmup: 2000ba, alpha_f: 0.1}
optimizer: {name: decoupled_adamw, lr: 3.0e-4, betas: [0.9, 0.95], eps: 1.0e-08, weight_decay: 3.0e-5}
algorithms: {gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}
max_duration: 63900ba
eval_interval: 1000ba
global_train_batch_size: 2048
seed: ${variables.global_seed}
device_train_microbatch_size: 8
precision: amp_bf16
fsdp_config: {sharding_strategy: FULL_SHARD, activation_checkpointing: true, limit_all_gathers: true}
save_interval: 250ba
"""

TITAN = """
[job]
dump_folder = "./outputs"
[model]
name = "llama3"
flavor = "8B"
[optimizer]
name = "AdamW"
lr = 3e-4
[lr_scheduler]
warmup_steps = 200
decay_ratio = 0.2
min_lr_factor = 0.1
[training]
local_batch_size = 2
global_batch_size = 64
seq_len = 8192
steps = 1000
dataset = "c4"
[parallelism]
tensor_parallel_degree = 1
expert_parallel_degree = 2
[activation_checkpoint]
mode = "selective"
"""


def test_mpt_of_llm_foundry_is_the_mpt_of_our_recipe(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mpt.yaml").write_text(FOUNDRY)
    out = tmp_path / "ours.yaml"
    assert main([str(tmp_path / "mpt.yaml"), "--out", str(out)]) == 0
    notes = out.read_text()
    assert "not translated: fsdp_config.sharding_strategy: FULL_SHARD" in notes
    assert "not translated: tokenizer.name: EleutherAI/gpt-neox-20b" in notes
    assert "decoupled_adamw decays by 3e-05 at the peak" in notes
    tokenizer = ["tokenizer.kind=bpe", "tokenizer.vocab_size=50368", "data.domains={c4: 1.0}"]
    recipe = load_recipe(out, tokenizer)
    validate(recipe, Topology(0, 256, 0, 8), str(out))
    ours = load_recipe(ROOT / "yamls/mpt-7b.yaml")
    assert recipe.model == ours.model
    assert (recipe.name, recipe.seed, recipe.data.remote) == ("llm", 17, "s3://b/c4")
    assert recipe.training.duration_tokens == 63900 * 2048 * 2048
    assert recipe.schedule.warmup_tokens == 2000 * 2048 * 2048
    assert (recipe.optimizer.weight_decay, recipe.optimizer.learning_rate) == (0.1, 3e-4)
    assert recipe.checkpoint.interval_batches == 250 and recipe.training.recompute.value == "layer"
    assert main([str(tmp_path / "mpt.yaml"), "--out", str(out)]) == 2
    assert "ours.yaml exists" in capsys.readouterr().err


def test_experts_of_llm_foundry(tmp_path: Path, capsys: Output) -> None:
    ffn = "ffn_config: {ffn_type: mb_dmoe, mlp_type: glu, ffn_hidden_size: 10752, moe_num_experts: 16,"
    text = FOUNDRY.replace(
        "  expansion_ratio: 4\n",
        f"  {ffn} moe_top_k: 4, moe_loss_weight: 0.05,\n"
        "    moe_normalize_expert_weights: 1, moe_world_size: 8, fc_type: torch}\n"
        "  tie_word_embeddings: false\n",
    )
    text = text.replace("alibi: true", "rope: true, rope_theta: 500000, kv_n_heads: 8, clip_qkv: 8.0")
    for before, after in (
        ("d_model: 4096", "d_model: 6144"),
        ("n_heads: 32", "n_heads: 48"),
        ("n_layers: 32", "n_layers: 40"),
        ("vocab_size: 50432", "vocab_size: 100352"),
        ("device_train_microbatch_size: 8", "device_train_microbatch_size: auto"),
    ):
        text = text.replace(before, after)
    (tmp_path / "dbrx.yaml").write_text(text)
    assert main([str(tmp_path / "dbrx.yaml")]) == 0
    out = tmp_path / "ours.yaml"
    out.write_text(capsys.readouterr().out)
    assert "microbatch_sequences: auto has no counterpart" in out.read_text()
    assert "not translated: model.ffn_config.fc_type: torch" in out.read_text()
    with pytest.raises(UserError, match=r"training.microbatch_sequences: is missing"):
        load_recipe(out)
    recipe = load_recipe(out, ["training.microbatch_sequences=1", "model.max_sequence_tokens=32768"])
    assert recipe.model == load_recipe(ROOT / "yamls/dbrx.yaml").model
    assert recipe.parallelism.expert == 8


def test_torchtitan(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "llama.toml").write_text(TITAN)
    assert main([str(tmp_path / "llama.toml")]) == 0
    out = tmp_path / "ours.yaml"
    out.write_text(capsys.readouterr().out)
    assert "the sizes of llama3 8B are in torchtitan's code" in out.read_text()
    assert "not translated: parallelism.tensor_parallel_degree: 1" in out.read_text()
    sizes = ["d_model=4096", "n_layers=32", "n_heads=32", "n_kv_heads=8", "ffn_hidden_size=14336"]
    given = [f"model.{each}" for each in (*sizes, "vocab_size=128256")]
    recipe = load_recipe(out, [*given, "data.shards=s", "data.domains={c4: 1.0}"])
    batch = 64 * 8192
    assert recipe.training.duration_tokens == 1000 * batch and recipe.training.microbatch_sequences == 2
    schedule = recipe.schedule
    assert schedule.kind.value == "wsd"
    assert schedule.warmup_tokens == schedule.decay_tokens == 200 * batch
    assert recipe.parallelism.expert == 2 and recipe.runs_dir == "./outputs"


def test_their_files_are_recognised_and_others_refused(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "mpt.yaml").write_text(FOUNDRY)
    (tmp_path / "llama.toml").write_text(TITAN)
    for name, origin in (("mpt.yaml", "LLM Foundry"), ("llama.toml", "torchtitan")):
        file = tmp_path / name
        with pytest.raises(UserError) as caught:
            load_recipe(file)
        said = f"looks like a recipe of {origin}; `python -m train.translate {file}` translates it"
        assert str(caught.value) == f"{file}: {said}"
    smoke = str(ROOT / "yamls/smoke.yaml")
    (tmp_path / "torn.yaml").write_text("a: [")
    for file, what in ((smoke, "is a recipe of neither"), (str(tmp_path / "torn.yaml"), "can't be read")):
        assert main([file]) == 2
        assert f"{file}: {what}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ("d_model: 4096", "d_model: [4096]"),
        ("global_train_batch_size: 2048", "global_train_batch_size: many"),
        ("t_warmup: 2000ba", "t_warmup: {a: 1}"),
        ("betas: [0.9, 0.95]", "betas: 3"),
        ("max_duration: 63900ba", "max_duration: [soon]"),
        ("lr: 3.0e-4", "lr: fast"),
    ],
)
def test_a_value_of_another_type_is_no_traceback(
    tmp_path: Path, capsys: Output, wrong: tuple[str, str]
) -> None:
    assert FOUNDRY.count(wrong[0]) == 1
    (tmp_path / "llm.yaml").write_text(FOUNDRY.replace(*wrong))
    status = main([str(tmp_path / "llm.yaml")])
    said = capsys.readouterr()
    assert status == 0 or (status == 2 and len(said.err.splitlines()) == 1 and "llm.yaml" in said.err)
