"""Exploration of shards with known content, and its page in a browser."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.audit.__main__ import run as audit
from data.explore.__main__ import main
from data.explore.clusters import map_documents
from data.explore.exploration import Exploration, explore
from data.explore.measure import typical_ids
from data.explore.sample import Shards, draw_documents, draw_lines
from data.explore.shards_page import shards_page, write_page
from data.text.installed import CorpusDocument
from data.write_shards import build_shards
from tests.browser import opened
from train.recipe.errors import UserError
from train.recipe.preparation import Preparation, ScoreGroup, Source, SourceKind
from train.recipe.schema import LossMean, Recipe

pytestmark = pytest.mark.slow

TOPICS = {
    "sea": "ship sail harbour wave captain storm anchor island tide sailor",
    "kitchen": "bread oven butter flour spoon kettle pepper onion recipe salt",
    "garden": "rose hedge spade tulip seed lawn gardener apple tree soil",
}
ENGLISH = "the of and to in that is was for with"
GERMAN = "der die und das nicht mit ist von sich auf"
TEXTS_PER_TOPIC = 12


def tale(topic: str, number: int, small_words: str = ENGLISH) -> str:
    rng = np.random.default_rng([number, len(topic)])
    words = rng.choice(TOPICS[topic].split(), 40), rng.choice(small_words.split(), 40)
    return " ".join(f"{small} {word}" for word, small in zip(*words, strict=True)) + f" {number}.\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Recipe:
    """Two domains of three topics: one English with copies, one partly German."""
    folder = tmp_path_factory.mktemp("explore")
    code = [tale(topic, n) for topic in TOPICS for n in range(TEXTS_PER_TOPIC)]
    code += [code[0], code[1] + " Truly so.", " ", "zq%! " * 30 + "</script><b>bold</b>\n"]
    prose = [tale(topic, 100 + n, GERMAN if n % 3 == 0 else ENGLISH) for topic in TOPICS for n in range(12)]
    facts = {"dataset": "tales", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
    sources = []
    for domain, texts in (("code", code), ("prose", prose)):
        path = folder / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        scores = [ScoreGroup.prose] if domain == "prose" else []
        sources.append(Source(domain, SourceKind.jsonl, str(path), scores=scores, **facts))  # type: ignore[arg-type]
    made = make_recipe(folder / "shards", sources=sources)
    build_shards(made)
    return made


@pytest.fixture(scope="module")
def found(recipe: Recipe) -> Exploration:
    return explore(Path(recipe.data.shards))


def test_documents_are_those_of_the_sources(recipe: Recipe, found: Exploration) -> None:
    given = set()
    for source in recipe.data.sources:
        given |= {json.loads(line)["text"] for line in Path(source.path).read_text().splitlines()}
    assert len(found.documents) == 36 + 1 + 36
    assert set(found.measures.texts) <= {text.strip() + "\n" for text in given}
    assert len(set(found.measures.texts)) == len(found.documents)
    assert {document.split for document in found.documents} == {"train", "validation"}


def test_fewer_documents_are_drawn_at_random_from_a_seed(recipe: Recipe, found: Exploration) -> None:
    shards = Shards.open(Path(recipe.data.shards))
    whole = {it.name: it.tokens.tolist() for it in found.documents}
    drawn = draw_documents(shards, "prose", 9, seed=1)
    assert len(drawn) == 9 and all(whole[it.name] == it.tokens.tolist() for it in drawn)
    assert [it.name for it in drawn] == [it.name for it in draw_documents(shards, "prose", 9, seed=1)]
    assert [it.name for it in drawn] != [it.name for it in draw_documents(shards, "prose", 9, seed=2)]
    alone = Shards.open(Path(recipe.data.shards) / "prose")
    assert list(alone.domains) == ["prose"] and len(draw_documents(alone, "prose", 10**6, 0)) == 36


def test_languages_copies_and_rarity_are_found(found: Exploration) -> None:
    assert found.domains["prose"].languages == {"en": 24, "de": 12}
    removed = [(line["reason"], line["of"]) for line in found.removed_copies["code"]]
    assert sorted(reason for reason, _ in removed) == ["exact duplicate", "near duplicate"]
    assert found.removed_copies["prose"] == [] and found.domains["code"].near_copies == 0
    rarest = int(np.argmax(found.measures.surprisal))
    assert found.measures.texts[rarest].startswith("zq%!")
    # Ids 1 and 4 are equally frequent; 0 occurs only here, 2 only elsewhere, 3 is more frequent here.
    assert typical_ids(np.array([50, 20, 0, 30, 9]), np.array([0, 20, 75, 5, 9])) == [0, 3]


def test_copies_that_are_still_there_are_found(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    texts = [tale(topic, n) for topic in TOPICS for n in range(3)]
    texts += [texts[0], texts[1] + "Truly so.\n", texts[1] + "Truly so, so.\n"]
    recipe = make_recipe(tmp_path / "shards", domains={"prose": 1.0})
    # Given documents are kept as they are.
    given = [CorpusDocument("prose", f"{n}.txt", text) for n, text in enumerate(texts)]
    build_shards(recipe, documents=lambda: iter(given))
    found = explore(tmp_path / "shards")
    assert (found.domains["prose"].exact_copies, found.domains["prose"].near_copies) == (1, 2)
    of = {found.documents[n].name: found.documents[it].name for n, it in enumerate(found.measures.copy_of)}
    assert {name: first for name, first in of.items() if name != first} == {
        "9.txt": "0.txt",
        "10.txt": "1.txt",
        "11.txt": "1.txt",
    }


def test_clusters_are_the_topics_and_the_page_is_the_same_again(
    recipe: Recipe, found: Exploration, tmp_path: Path
) -> None:
    topics = [
        next((t for t, words in TOPICS.items() if words.split()[0] in text), "")
        for text in found.measures.texts
    ]
    for cluster in range(len(found.map.labels)):
        inside = [topics[n] for n in np.flatnonzero(found.map.cluster == cluster) if topics[n]]
        assert len(set(inside)) <= 1
    words = set(" ".join(TOPICS.values()).split())
    assert sum(bool(words & set(label.split())) for label in found.map.labels) >= len(TOPICS)
    for name, exploration in (("one", found), ("two", explore(Path(recipe.data.shards)))):
        write_page(exploration, tmp_path / name)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_lines_are_drawn_evenly(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(200)))
    assert [line["n"] for line in draw_lines(path, 500, 0)] == list(range(200))
    means = [np.mean([line["n"] for line in draw_lines(path, 50, seed)]) for seed in range(40)]
    assert abs(np.mean(means) - 99.5) < 5


def test_the_page_is_searched_in_a_browser(found: Exploration, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(found, page)
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?!#|["'])|@import|url\((?!["']?#)""", text)
    whole, complaints = opened(page)
    assert complaints == ""
    assert '<p id="count" role="status">73 of 73 documents</p>' in whole
    assert whole.count("<circle") == 73 and "<b>bold</b>" not in whole
    hits = sum("kettle" in text[:600].lower() for text in found.measures.texts)
    searched, complaints = opened(page, "#q=kettle&colour=domain")
    assert complaints == "" and 0 < hits < 73
    assert f'<p id="count" role="status">{hits} of 73 documents</p>' in searched
    assert searched.count('class="off"') == 73 - hits and "<mark>kettle</mark>" in searched
    label = f"2: {found.map.labels[1]}"
    inside = int((found.map.cluster == 1).sum())
    filtered, _ = opened(page, f"#cluster={label.replace(' ', '+')}")
    assert f"{inside} of 73 documents" in filtered and html.escape(label) in filtered
    # Coloured by domain, and the key names both; the longest document comes first.
    ordered, _ = opened(page, "#order=longest&colour=domain")
    fills = re.findall(r'<circle [^>]*fill="([^"]+)"', ordered)
    domains = [it.domain for it in found.documents]
    assert len(set(fills)) == 2 and len(set(zip(fills, domains, strict=True))) == 2
    lengths = [int(text) for text in re.findall(r"· (\d+) tokens ·", ordered)]
    assert lengths == sorted((it.tokens.size for it in found.documents), reverse=True)[: len(lengths)]
    assert len(lengths) == 20


def test_the_page_shows_what_a_threshold_would_remove(
    recipe: Recipe, found: Exploration, tmp_path: Path
) -> None:
    from pyarrow import parquet

    table = parquet.read_table(Path(recipe.data.shards) / "prose/scores.parquet").to_pydict()
    texts = dict(zip(table["place"], table["excerpt"], strict=True))
    write_page(found, tmp_path / "page.html")
    for score, bound, at in (
        ("symbols_per_word", "at_most", 300),
        ("word_length", "at_least", 700),
        ("most_frequent_2gram", "at_most", 400),
        ("language_probability", "at_least", 1000),
    ):
        candidates = found.scores["prose"].scores[score].at
        bar = candidates[int(at / 1000 * (len(candidates) - 1) + 0.5)]
        values = {p: v for p, v in zip(table["place"], table[score], strict=True) if v is not None}
        out = {p for p, v in values.items() if (v < bar if bound == "at_least" else v > bar)}
        shown, complaints = opened(tmp_path / "page.html", f"#score={score}&bound={bound}&at={at}")
        assert complaints == ""
        (said,) = re.findall(r'<p id="removed" role="status">(.*?)</p>', shown)
        share = f"({100 * len(out) / 36:.1f}%), of the 36 in the shards {len(out)}"
        assert said.startswith(f"{{ score: {score}, {bound}: ") and said.endswith(
            f" removes {len(out)} of 36 documents {share}"
        )
        sides = re.search(
            r'<div id="out">(.*?)</div></div><div><h3>kept</h3><div id="in">(.*?)</div></div>',
            shown,
            re.DOTALL,
        )
        assert sides is not None
        for side, wanted in ((sides[1], out), (sides[2], values.keys() - out)):
            places = re.findall(r"<header><b>(.*?)</b>", side)
            assert len(places) == min(6, len(wanted)) and set(places) <= wanted
            assert all(html.escape(texts[place], quote=False) in side for place in places)
        (bins,) = re.findall(r'<svg id="bins".*?</svg>', shown, re.DOTALL)
        assert bins.count("<rect") == 48
    assert 'id="scored"' not in shards_page(replace(found, scores={}))


def test_of_conversations_the_page_shows_which_text_has_a_loss(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    rows = [{"prompt": f"Why 😀 {n}?\n", "response": f"Weil naïve 中文 {n}."} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": "Plain text that is read with a loss."}) + "\n")
    facts = {"dataset": "tales", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
    sources = [
        Source("code", kind, str(tmp_path / f"{name}.jsonl"), **facts)  # type: ignore[arg-type]
        for name, kind in (("asked", SourceKind.instructions), ("plain", SourceKind.jsonl))
    ]
    recipe = make_recipe(
        tmp_path / "shards",
        domains={"code": 1.0},
        sources=sources,
        preparation=Preparation(near_duplicates=None, validation_share=0.1),
    )
    recipe = replace(recipe, training=replace(recipe.training, loss_mean=LossMean.targets))
    manifest = build_shards(recipe)
    found = explore(tmp_path / "shards")
    for document, text, spans in zip(
        found.documents, found.measures.texts, found.measures.trained, strict=True
    ):
        if text.startswith("Plain"):
            assert spans is None and document.trained is not None and document.trained.all()
        else:
            assert spans == [(text.index("Weil"), len(text))]
    with_loss = found.domains["code"].tokens_with_loss
    every = [split.trained_tokens or 0 for split in manifest.domains["code"].splits.values()]
    assert with_loss + len(found.documents) == sum(every), "what ends a document has a loss too"
    write_page(found, tmp_path / "page.html")
    shown, complaints = opened(tmp_path / "page.html", "#order=shortest&q=Weil")
    assert complaints == "" and "Text on a <span" in shown
    said = re.findall(r'<pre[^>]*>(.*?)<span class="trained">(.*?)</span></pre>', shown, re.DOTALL)
    assert len(said) == 20
    for prompt, response in said:
        assert re.fullmatch(r"Why 😀 \d+\?\n", prompt)
        assert re.fullmatch(r"<mark>Weil</mark> naïve 中文 \d+\.", response)


def test_the_command_writes_the_page_and_says_what_is_wrong(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, page, figures = recipe.data.shards, tmp_path / "page.html", tmp_path / "figures.json"
    assert main([shards, "--html", str(page), "--sample", "20", "--json", str(figures)]) == 0
    assert "20 documents drawn" in capsys.readouterr().out and page.is_file()
    tree = json.loads(figures.read_text())["domains"]["code"]
    assert tree["sampled"]["documents"] == 10 and tree["left_out"]["exact duplicate"] == 1
    for arguments, complaint in {
        (shards, "--html", str(page), "--sample", "1"): "--sample: is 1; give 2 or more, one for each domain",
        (shards, "--html", str(tmp_path / "none/page.html")): "--html: .*none is not a folder",
        (str(tmp_path),): "data.shards: no shards at ",
    }.items():
        assert main(list(arguments)) == 2
        assert re.search(complaint, capsys.readouterr().err), complaint


def test_the_old_command_writes_the_page_and_says_its_new_name(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(Path(recipe.data.shards).resolve())
    old = "python -m data.audit SHARDS --html is now called python -m data.explore SHARDS\n"
    for arguments, page in (
        (["shards", "--html", "--sample", "20"], "shards.html"),
        (["shards", "--sample", "20", "--html", "named.html"], "named.html"),
        (["--html=given.html", "--sample", "20", "shards"], "given.html"),
    ):
        assert audit(arguments) == 0
        assert capsys.readouterr().err == old and (tmp_path / page).is_file()
    assert audit(["shards"]) == 2
    assert "has no data_log.jsonl; give the folder of a run" in capsys.readouterr().err


def test_too_few_documents_have_no_map(tmp_path: Path, built: Recipe) -> None:
    with pytest.raises(UserError, match="no shards"):
        explore(tmp_path)
    words = [f"{topic} {word}" for topic in TOPICS for word in ("ship bread rose", "sail oven tulip")]
    assert map_documents(words * 2, 0).labels != ["all"]
    assert map_documents(words, 0).labels == ["all"]
    few = explore(Path(built.data.shards), 6)
    assert few.map.labels == ["all"] and len(few.documents) == 6
    write_page(few, tmp_path / "few.html")
