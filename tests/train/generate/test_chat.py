"""Chats with a run that was tuned on a few: answers are those it learnt, by all ways in."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from data.text.conversations import ChatFormat, ConversationError, render_prompt
from data.text.engines import Processes
from data.write_shards import build_shards
from train.generate.__main__ import main
from train.generate.chat import ChatText
from train.generate.generation import text_of
from train.hf.__main__ import main as hf
from train.hf.weights import open_weights
from train.recipe.preparation import Packing, Preparation, Source, SourceKind
from train.recipe.schema import LossMean, Recipe, Tokenizer, TokenizerKind
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

TEMPLATE = Path(__file__).resolve().parents[3] / "yamls" / "chat.jinja"
ANSWERS = {"sky": "It is blue.", "grass": "It is green."}
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., Recipe]) -> Path:
    """A run that has learnt two answers, and that a second question in a chat gets the other."""
    from train.run import run

    folder = tmp_path_factory.mktemp("tuned")
    with (folder / "chats.jsonl").open("w") as file:
        for n in range(240):
            things = ["sky", "grass"] if n % 2 else ["grass", "sky"]
            turns = [
                turn
                for thing in things[: 1 + n % 3 // 2]
                for turn in (("user", f"{thing} {n}?"), ("assistant", ANSWERS[thing]))
            ]
            messages = [{"role": role, "content": words} for role, words in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    facts = {"dataset": "a", "version": "1", "origin": "-", "licence": "-"}
    made = tiny_recipe(
        folder, folder / "shards", "talker", "training.duration_tokens=24576", "model.max_sequence_tokens=64"
    )
    assert made.model.moe is not None
    recipe = replace(
        made,
        data=replace(
            made.data,
            corpus=None,
            domains={"chats": 1.0},
            domain_max_epochs={"chats": 20.0},
            sources=[Source("chats", SourceKind.chat, str(folder / "chats.jsonl"), **facts)],
            preparation=Preparation(near_duplicates=None, validation_share=0.1, packing=Packing.best_fit),
            validation_sequences=1,
            workers=0,
        ),
        tokenizer=Tokenizer(TokenizerKind.bpe, 512, chat_template=str(TEMPLATE)),
        training=replace(made.training, loss_mean=LossMean.targets, document_masking=True),
        evaluation=replace(made.evaluation, interval_batches=None),
    )
    build_shards(recipe, engine=Processes(1))
    assert run(recipe, Topology()) == 0
    return folder / "talker"


@contextmanager
def terminal(lines: str) -> Iterator[None]:
    """A real terminal as standard input, on which somebody has typed lines and then Ctrl-D."""
    ours, theirs = os.openpty()
    os.write(ours, lines.encode() + b"\x04")
    before = sys.stdin
    with os.fdopen(theirs) as stream:
        sys.stdin = stream
        try:
            yield
        finally:
            sys.stdin = before
            os.close(ours)


def greedy(source: Path, *more: object) -> list[str]:
    return [str(source), "--chat", "--temperature", "0", "--max-tokens", "20", *map(str, more)]


def test_several_turns_on_a_terminal(tuned: Path, tmp_path: Path, capsys: Output) -> None:
    figures = tmp_path / "said.json"
    lines = "sky 7?\n\ngrass 8?\n<|pad|>\n/new\ngrass 3?\n" + "zq" * 100 + "\n"
    with terminal(lines):
        assert main(greedy(tuned, "--json", figures)) == 0
    out, err = capsys.readouterr()
    assert out.replace("> ", "").split("\n") == [*(ANSWERS[it] for it in ("sky", "grass", "grass")), "", ""]
    assert "generate: the chat can't be rendered: special token: <|pad|>\n" in err
    assert "generate: the chat fills the model's 64 tokens; /new begins another\n" in err
    rows = json.loads(figures.read_text())["answers"]
    assert [row["ending"] for row in rows] == ["end of text"] * 3
    first = "<|user|>\nsky 7?\n<|assistant|>\n"
    assert rows[1]["prompt"] == f"{first}It is blue.<|endoftext|>\n<|user|>\ngrass 8?\n<|assistant|>\n"
    assert rows[2]["prompt"] == "<|user|>\ngrass 3?\n<|assistant|>\n"


def test_one_answer_from_arguments_a_pipe_and_files(
    tuned: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(greedy(tuned, "sky 9?")) == 0
    assert capsys.readouterr().out == "It is blue.\n"
    for prompt in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("grass 9?"))
        assert main(greedy(tuned, *prompt)) == 0
        assert capsys.readouterr().out == "It is green.\n"
    (tmp_path / "lines.txt").write_text("sky 5?\ngrass 4?\n")
    assert main(greedy(tuned, "--file", tmp_path / "lines.txt")) == 0
    assert capsys.readouterr().out == "--- 1: sky 5?\nIt is blue.\n--- 2: grass 4?\nIt is green.\n"
    turns = [("user", "sky 7?"), ("assistant", "It is blue."), ("user", "grass 8?")]
    whole = {"messages": [{"role": role, "content": words} for role, words in turns]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(whole) + "\n\n")
    assert main(greedy(tuned, "--file", tmp_path / "chats.jsonl")) == 0
    assert capsys.readouterr().out == "It is green.\n"


def test_an_export_answers_the_same(tuned: Path, tmp_path: Path, capsys: Output) -> None:
    assert hf(["export", str(tuned), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main(greedy(tmp_path / "hf", "sky 9?")) == 0
    assert capsys.readouterr().out == "It is blue.\n"
    own, theirs = (ChatText(text_of(open_weights(it)), None) for it in (tuned, tmp_path / "hf"))
    turns = [("user", "naïve?"), ("assistant", "Ja."), ("user", "And?")]
    prompt = own.prompt(turns)
    assert prompt == theirs.prompt(turns) and own.encode(prompt) == theirs.encode(prompt)
    assert own.end_ids == theirs.end_ids and own.stop == theirs.stop == ()


def test_mistakes_are_a_line(tuned: Path, tmp_path: Path, capsys: Output) -> None:
    file, broken = tmp_path / "chats.jsonl", tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    answered = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    for content, arguments, words in (
        ("\n{", ("--file", file), "line 2: no JSON"),
        ('{"text": 1}', ("--file", file), "line 1: conversation: no 'messages', but text"),
        (answered, ("--file", file), "line 1: the last message is the assistant's; end each chat with"),
        ("\n", ("--file", file), "has no chat"),
        (answered, ("--file", file, "x"), "has whole chats; give no prompts"),
        ("", ("x", "--chat-template", tmp_path / "none"), "none can't be read (No such file"),
        ("", ("x", "--chat-template", broken), "the chat can't be rendered: template: "),
        ("", ("<|endoftext|>",), "special token: <|endoftext|>"),
    ):
        file.write_text(content)
        assert main(greedy(tuned, *arguments)) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert main([str(tuned), "x", "--chat-template", str(broken)]) == 2
    assert "--chat-template needs --chat" in capsys.readouterr().err
    (tuned.parent / "shards/chat_template.jinja").rename(tmp_path / "kept")
    assert main(greedy(tuned, "x")) == 2
    (tmp_path / "kept").rename(tuned.parent / "shards/chat_template.jinja")
    assert "--chat-template: the tokenizer has no template for chats; give one" in capsys.readouterr().err


def test_an_answer_ends_as_its_template_ends_it(tuned: Path) -> None:
    text = text_of(open_weights(tuned))

    def ends(template: str, file: Path) -> tuple[int, tuple[str, ...]]:
        file.write_text("{% for m in messages %}" + template + "{% endfor %}")
        chat = ChatText(text, file)
        chat.prompt([("user", "x")])
        return len(chat.end_ids), chat.stop

    file = tuned.parent / "ends.jinja"
    assert ends("{{ m.content + eos_token }}", file) == (1, ())
    assert ends("{{ m.content + pad_token + eos_token }}", file) == (2, ())
    assert ends("{{ m.content + '<|im_end|>\n' }}", file) == (1, ("<|im_end|>",))
    # Lines of an answer are no ends of it.
    assert ends("{{ m.content + '\n' }}", file) == (1, ())
    refuses = ChatFormat("{{ raise_exception('Only questions') }}", (), ())
    with pytest.raises(ConversationError, match="template: Only questions"):
        render_prompt([("user", "x")], refuses)
