"""Continued pretraining of a Hugging Face folder with its own tokenizer, from its text to its export."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from train.hf.__main__ import main
from train.hf.folders import model_at
from train.recipe.errors import UserError
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import LossMean, Recipe, Start, Tokenizer, TokenizerKind
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
"""As Mixtral's."""


def _mixtral(folder: Path) -> None:
    """A tiny Mixtral with a SentencePiece tokenizer, as published ones have."""
    import transformers
    from sentencepiece import SentencePieceTrainer

    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def test_a_mixtral_is_trained_on_with_its_own_tokenizer(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train.run import run

    theirs, out = tmp_path / "mixtral", tmp_path / "out"
    _mixtral(theirs)
    assert main(["import", str(theirs), str(tmp_path / "ours")]) == 0
    weights = Start(weights=str(tmp_path / "ours"))

    def recipe_of(name: str, tokenizer: Tokenizer) -> Recipe:
        options = ("training.duration_tokens=2048", "data.corpus_bytes=200000")
        made = tiny_recipe(tmp_path, tmp_path / f"shards-{name}", name, *options)
        return replace(made, model=model_at(tmp_path / "ours")[0], tokenizer=tokenizer, start=weights)

    recipe = recipe_of("own", Tokenizer(TokenizerKind.hf, path=str(theirs)))
    assert run(recipe, Topology()) == 0
    assert main(["export", str(tmp_path / "own"), str(out)]) == 0
    original = SentencePieceProcessor(model_file=str(theirs / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    for text in ("def run(self): return 'Straße 12'", "  two  spaces\n"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(text)
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert (trained.config.bos_token_id, trained.config.eos_token_id) == (1, 2) == (1, tokenizer.eos_token_id)
    assert "fingerprint" in (out / "README.md").read_text()
    assert not torch.equal(
        trained.lm_head.weight,
        AutoModelForCausalLM.from_pretrained(theirs).lm_head.weight,
    )
    _tune(tmp_path, recipe)
    # Another tokenizer is refused, before it is trained with and after.
    other = recipe_of("other", Tokenizer(TokenizerKind.bpe, 512))
    with pytest.raises(UserError, match=r"bpe-\d+ is not the tokenizer that the weights were trained with"):
        run(other, Topology())
    swapped = json.loads((tmp_path / "shards-own/tokenizer.json").read_text())
    swapped["added_tokens"].pop()
    (tmp_path / "shards-own/tokenizer.json").write_text(json.dumps(swapped))
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "again")]) == 2


def _tune(folder: Path, recipe: Recipe) -> None:
    """Tunes the run that there is on chats, as a plain loop of transformers does, and talks to the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.loader import build_train_loader
    from data.opened import OpenedData
    from data.text.engines import Processes
    from data.write_shards import build_shards
    from train.run import run

    tuned = _asked(folder, recipe)
    build_shards(tuned, engine=Processes(1))
    assert run(tuned, Topology()) == 0
    assert main(["export", str(folder / "tuned"), str(folder / "chats")]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = iter(build_train_loader(OpenedData(tuned), rank=0, world_size=1))
    losses, targets = _plain_loop(model, [next(batches), next(batches)])
    lines = [json.loads(line) for line in (folder / "tuned/metrics.jsonl").read_text().splitlines()]
    logged = [line["loss/train"] for line in lines if "loss/train" in line]
    assert logged == pytest.approx(losses, rel=1e-5)
    assert [line["data/asked/targets"] for line in lines if "data/asked/targets" in line] == targets
    talks = AutoModelForCausalLM.from_pretrained(folder / "chats")
    for name, weight in talks.state_dict().items():
        wanted = model.state_dict()[name]
        error = float((weight - wanted).norm() / (wanted - before[name]).norm())
        assert error < 5e-3, f"{name}: {error:.1e}"
    tokenizer = AutoTokenizer.from_pretrained(folder / "chats", local_files_only=True)
    asked = [{"role": "user", "content": "def run"}]
    prompt = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True)
    for inputs in (prompt, tokenizer("def run", return_tensors="pt")):
        answered = talks.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert answered.shape[1] == inputs["input_ids"].shape[1] + 2


def _asked(folder: Path, recipe: Recipe) -> Recipe:
    """Writes chats, and returns the recipe that is tuned on them."""
    with (folder / "asked.jsonl").open("w") as file:
        for n in range(60):
            turns = [
                ("user", f"def run{n}"),
                ("assistant", "return " * (1 + n % 3)),
                ("user", "x"),
                ("assistant", "y"),
            ]
            messages = [{"role": role, "content": words} for role, words in turns[: 2 + n % 2 * 2]]
            file.write(json.dumps({"messages": messages}) + "\n")
    source = Source(
        "asked",
        SourceKind.chat,
        str(folder / "asked.jsonl"),
        dataset="a",
        version="1",
        origin="-",
        licence="-",
    )
    data = replace(
        recipe.data,
        shards=str(folder / "shards-tuned"),
        corpus=None,
        domains={"asked": 1.0},
        sources=[source],
        preparation=Preparation(near_duplicates=None, validation_share=0.1),
        validation_sequences=1,
        workers=0,
    )
    assert recipe.model.moe is not None
    plain = replace(recipe.model.moe, balance_loss_weight=0.0, z_loss_weight=0.0, jitter_eps=0.0)
    return replace(
        recipe,
        name="tuned",
        data=data,
        model=replace(recipe.model, moe=plain),
        start=Start(weights=str(folder / "own")),
        optimizer=replace(recipe.optimizer, learning_rate=0.01, eps=1e-5, weight_decay=0.1),
        schedule=replace(recipe.schedule, warmup_tokens=0, final_share=1.0),
        training=replace(
            recipe.training,
            duration_tokens=1024,
            microbatch_sequences=2,
            clip_norm=0.5,
            loss_mean=LossMean.targets,
        ),
    )


def _plain_loop(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[list[float], list[int]]:
    """Trains on whole batches, a document in each row, with AdamW; returns losses, and targets so far."""
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == is_decayed], "weight_decay": decay}
        for is_decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    # The padding token, which gets no gradient, is here the one that ends turns too.
    model.get_input_embeddings().padding_idx = None
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-5)
    losses, seen = [], [0]
    model.train()
    for batch in batches:
        ids, labels = [], []
        for row, documents in enumerate(batch["document_ids"]):
            for document in documents.unique():
                at = (documents == document).nonzero()[:, 0]
                ids.append(batch["input_ids"][row, at])
                # A label is the token itself; transformers moves them.
                labels.append(torch.cat([torch.tensor([-100]), batch["targets"][row, at[:-1]]]))
        seen.append(seen[-1] + sum(int((each != -100).sum()) for each in labels))
        rows = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        }
        loss = model(**rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, seen[1:]
