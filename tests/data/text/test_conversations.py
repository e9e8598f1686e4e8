"""Conversations become tokens as transformers makes them of chats, with a loss where it says so too."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import build_train_loader
from data.opened import OpenedData
from data.shards.manifest import check_shards, read_manifest
from data.text.conversations import ChatFormat, ConversationError, chat_format, render
from data.text.engines import Processes
from data.tokenizer import open_tokenizer
from data.write_shards import build_shards
from train.recipe.errors import UserError
from train.recipe.preparation import Packing, Preparation, Source, SourceKind
from train.recipe.schema import LossMean, Recipe, Tokenizer, TokenizerKind

FACTS = {"dataset": "asked", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
"""As Mixtral's: it knows no prompt for the assistant."""


def tokenizer_in(folder: Path, template: str | None) -> Path:
    """Writes a byte-level BPE as chat models have them."""
    from tokenizers import Tokenizer as Form
    from tokenizers import decoders, models, pre_tokenizers, trainers

    form = Form(models.BPE())
    form.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    form.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    form.train_from_iterator([Path(__file__).read_text()], trainer)
    folder.mkdir(exist_ok=True)
    form.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat(number: int, turns: int = 2) -> dict[str, Any]:
    """A chat; words are other ones in each, and not all ASCII."""
    words = [
        f"naïve {number} " + " ".join(f"w{number}x{n}" for n in range(5 + 3 * turn)) for turn in range(turns)
    ]
    roles = ["user", "assistant"] * turns
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]}


BAD = {
    "JSON": "{",
    "conversation: no 'messages', but text": {"text": "x"},
    "conversation: messages is no list of turns": {"messages": "x"},
    "conversation: role of message 1 is not one of system, user, assistant, tool": {
        "messages": [{"role": "human", "content": "x"}]
    },
    "conversation: content of message 1 is no text": {"messages": [{"role": "user", "content": None}]},
    "conversation: the last message is not the assistant's": chat(900, 1),
    "empty": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
    "special token: <|im_end|>": {
        "messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]
    },
}


def recipe_of(folder: Path, make: Callable[..., Recipe], kind: SourceKind, template: str | None) -> Recipe:
    """A recipe of a source of conversations and one of plain text."""
    there = [chat(number, 2 + number % 2 * 2) for number in range(30)]
    if kind is SourceKind.instructions:
        there = [
            {"prompt": f"q{n}: {'why ' * (n % 5)}\nA:", ("response", "completion")[n % 2]: f" because {n}"}
            for n in range(30)
        ] + [{"prompt": "only"}]
    else:
        there += list(BAD.values())
    (folder / "asked.jsonl").write_text("".join(f"{json.dumps(it) if it != '{' else it}\n" for it in there))
    (folder / "plain.jsonl").write_text(
        "".join(json.dumps({"text": f"plain {n} " + "word " * n}) + "\n" for n in range(30))
    )
    path = str(tokenizer_in(folder / "model", template))
    sources = [
        Source(domain="code", kind=kind, path=str(folder / "asked.jsonl"), **FACTS),
        Source(domain="prose", kind=SourceKind.jsonl, path=str(folder / "plain.jsonl"), **FACTS),
    ]
    # Chats stay whole; prompts and responses are cut where a sequence ends.
    is_whole = kind is SourceKind.chat
    preparation = Preparation(
        near_duplicates=None,
        chunk_bytes=1500,
        validation_share=0.1,
        packing=Packing.best_fit if is_whole else Packing.concatenate,
    )
    length = 256 if is_whole else 32
    recipe = make(folder / "shards", sources=sources, preparation=preparation, sequence_tokens=length)
    return dataclasses.replace(
        recipe,
        tokenizer=Tokenizer(TokenizerKind.hf, path=path),
        model=dataclasses.replace(recipe.model, vocab_size=512, max_sequence_tokens=256),
        training=dataclasses.replace(recipe.training, loss_mean=LossMean.targets),
    )


def documents_of(
    root: Path, domain: str, recipe: Recipe
) -> dict[tuple[str, int], tuple[list[int], list[bool]]]:
    """Tokens and mask of each document in the shards, put together from its pieces."""
    found: dict[tuple[str, int], tuple[list[int], list[bool]]] = {}
    opened = OpenedData(recipe)
    for split in ("train", "validation"):
        shards = opened.shards(domain, split)
        for number in range(len(shards)):
            sample, at = shards[number], 0
            for length, document in zip(sample.lengths.tolist(), sample.documents.tolist(), strict=True):
                ids, learnt = found.setdefault((split, document), ([], []))
                ids += sample.tokens[at : at + length].tolist()
                learnt += sample.is_trained()[at : at + length].tolist()
                at += length
    return found


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHATML, MARKED, STRICT])
def test_chats_are_those_of_transformers(
    template: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    from transformers import AutoTokenizer

    recipe = recipe_of(tmp_path, make_recipe, SourceKind.chat, template)
    manifest = build_shards(recipe, engine=Processes(1))
    root = tmp_path / "shards"
    assert check_shards(root, every_byte=True) == manifest == read_manifest(root)
    rejected = [
        json.loads(line)["reason"] for line in (root / "code/rejected.jsonl").read_text().splitlines()
    ]
    assert rejected == list(BAD)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    expected = {}
    for number in range(30):
        messages = chat(number, 2 + number % 2 * 2)["messages"]
        made = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask="endgeneration" in template
        )
        expected[tuple(made["input_ids"])] = made.get("assistant_masks"), messages
    found = documents_of(root, "code", recipe)
    found = {key: each for key, each in found.items() if key[1] >= 0}
    assert {tuple(ids) for ids, _ in found.values()} == expected.keys()
    for ids, learnt in found.values():
        mask, messages = expected[tuple(ids)]
        if mask is not None:
            assert learnt == [bool(it) for it in mask]
        answers = [it["content"] for it in messages if it["role"] == "assistant"]
        ending = "<|im_end|>\n" if template == CHATML else "</s>"
        # A token that begins before an answer and ends in it is the answer's, as for transformers.
        start = "" if template == CHATML else " "
        learnt_text = theirs.decode([t for t, is_learnt in zip(ids, learnt, strict=True) if is_learnt])
        assert learnt_text == "".join(start + answer + ending for answer in answers)
    split = manifest.domains["code"].splits["train"]
    assert split.trained_tokens == sum(sum(it[1]) for (side, _), it in found.items() if side == "train")
    # Of plain text everything is learnt, and its shards are as they always were.
    assert manifest.domains["prose"].splits["train"].trained_tokens is None
    assert "trained" not in (root / "prose/train/index.json").read_text()


@pytest.mark.slow
def test_prompts_and_responses_are_batches_with_a_loss_on_responses(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = recipe_of(tmp_path, make_recipe, SourceKind.instructions, None)
    manifest = build_shards(recipe, engine=Processes(1))
    tokenizer = open_tokenizer(recipe.tokenizer, tmp_path / "shards")
    assert manifest.domains["code"].rejected == {"conversation": 1}
    documents = {
        ids: it for (_, ids), it in documents_of(tmp_path / "shards", "code", recipe).items() if ids >= 0
    }
    for ids, learnt in documents.values():
        prompt, response = (
            tokenizer.decode([t for t, it in zip(ids, learnt, strict=True) if it == wanted])
            for wanted in (False, True)
        )
        assert prompt.endswith("\nA:") and response == f" because {prompt[1:].partition(':')[0]}</s>"
        of_each = tokenizer.encode_documents([prompt, response[:-4]])
        assert ids == [*np.concatenate(of_each).tolist(), tokenizer.eos_id]
    batch = next(iter(build_train_loader(OpenedData(recipe), rank=0, world_size=1)))
    masked = 0
    for row in range(len(batch["targets"])):
        text = tokenizer.decode([t for t in batch["targets"][row].tolist() if t != -100])
        plain = batch["domain_ids"][row].item() == 1
        masked += not plain
        assert plain or "\nA:" not in text
        known = batch["continues"][row]
        assert (batch["targets"][row][:-1] == batch["input_ids"][row][1:])[known[:-1]].all() or not plain
        assert not known[-1] and (batch["targets"][row][~known] == -100).all()
    assert masked


def test_what_is_wrong_is_one_line(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    recipe = recipe_of(tmp_path, make_recipe, SourceKind.chat, None)
    with pytest.raises(UserError, match="tokenizer has no template for chats; name a Jinja file"):
        build_shards(recipe, engine=Processes(1))
    file = tmp_path / "chat.jinja"
    for content, error in (("{% for %}", "is no Jinja"), (None, "can't be read")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=f"chat_template: .*{error}"):
            chat_format(dataclasses.replace(recipe.tokenizer, chat_template=str(file)), None)


def test_a_template_that_refuses_or_forgets_gives_a_reason() -> None:
    names = (("bos_token", "<s>"), ("eos_token", "</s>"))
    one = [("user", "a"), ("user", "b"), ("assistant", "c")]
    with pytest.raises(ConversationError, match=r"^template: Roles must alternate$"):
        render(one, ChatFormat(STRICT, names, ()))
    # Earlier answers are shortened, as thoughts are by some.
    forgets = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}{% endfor %}"
    two = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(ConversationError, match="template: renders earlier turns otherwise"):
        render(two, ChatFormat(forgets, names, ()))
    assert render(two[:2], ChatFormat(forgets, names, ())) == ("ab", ((1, 2),))


@pytest.mark.parametrize("kind", ["bpe", "hf"])
def test_a_template_given_goes_into_shards_and_exports(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from data.text.hugging_face_form import write_form

    tokenizer_in(tmp_path, MARKED)
    if kind == "bpe":
        ranks = {bytes([byte]): byte for byte in range(256)}
        write_form(tmp_path / "tokenizer.json", r"\w+|\W", ranks, {"<|endoftext|>": 256, "<|pad|>": 257})
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    handle = open_tokenizer(Tokenizer(TokenizerKind(kind), vocab_size=300), tmp_path)
    assert handle.chat_template == CHATML
    handle.to_hugging_face(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    messages = chat(1)["messages"]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<|im_start|>user\n")
    assert set(theirs("x")) == {"input_ids", "attention_mask"}
    answer = text.index("assistant\n") + len("assistant\n")
    ids, learnt = handle.encode_chat(text, [(answer, len(text))])
    assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs.decode(ids[learnt]) == text[answer:]
