"""Fixtures for evaluation: task files in LLM Foundry's and lm-eval's formats, and a tokenizer for them."""

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COLOURS = ("red", "blue", "green", "white", "black", "yellow")
THINGS = ("sky", "grass", "snow", "coal", "a lemon", "a tomato", "the sea at noon")
SUITE = """
name: small
tasks:
  arc_easy:
    {category: knowledge, kind: multiple_choice, file: arc.jsonl, shots: 0, baseline: 0.25,
     continuation_delimiter: "\\nAnswer: "}
  sums: {category: knowledge, kind: generation, file: sums.jsonl, shots: 2, baseline: 0, stop: ["\\n"]}
  winogrande: {category: language, kind: schema, file: winogrande.jsonl, shots: 0, baseline: 0.5}
  lambada_openai: {category: language, kind: language_modeling, file: lambada.jsonl, shots: 0, baseline: 0}
  topics:
    {category: language, kind: multiple_choice, file: topics.jsonl, shots: 1, baseline: 0.5,
     by_category: true}
"""


@dataclass(frozen=True)
class Tasks:
    """The location of a suite and its files."""

    suite: Path
    data: Path
    """In LLM Foundry's form."""
    hub: Path
    """The same questions as lm-eval's datasets."""
    shards: Path
    """Holds a tokenizer trained on the questions, and nothing else."""


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _questions() -> list[tuple[str, list[str], int]]:
    found = []
    for number, thing in enumerate(THINGS):
        choices = [f"{COLOURS[(number + i) % 6]}{' and bright' * (i % 2)}" for i in range(4)]
        found.append((f"Which colour is {thing} in the picture?", choices, number % 4))
    return found


@pytest.fixture(scope="session")
def small_tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Seven questions of each kind."""
    from data.text.bpe import train_bpe
    from train.recipe.schema import Tokenizer, TokenizerKind

    root = tmp_path_factory.mktemp("tasks")
    data, hub, shards = root / "data", root / "hub", root / "shards"
    asked = _questions()
    _lines(data / "arc.jsonl", ({"query": f"Question: {q}", "choices": c, "gold": g} for q, c, g in asked))
    _lines(
        hub / "allenai/ai2_arc/ARC-Easy/test.jsonl",
        (
            {"question": q, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[g]}
            for q, c, g in asked
        ),
    )
    pairs = enumerate(itertools.pairwise(COLOURS))
    schemas = [(f"The {a} thing hid the {b} thing because ", a, b, i % 2) for i, (a, b) in pairs]
    _lines(
        data / "winogrande.jsonl",
        (
            {
                "context_options": [f"{s}the {a} thing", f"{s}the {b} thing"],
                "continuation": "was large.",
                "gold": g,
            }
            for s, a, b, g in schemas
        ),
    )
    _lines(
        hub / "allenai/winogrande/winogrande_xl/validation.jsonl",
        (
            {"sentence": f"{s}_ was large.", "option1": f"the {a} thing", "option2": f"the {b} thing",
             "answer": str(g + 1)}
            for s, a, b, g in schemas
        ),
    )  # fmt: skip
    _write_texts(data, hub)
    _lines(
        data / "topics.jsonl",
        (
            {"query": q, "choices": c[:2], "gold": g % 2, "category": "even" if i % 2 == 0 else "odd"}
            for i, (q, c, g) in enumerate(asked)
        ),
    )
    for place in ("allenai/ai2_arc/ARC-Easy/test.jsonl", "allenai/winogrande/winogrande_xl/validation.jsonl"):
        shutil.copy(
            hub / place, (hub / place).with_name("train.jsonl")
        )  # lm-eval requires it even without shots.
    (root / "suite.yaml").write_text(SUITE)
    text = "\n".join(path.read_text() for path in sorted(data.glob("*.jsonl")))
    train_bpe(Tokenizer(kind=TokenizerKind.bpe, vocab_size=400), iter([text])).to_hugging_face(shards)
    return Tasks(root / "suite.yaml", data, hub, shards)


def _write_texts(data: Path, hub: Path) -> None:
    told = [f"I saw that {thing} was {colour}" for thing, colour in zip(THINGS, COLOURS * 2, strict=False)]
    _lines(
        data / "lambada.jsonl",
        ({"context": t.rpartition(" ")[0], "continuation": t.rpartition(" ")[2]} for t in told),
    )
    _lines(hub / "EleutherAI/lambada_openai/default/test.jsonl", ({"text": t} for t in told))
    _lines(
        data / "sums.jsonl",
        ({"context": f"{n} and {n} is", "answer": str(2 * n), "aliases": [str(2 * n)]} for n in range(7)),
    )
