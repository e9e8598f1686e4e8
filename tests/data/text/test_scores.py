"""Scores of documents: each has its row, thresholds choose by them, and the choice can be made again."""

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from data.shards.manifest import check_shards, preparation_digest, require_match
from data.text.engines import Processes
from data.text.language import language_and_probability
from data.text.licences import canonical_of, permits
from data.text.quality import PROSE, code_scores, prose_scores
from data.text.scores import groups_of, rules_of, score, violation
from data.write_shards import build_shards
from train.recipe.errors import UserError
from train.recipe.preparation import Preparation, Quality, ScoreGroup, Source, SourceKind, Threshold
from train.recipe.schema import Recipe

FACTS = {"dataset": "tales", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
WORDS = "the ship of sea and that had with silver house winter have to be"
GERMAN = "das Schiff und die See mit dem Haus im Winter ist nicht von der Stadt auf dem Berg"


def page(seed: int, words: int, of: str = WORDS) -> str:
    rng, few = np.random.default_rng(seed), of.split()
    return " ".join(f"{rng.choice(few)} {rng.choice(few)}{rng.integers(999)}" for _ in range(words // 2))


def pages() -> list[dict[str, Any]]:
    """Pages of 20 to 118 words, one in five German, with licences, copies and bad records."""
    licences = ["mit", "GPL-3.0-only"]
    rows: list[dict[str, Any]] = [
        {
            "text": page(n, 20 + 2 * n, GERMAN if n % 5 == 0 else WORDS),
            "of": {"license": licences[n % 2]},
        }
        for n in range(50)
    ]
    return [
        *rows,
        {"text": rows[40]["text"]},
        {"text": rows[41]["text"] + " truly"},
        {"text": " "},
        {"other": 1},
    ]


def recipe_of(folder: Path, make: Callable[..., Recipe], shards: str, **changes: Any) -> Recipe:
    given = {
        name: changes.pop(name)
        for name in ("keep_cleaned", "chunk_bytes", "near_duplicates")
        if name in changes
    }
    path = folder / "pages.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in pages()))
    source = Source(**({"domain": "prose", "kind": SourceKind.jsonl, "path": str(path)} | FACTS | changes))
    return make(
        folder / shards,
        sources=[source],
        domains={"prose": 1.0},
        preparation=Preparation(chunk_bytes=given.pop("chunk_bytes", 3000), **given),
    )


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(
        Path(recipe.data.shards) / "prose/scores.parquet"
    ).to_pylist()
    return rows


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_document_that_was_read_has_a_row(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    recipe = recipe_of(
        tmp_path,
        make_recipe,
        "one",
        quality=Quality.prose,
        scores=[ScoreGroup.code],
        licence_column="of.license",
    )
    manifest = build_shards(recipe, engine=Processes(1))
    root = Path(recipe.data.shards)
    assert check_shards(root, every_byte=True) == manifest
    rows = rows_of(recipe)
    listing = [json.loads(line) for line in (root / "prose/documents.jsonl").read_text().splitlines()]
    assert [(it["place"], it["split"]) for it in rows if not it["reason"]] == [
        (it["name"], it["split"]) for it in listing
    ]
    rejected = [json.loads(line) for line in (root / "prose/rejected.jsonl").read_text().splitlines()]
    removed = {it["place"]: it["reason"] for it in rows if it["reason"]}
    unread = {it["place"]: it["reason"] for it in rejected} | removed
    assert {reason.partition(":")[0] for place, reason in unread.items() if place not in removed} == {
        "no text",
        "empty",
    }
    assert removed.items() <= {it["place"]: it["reason"] for it in rejected}.items()
    assert {"prose: number of words", "exact duplicate", "near duplicate"} <= set(removed.values())
    # Of every document all scores, as computed from its text.
    lines = (tmp_path / "pages.jsonl").read_bytes()
    for row in rows:
        tree = json.loads(lines[int(row["place"].partition("#")[2]) :].split(b"\n")[0])
        text = tree["text"] + "\n"
        language, probability = language_and_probability(text)
        wanted = prose_scores(text, language) | code_scores(text) | {"language_probability": probability}
        for name, value in wanted.items():
            assert row[name] == (None if value is None else np.float32(value)), name
        assert row["language"] == language and row["excerpt"] == text[:600]
        assert row["licence"] == {"mit": "MIT"}.get(tree.get("of", {}).get("license"), row["licence"])
    (root / "prose/scores.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"scores.parquet is altered"):
        check_shards(root)


@pytest.mark.slow
def test_other_filters_choose_from_what_was_cleaned_before(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "none": {},
        "long": {"thresholds": [Threshold("words", at_least=70)]},
        "prose": {"quality": Quality.prose, "thresholds": [Threshold("words", 30, 100)], "languages": ["en"]},
        "mit": {"licences": ["MIT"]},
        "near": {"quality": Quality.prose, "near_duplicates": 0.6},
    }
    wanted = {name: {"licence_column": "of.license"} | changes for name, changes in wanted.items()}
    for name, changes in wanted.items():
        build_shards(recipe_of(tmp_path, make_recipe, f"fresh-{name}", **changes), engine=Processes(1))
    kept = {}
    for name, changes in wanted.items():
        again = recipe_of(tmp_path, make_recipe, "again", keep_cleaned=True, **changes)
        manifest = build_shards(again, rebuild=True, engine=Processes(1))
        require_match(manifest, again)
        # The scores kept are all; documents, their order and what was rejected are as if read only now.
        fresh, here = files(tmp_path / f"fresh-{name}"), files(tmp_path / "again")
        assert {n for n in here if here[n] != fresh.get(n)} <= {"manifest.json", "prose/scores.parquet"}
        kept[name] = {it["place"] for it in rows_of(again) if it["reason"] == ""}
        monkeypatch.setattr("data.text.clean._judged", None)  # Nothing is read again.
    assert (
        kept["long"] < kept["none"]
        and kept["mit"] < kept["none"]
        and 5 < len(kept["prose"]) < len(kept["none"])
    )
    assert len(kept["near"]) < len(kept["none"])
    work = tmp_path / ".again.partial"
    assert sorted(it.name for it in work.iterdir()) == ["cleaned.json", "score"]
    # Another text is cleaned again, and without the key nothing is left.
    monkeypatch.undo()
    with (tmp_path / "pages.jsonl").open("a") as file:
        file.write(json.dumps({"text": page(99, 90)}) + "\n")
    source = dataclasses.replace(again.data.sources[0], quality=Quality.none)
    more = dataclasses.replace(
        again, data=dataclasses.replace(again.data, sources=[source], preparation=Preparation())
    )
    documents = sum(
        it.documents
        for it in build_shards(more, rebuild=True, engine=Processes(1)).domains["prose"].splits.values()
    )
    assert documents == 51 and not work.exists()


@pytest.mark.slow
def test_neither_workers_nor_chunks_change_the_scores(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"scores.SAMPLED": 7, "scores_file.SAMPLED": 7, "scores_file.ROWS": 10}.items():
        monkeypatch.setattr(f"data.text.{name}", value)
    made = []
    for shards, chunk_bytes, workers, keep in (
        ("a", 3000, 1, False),
        ("b", 500, 2, False),
        ("c", 10**6, 1, True),
        ("d", 700, 2, True),
    ):
        recipe = recipe_of(
            tmp_path,
            make_recipe,
            shards,
            quality=Quality.prose,
            scores=[*ScoreGroup][:3],
            chunk_bytes=chunk_bytes,
            keep_cleaned=keep,
        )
        build_shards(recipe, engine=Processes(workers))
        made.append(files(tmp_path / shards))
        assert sum(it["excerpt"] is not None for it in rows_of(recipe)) == 7
        shutil.rmtree(tmp_path / f".{shards}.partial", ignore_errors=True)
    assert made[0] == made[1] == made[2] == made[3]


def test_thresholds_take_the_place_of_published_ones() -> None:
    source = Source(domain="d", kind=SourceKind.jsonl, path="", quality=Quality.prose, **FACTS)
    assert rules_of(source) == list(PROSE)
    own = [Threshold("stop_words", at_least=1), Threshold("language_probability", at_least=0.9)]
    rules = rules_of(dataclasses.replace(source, thresholds=own))
    assert len(rules) == len(PROSE) + 1
    text = page(1, 200).replace("the ", "a ").replace("of ", "a ")
    scored = score(text, source, groups_of(source, Preparation()))
    assert violation(scored, source) == ""
    strict = dataclasses.replace(source, thresholds=[Threshold("stop_words", at_least=9)])
    assert violation(scored, strict) == "prose: stop words"
    sure = dataclasses.replace(source, thresholds=[Threshold("language_probability", at_most=0)])
    assert violation(scored, sure) == "language probability"
    # Scores of words mean nothing where words have no blanks between them.
    chinese = score("海上的船回家了。" * 40, source, groups_of(source, Preparation()))
    assert chinese.language == "zh" and chinese.numbers is not None and chinese.numbers["words"] is None
    assert violation(chinese, strict) != "prose: stop words"


def test_a_bound_holds_in_the_precision_of_the_file() -> None:
    rule = Threshold("symbols_per_word", at_most=0.1)
    source = Source(domain="d", kind=SourceKind.jsonl, path="", thresholds=[rule], **FACTS)
    (made,) = rules_of(source)
    assert made.admits(0.1) and made.admits(float(np.float32(0.1))) and not made.admits(0.1001)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"thresholds": [Threshold("word", at_least=1)]},
            r"thresholds\[0\].score: word is no score; choose from .*words",
        ),
        ({"thresholds": [Threshold("words")]}, r"thresholds\[0\]: has no bound; give at_least or at_most"),
        (
            {"thresholds": [Threshold("words", 9, 5)]},
            r"thresholds\[0\]: no score is between 9 and 5; give numbers",
        ),
        ({"thresholds": [Threshold("words", float("nan"))]}, r"thresholds\[0\]: no score is between nan;"),
        (
            {"thresholds": [Threshold("words", 5), Threshold("words", at_most=9)]},
            r"thresholds\[1\].score: words has bounds already",
        ),
        ({"scores": [ScoreGroup.classifier]}, r"classifier: is null, but its score is asked for"),
        ({"licences": ["MIT"]}, r"licence_column: is null, but data.sources has licences"),
        (
            {"kind": SourceKind.text, "licence_column": "x"},
            r"licence_column: is set, but licences are read from",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, make_recipe: Callable[..., Recipe], changes: dict[str, Any], line: str
) -> None:
    recipe = recipe_of(tmp_path, make_recipe, "one")
    source = dataclasses.replace(recipe.data.sources[0], **changes)
    with pytest.raises(UserError, match=rf"data.sources\[0\].{line}") as caught:
        build_shards(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=[source])))
    assert "\n" not in str(caught.value)


def test_a_threshold_makes_other_shards(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    plain = preparation_digest(recipe_of(tmp_path, make_recipe, "one"))
    assert (
        preparation_digest(recipe_of(tmp_path, make_recipe, "one", thresholds=[Threshold("words", 9)]))
        != plain
    )
    assert preparation_digest(recipe_of(tmp_path, make_recipe, "one", keep_cleaned=True)) == plain
    assert preparation_digest(recipe_of(tmp_path, make_recipe, "one", scores=[*ScoreGroup][:3])) == plain


def test_licences_are_spdx_expressions() -> None:
    listed = ["apache-2.0", "MIT", "LicenseRef-ours"]
    assert canonical_of("mit or GPL-3.0-only") == "MIT OR GPL-3.0-only"
    assert canonical_of(["mit", "apache-2.0", 7, ""]) == "MIT AND Apache-2.0"
    assert canonical_of(None) == canonical_of({}) == canonical_of([]) == ""
    for licence, is_permitted in {
        "mit": True,
        "MIT OR GPL-3.0-only": True,
        "MIT AND GPL-3.0-only": False,
        "(MIT OR GPL-3.0-only) AND Apache-2.0 WITH LLVM-exception": True,
        "GPL-3.0-only OR (MIT AND (ISC OR GPL-2.0-only))": False,
        "GPL-2.0-only WITH Classpath-exception-2.0": False,
        "licenseref-ours": True,
        "no-license": False,
        "MIT OR": False,
        "": False,
        "(" * 150 + "MIT" + ")" * 150: False,
        "MIT OR " * 1000 + "MIT": False,
        "(" * 90 + "\x00" + "é" * 90: False,
    }.items():
        assert permits(canonical_of(licence), listed) is is_permitted, licence[:50]
    assert permits(
        canonical_of("GPL-2.0-only WITH Classpath-exception-2.0"),
        ["gpl-2.0-only with classpath-exception-2.0"],
    )
    assert permits(canonical_of("No License"), ["no license"])
    assert not permits(canonical_of(["mit OR isc", "GPL-3.0-only"]), listed)


@pytest.mark.slow
@pytest.mark.parametrize("keep_cleaned", [False, True])
def test_no_licence_and_no_name_of_a_file_ends_a_job(
    tmp_path: Path, make_recipe: Callable[..., Recipe], keep_cleaned: bool
) -> None:
    odd: list[Any] = [
        "\ud83d",
        {"a": 1},
        [["x"]],
        ["mit"] * 10_000,
        "x" * 10**5,
        7,
        True,
        ["\udfff", "MIT"],
        "\x00",
    ]
    odd += ["(" * 199, "MIT\nOR\nISC", [None, "MIT"], "AND", "MIT WITH MIT", None]
    rows = [{"text": page(n, 40), "license": licence} for n, licence in enumerate(odd)]
    name = os.fsdecode(b"tales-\xff\xfe.jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "in")
    recipe = recipe_of(
        tmp_path,
        make_recipe,
        "one",
        path=path,
        licence_column="license",
        scores=[ScoreGroup.prose],
        keep_cleaned=keep_cleaned,
    )
    build_shards(recipe, engine=Processes(2))
    found = {it["place"].partition("#")[0] for it in rows_of(recipe)}
    assert found == {"tales/tales-\\udcff\\udcfe.jsonl"} and len(rows_of(recipe)) == len(odd)
    licences = [it["licence"] for it in rows_of(recipe)]
    assert licences.count("MIT") == 2 and "MIT OR ISC" in licences and "?" in licences
    few = recipe_of(tmp_path, make_recipe, "two", path=path, licence_column="license", licences=["MIT"])
    assert build_shards(few, engine=Processes(1)).domains["prose"].rejected == {"licence": len(odd) - 3}


def test_a_classifier_needs_its_package(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    recipe = recipe_of(tmp_path, make_recipe, "one", classifier=str(tmp_path / "none.bin"))
    with pytest.raises(UserError, match=r"data.sources\[0\].classifier: .*none.bin ") as caught:
        build_shards(recipe)
    missing = importlib.util.find_spec("fasttext") is None
    remedy = "pip install fasttext-predict" if missing else "is no file; correct the path"
    assert str(caught.value).endswith(remedy)


@pytest.mark.slow
def test_documents_have_the_classifiers_probability(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    pytest.importorskip("fasttext")
    model = tmp_path / "model.bin"
    if not (trained := os.environ.get("FASTTEXT_MODEL")):
        pytest.skip("FASTTEXT_MODEL names no model with the labels __label__en and __label__de")
    shutil.copy(trained, model)
    changes = {"classifier": str(model), "classifier_label": "__label__de"}
    recipe = recipe_of(
        tmp_path, make_recipe, "one", thresholds=[Threshold("classifier", at_most=0.5)], **changes
    )
    build_shards(recipe, engine=Processes(2))
    rows = rows_of(recipe)
    assert len({it["classifier"] for it in rows}) > 10
    for row in rows:
        assert (row["reason"] == "classifier") == (row["classifier"] > 0.5) == (row["language"] == "de")
    other = recipe_of(tmp_path, make_recipe, "two", classifier=str(model))
    with pytest.raises(
        UserError, match=r"classifier_label: .* has no label '__label__hq'; it has __label__de, __label__en"
    ):
        build_shards(other)
    model.write_bytes(b"no model")
    damaged = recipe_of(tmp_path, make_recipe, "three", **changes)
    shutil.copy(model, tmp_path / "damaged.bin")
    source = dataclasses.replace(damaged.data.sources[0], classifier=str(tmp_path / "damaged.bin"))
    with pytest.raises(UserError, match=r"classifier: .*damaged.bin can't be read"):
        build_shards(dataclasses.replace(damaged, data=dataclasses.replace(damaged.data, sources=[source])))
