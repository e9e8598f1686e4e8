"""Edited items of evaluation tasks are found in documents, and hardly anything else is."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data.text.edited_items import EditedItems
from data.text.engines import Processes
from data.text.evaluation_overlap import EvaluationTexts
from data.text.installed import installed_corpus
from data.text.words import hash_words
from data.write_shards import build_shards
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import Recipe

SHARE = 0.3
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rk", "st", "l", "")]


def item_of(rng: random.Random, words: int = 40) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def replaced(rng: random.Random, text: str, share: float) -> str:
    return " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split())


def numbered(text: str, per_line: int = 7) -> str:
    words = text.split()
    lines = [" ".join(words[at : at + per_line]) for at in range(0, len(words), per_line)]
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))


def within(rng: random.Random, text: str) -> str:
    return f"{item_of(rng, 300)}. {text}. {item_of(rng, 300)}"


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    rng = random.Random(0)
    texts = [item_of(rng, rng.randint(25, 80)) for _ in range(200)]
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("".join(json.dumps({"context": text}) + "\n" for text in texts))
    return texts, path


def test_edited_items_are_found(items: tuple[list[str], Path]) -> None:
    texts, path = items
    edited, exact = EditedItems((str(path),), SHARE), EvaluationTexts((str(path),), 13)
    rng = random.Random(1)
    edits: dict[str, Callable[[str], str]] = {
        "none": str,
        "numbered": numbered,
        "replaced": lambda text: replaced(rng, text, 0.1),
        "both": lambda text: numbered(replaced(rng, text, 0.1)),
        "upper": lambda text: text.upper().replace(" ", " — "),
    }
    found = {
        name: sum(edited.touches(within(rng, edit(text))) for text in texts) for name, edit in edits.items()
    }
    before = sum(exact.touches(hash_words(within(rng, numbered(text)))) for text in texts)
    assert found["none"] == found["numbered"] == found["upper"] == 200 and before == 0
    assert found["replaced"] > 195 and found["both"] > 195


def test_other_documents_are_not(items: tuple[list[str], Path]) -> None:
    texts, path = items
    edited, rng = EditedItems((str(path),), SHARE), random.Random(2)
    assert not any(edited.touches(item_of(rng, 600)) for _ in range(500))
    # A quarter of an item is none, nor are its sequences far apart or one of them many times.
    for text in texts[:100]:
        words = text.split()
        quarter = " ".join(words[: len(words) // 4])
        assert not edited.touches(within(rng, quarter)) and not edited.touches(f"{quarter} " * 40)
        apart = (" ".join(words[at : at + 6]) for at in range(0, len(words), 6))
        assert not edited.touches(" ".join(f"{part} {item_of(rng, 60)}" for part in apart))
    assert (
        not edited.touches("")
        and not edited.touches("one two")
        and not EditedItems((), SHARE).touches(texts[0])
    )


@pytest.mark.slow
def test_of_real_text_hardly_any_document_is_taken_for_an_item(tmp_path: Path) -> None:
    """Paragraphs of every fourth document of the installed prose are items, which no other document has."""
    documents = [it.text for it in installed_corpus(3_000_000) if it.domain == "prose"]
    paragraphs = [
        part for text in documents[::4] for part in text.split("\n\n") if 25 <= len(part.split()) <= 120
    ]
    (tmp_path / "items.json").write_text(json.dumps(paragraphs))
    edited, exact = (
        EditedItems((f"{tmp_path}/items.json",), SHARE),
        EvaluationTexts((f"{tmp_path}/items.json",), 13),
    )
    others = [text for n, text in enumerate(documents) if n % 4]
    clean = [text for text in others if not exact.touches(hash_words(text))]
    wrong = sum(map(edited.touches, clean))
    rng = random.Random(3)
    some = rng.sample(paragraphs, 200)
    found = sum(edited.touches(numbered(replaced(rng, part, 0.1))) for part in some)
    print(f"{len(paragraphs)} items, edited {found} of {len(some)}; {wrong} of {len(clean)} other documents")
    assert len(clean) > 200 and wrong <= 0.03 * len(clean) and found >= 0.95 * len(some)


@pytest.mark.slow
def test_documents_with_edited_items_are_removed(
    items: tuple[list[str], Path], tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    texts, path = items
    rng = random.Random(4)
    rows = [item_of(rng, 100) for _ in range(20)] + [within(rng, numbered(texts[7])), within(rng, texts[8])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    facts = {"dataset": "tales", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
    source = Source("prose", SourceKind.jsonl, str(tmp_path / "rows.jsonl"), **facts)  # type: ignore[arg-type]
    preparation = Preparation(evaluation_texts=[str(path)])
    for share, removed, workers in ((None, 1, 1), (SHARE, 2, 1), (SHARE, 2, 2)):
        chosen = dataclasses.replace(preparation, evaluation_share=share)
        recipe = make_recipe(
            tmp_path / "shards", sources=[source], domains={"prose": 1.0}, preparation=chosen
        )
        record = build_shards(recipe, rebuild=True, engine=Processes(workers)).domains["prose"]
        assert record.rejected == {"evaluation text": removed}
    assert "0.3 of an evaluation item's four-word sequences removed" in record.transformation
