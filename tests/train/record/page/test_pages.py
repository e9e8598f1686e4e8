"""Every page of ours with hostile names: they appear as text, and nothing is loaded, run or left unclosed."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest

from data.explore.clusters import DocumentMap
from data.explore.exploration import Exploration
from data.explore.measure import PERCENTILES, DomainMeasures, Measures
from data.explore.sample import Document, Shards
from data.explore.scores import Distribution, ScoredDomain
from data.explore.shards_page import shards_page
from data.shards.manifest import DatasetRecord, DomainRecord, Manifest, SplitRecord, TokenizerRecord
from launch.plan.hardware import GPUS
from launch.plan.plan_page import plan_page
from launch.plan.step import make_plan
from tests.train.report.test_report import SUMMARY
from train.recipe.optimization import Training
from train.recipe.reading import load_recipe
from train.recipe.schema import Parallelism, Precision
from train.record import metrics
from train.record.evaluations import BITS, HARNESS, RETRIEVAL, SUITE, add_result
from train.record.page.rendering import ROOT, numeric_columns, render
from train.record.step_log import EXPERT_LOAD_FILE, StepLog
from train.record.summary import DatasetInput, write_summary
from train.report.cells import ComparedRun
from train.report.compare import compare
from train.report.compare_page import comparison_page
from train.report.run_page import report_page
from train.report.run_record import read_run
from train.report.scaling import Advantage

NAME = """<img src=x onerror=alert(1)>"'&amp;{{ 7 * 7 }}$x$"""
"""A name of a run, domain, task or recipe: markup, quotes, an entity, a template, mathematics."""
TEXT = f"</script><script>alert(2)</script></pre><!-- {NAME}"
"""Text that a document or a sample may hold."""
VOID = {"meta", "br", "input", "path", "use", "image", "rect", "line"}
SCRIPTS = 2
"""Elements of the page on shards: its data and its program."""


class Page(HTMLParser):
    """A page as a browser parses it; fails on markup that is not ours."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.figure_texts: list[str] = []
        self.attributes: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form"), tag
        for key, value in attrs:
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "action", "data"):
                assert (value or "").startswith(("#", "data:image/png")), (tag, value)
            self.attributes.append(value or "")
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        assert NAME not in data

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)
        if self.open and self.open[-1] == "text":
            self.figure_texts.append(data)


def hostile_run(folder: Path) -> str:
    run_dir = folder / NAME
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(f"name: {NAME}\n# {TEXT}\n")
    (run_dir / "sample.txt").write_text(TEXT)
    record, load = StepLog(run_dir / "metrics.jsonl"), StepLog(run_dir / EXPERT_LOAD_FILE)
    plain = {metric.key for metric in metrics.METRICS if metric.key.islower()}
    for step in (1, 2, 3):
        record.write(step, {"tokens": 1000 * step, "time": 1e9, **dict.fromkeys(plain, 1 / step)})
        record.write(step, {metrics.validation_loss(NAME): 3.0, f"data/{NAME}/tokens": 5e5})
        record.write(step, {f"evaluation/category/{NAME}": 0.1})
        for key in (
            metrics.EXPERT_BUSIEST,
            metrics.EXPERT_IDLEST,
            metrics.EXPERT_ENTROPY,
            metrics.EXPERT_DEAD,
        ):
            record.write(step, {metrics.of_layer(key, 0): 1})
        load.write(step, {"shares": [[0.75, 0.25]]})
    write_summary(
        run_dir,
        replace(
            SUMMARY,
            name=NAME,
            hardware=TEXT,
            git_commit=NAME,
            precision=NAME,
            packages={NAME: NAME},
            validation_loss={NAME: 3.0},
            unigram_entropy={NAME: 6.0},
            datasets=[DatasetInput(NAME, NAME, NAME, 1)],
        ),
    )
    scores = {"tasks": {NAME: 0.5}, "categories": {NAME: 0.5}, "missing": {NAME: [NAME]}, "average": 0.5}
    tasks = {NAME: {"questions": 9, "accuracy": 0.5, "metric": NAME, "value": 0.5}}
    add_result(run_dir, SUITE, NAME, 3, {"tasks": tasks, "scores": scores, "limit": NAME})
    add_result(run_dir, HARNESS, NAME, 3, {"tasks": tasks, "average": 0.5})
    add_result(run_dir, BITS, NAME, None, {"domains": {NAME: {"loss": 1, "bits_per_byte": 1, "tokens": 1}}})
    cell = {"length_tokens": 128, "depth": 0.5, "accuracy": 1.0, "token_loss": 0.1}
    add_result(run_dir, RETRIEVAL, NAME, 3, {"cells": [cell], "trials": 2})
    return report_page(read_run(run_dir))


def hostile_comparison(_: Path) -> str:
    runs = [
        ComparedRun(NAME, family, seed, 10, 5, 1000, 1e15, {NAME: 3.0 + seed, TEXT: 4.0}, 60.0, NAME)
        for family in ("dense", NAME)
        for seed in range(2)
    ]
    saved = Advantage(NAME, NAME, 3.0, 2.0, 1.5, 2.5, is_extrapolated=False)
    return comparison_page(replace(compare(runs), advantages=[saved], notes=[TEXT]))


def hostile_shards(_: Path) -> str:
    split = SplitRecord(2, 1, 6, 0, 20, 1.0, "", "")
    record = DomainRecord(
        NAME, TEXT, "", "", {"train": split}, [DatasetRecord(NAME, NAME, NAME, NAME)], {NAME: 1, "empty": 2}
    )
    tokenizer = TokenizerRecord(NAME, "", 100, 0, 0)
    documents = [Document(NAME, NAME, "train", np.arange(3, dtype=np.int32)) for _ in range(2)]
    found = Exploration(
        Shards(Path(NAME), Manifest(4, tokenizer, 512, None, None, {NAME: record}), {NAME: record}),
        documents,
        Measures(
            [TEXT, NAME],
            [NAME, "en"],
            np.array([1.0, 2.0]),
            np.array([0, 0]),
            np.array([True, True]),
            [[(0, 3)], None],
        ),
        {
            NAME: DomainMeasures(
                2,
                6,
                dict.fromkeys(map(str, PERCENTILES), 3),
                1,
                {NAME: 1, "en": 1},
                1,
                0,
                3,
                3,
                1.0,
                6,
                [NAME, TEXT],
            )
        },
        DocumentMap(np.zeros((2, 2)), np.zeros(2, dtype=np.int64), [NAME]),
        {NAME: [{"place": NAME, "reason": NAME, "of": TEXT}]},
        {NAME: _hostile_scores()},
    )
    return shards_page(found)


def _hostile_scores() -> ScoredDomain:
    counts = {"below": [0, 1], "above": [1, 0], "kept_below": [0, 1], "kept_above": [1, 0]}
    scores = {"length": Distribution(at=[1.0, 2.0], edges=[1.0, 2.0], bins=[2], **counts)}
    row = {"place": NAME, "reason": NAME, "language": NAME, "excerpt": TEXT, "length": 1.0}
    return ScoredDomain(2, 1, scores, [row])


def hostile_plan(_: Path) -> str:
    recipe = replace(load_recipe(ROOT / "yamls/dbrx.yaml"), name=NAME)
    return plan_page(make_plan(recipe, 3072, GPUS["h100"]))


def hostile_gate(folder: Path) -> str:
    from launch.verify.bounds import QUANTITIES
    from launch.verify.case_run import CaseOutcome
    from launch.verify.parity_report import write_html
    from launch.verify.watching import Deviation

    recipe = SimpleNamespace(parallelism=Parallelism(), training=Training())
    case: Any = SimpleNamespace(
        layout=NAME, input=SimpleNamespace(name=NAME), precision=Precision.fp32, recipe=recipe
    )
    outcomes = [
        CaseOutcome(
            case,
            {quantity: Deviation() for quantity in QUANTITIES} | {"gradients": Deviation(1.0, NAME, NAME)},
        ),
        CaseOutcome(case, error=TEXT),
    ]
    write_html(folder / "parity.html", {"recipe": NAME, "commit": TEXT}, outcomes)
    return (folder / "parity.html").read_text()


def hostile_certificate(folder: Path) -> str:
    from launch.verify.parity_report import write_certificate

    rows = [(NAME, NAME, TEXT, [NAME, TEXT]), ("kill -9", "(1,1,1)", "2 kills", [])]
    write_certificate(folder / "resume.html", {"recipe": NAME}, rows, "Resuming", TEXT)
    return (folder / "resume.html").read_text()


@pytest.mark.parametrize(
    ("write", "scripts", "in_figures"),
    [
        (hostile_run, 1, True),
        (hostile_comparison, 0, True),
        (hostile_shards, SCRIPTS, True),
        (hostile_plan, 0, False),
        (hostile_gate, 0, False),
        (hostile_certificate, 0, False),
    ],
)
def test_hostile_names_are_text_on_every_page(
    write: Callable[[Path], str], scripts: int, in_figures: bool, tmp_path: Path
) -> None:
    html = write(tmp_path)
    page = Page(html)
    assert sum(NAME in text for text in page.texts) >= 2, "in the title and in the heading at least"
    assert any(NAME in text for text in page.figure_texts) == in_figures
    assert len(page.scripts) == scripts
    policy = next(text for text in page.attributes if text.startswith("default-src"))
    assert policy.startswith("default-src 'none'; ") and ("script-src 'sha256-" in policy) == bool(scripts)
    assert "@media (prefers-color-scheme: dark)" in html
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", html)
    if write is not hostile_plan:
        assert TEXT in "".join([*page.texts, *page.attributes])


def test_what_the_script_of_shards_reads_is_what_was_found(tmp_path: Path) -> None:
    tree = json.loads(Page(hostile_shards(tmp_path)).scripts[0])
    assert [document["text"] for document in tree["documents"]] == [TEXT, NAME]
    assert list(tree["values"]) == ["domain", "cluster", "language"], "in the order given"


def test_a_template_that_names_what_is_not_given_fails() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        render("train/record/page/base.html.j2")


def test_columns_of_numbers_are_told_from_text() -> None:
    rows = [["a", "1.25M", "3.1%", "1e+15", "", "-0.5 to 0.5"], ["b", "", "0.4 ms", "+2.00x", "", "7"]]
    assert numeric_columns("123456", rows) == [False, True, True, True, False, False]
    assert numeric_columns("12", []) == [False, False]
