"""The report page: every section from real files, no external resources, unfinished runs too."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.browser import opened
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.units import duration
from train.record import metrics
from train.record.changes import Change, KeyChange, write_changes
from train.record.lease import hold, release
from train.record.page.rendering import digest
from train.record.page.svg import COLOURS
from train.record.step_log import EXPERT_LOAD_FILE, StepLog
from train.record.summary import DatasetInput, Summary, read_summary, write_summary
from train.report.__main__ import main
from train.report.marks import step_places
from train.report.overlay import write_overlay
from train.report.plots import smoothed, thinned
from train.report.run_page import key_figures, write_report
from train.report.run_record import Series, read_run

pytestmark = pytest.mark.slow

SMOKE = Path(__file__).parents[3] / "yamls" / "smoke.yaml"
LAYERS, EXPERTS, STEPS = 2, 4, 30
SUMMARY = Summary(
    name="toy",
    batches=STEPS,
    tokens=STEPS * 1000,
    seconds=75.0,
    validation_loss={"code": 3.0, "prose": 4.0},
    unigram_entropy={"code": 6.5, "prose": 7.0},
    parameters_total=7_400_000,
    parameters_active=3_100_000,
    flops_per_token=2e7,
    peak_flops=1.7e12,
    precision="bf16",
    devices=1,
    hardware="2 cores of Some <Processor>",
    git_commit="0123abcd",
    packages={"torch": "2.7.0"},
    datasets=[DatasetInput("code/train", "ab" * 32, "shards/code", 900_000)],
)
SECTIONS = [
    "Loss",
    "Domains",
    "Throughput",
    "Step time",
    "Memory",
    "Optimisation",
    "Layers",
    "Expert load",
    "Evaluation",
    "Sample text",
    "Origin",
    "Recipe",
]


def leave_run(run_dir: Path, *, steps: int = STEPS, experts: bool = True, summary: bool = True) -> Path:
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(to_yaml(load_recipe(SMOKE, ["name=toy"])))
    record, load = StepLog(run_dir / "metrics.jsonl"), StepLog(run_dir / EXPERT_LOAD_FILE)
    for step in range(1, steps + 1):
        plain = {metric.key for metric in metrics.METRICS if metric.key.islower()}
        record.write(step, {"tokens": 1000 * step, "time": 1e9, **dict.fromkeys(plain, 1 / step)})
        if experts:
            for layer in range(LAYERS):
                for key in (metrics.EXPERT_BUSIEST, metrics.EXPERT_IDLEST, metrics.EXPERT_ENTROPY):
                    record.write(step, {metrics.of_layer(key, layer): 0.25})
                record.write(step, {metrics.of_layer(metrics.EXPERT_DEAD, layer): 1})
                for place, key in enumerate((metrics.LAYER_GRADIENT, metrics.LAYER_UPDATE), start=1):
                    record.write(step, {metrics.of_layer(key, layer): place / step})
                record.write(step, {metrics.of_layer(metrics.LAYER_WEIGHTS, layer): 4.0})
            load.write(step, {"shares": [[0.5, 0.25, 0.25, 0.0]] * LAYERS})
        if step % 10 == 0:
            record.write(step, {metrics.validation_loss("code"): 3.0, metrics.bits_per_byte("code"): 1.25})
            record.write(step, {metrics.validation_loss("prose"): 4.0})
            record.write(step, {"data/code/tokens": 5.12e5, "data/code/epochs": 0.625})
    if summary:
        write_summary(run_dir, SUMMARY)
        (run_dir / "sample.txt").write_text("if a < b & c:")
    return run_dir


class LinkCollector(HTMLParser):
    """Collects the resources that a page would load, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]
        assert tag not in ("link", "iframe", "object", "embed")
        if tag not in ("meta", "br", "path", "use", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = leave_run(tmp_path_factory.mktemp("runs") / "toy")
    return write_report(run_dir).read_text()


def test_goodput_is_training_over_the_time_since_the_first_start(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "toy")
    assert "goodput" not in key_figures(read_run(run)), "nothing interrupted it"
    begun = (run / "summary.json").stat().st_mtime - 4 * SUMMARY.seconds
    log = tmp_path / "toy.restarts/restarts.jsonl"
    log.parent.mkdir()
    log.write_text(f'{{"begun": {begun}}}\n{{"begun": {begun + 30}}}\n')
    assert key_figures(read_run(run))["goodput"] == pytest.approx(0.25)
    assert "25.0%" in write_report(run).read_text()
    log.write_text("torn")
    assert "goodput" not in key_figures(read_run(run))


def test_every_section_is_there(page: str) -> None:
    links = LinkCollector()
    links.feed(page)
    assert links.headings == SECTIONS
    assert page.count("<svg") == 10


def test_nothing_is_loaded_from_outside(page: str) -> None:
    links = LinkCollector()
    links.feed(page)
    assert links.addresses
    assert all(address.startswith(("#", "data:")) for address in links.addresses)
    assert not re.search(r"https?:|//\w+\.\w+|@import|url\((?!#)", page)


POINT = """
const svg = document.querySelector("svg[data-chart]"), [axis] = JSON.parse(svg.dataset.chart);
const line = document.getElementById(axis.lines[0].id).querySelector("path"), before = line.getAttribute("d");
svg.setPointerCapture = () => {};
function fire(type, tokens) {
  const range = window.zoomed ?? axis.x, share = (tokens - range[0]) / (range[1] - range[0]);
  const place = new DOMPoint(axis.box[0] + share * axis.box[2], axis.box[1] + axis.box[3] / 2);
  const { x, y } = place.matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, button: 0, pointerType: "mouse" }));
}
const said = () => [...document.querySelector(".tooltip").children].map((row) => row.textContent);
const found = {};
fire("pointermove", 0.00702), (found.whole = said());
fire("pointerdown", 0.01), fire("pointermove", 0.02), fire("pointerup", 0.02), (window.zoomed = [0.01, 0.02]);
fire("pointermove", 0.01198), (found.zoomed = said());
found.ends = [line.getAttribute("d") !== before, document.body.className];
svg.dispatchEvent(new MouseEvent("dblclick")), (found.restored = line.getAttribute("d") === before);
document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
"""
"""Points at 7,000 tokens, drags from 10,000 to 20,000, points at 12,000 there, and double-clicks."""


def test_values_under_the_pointer_and_zoom_in_a_browser(tmp_path: Path) -> None:
    run_dir = leave_run(tmp_path / "toy")
    fields = {"alarms": ["spike: loss 9"], "action": "skip", "documents": []}
    StepLog(run_dir / "alarms.jsonl").write(7, fields)
    keys = (KeyChange("guard.norm_deviations", 20, 100),)
    write_changes(run_dir, [Change(12, 12_000, "2026-11-28 12:00", "toy", "", keys)])
    page = write_report(run_dir)
    # The policy admits the page's own script; the test's is admitted in the same way.
    (own,) = re.findall(r"<script>(.*)</script>", page.read_text(), flags=re.DOTALL)
    assert f"script-src '{digest(own)}'" in page.read_text()
    text = page.read_text().replace(f"'{digest(own)}'", f"'{digest(own)}' '{digest(POINT)}'")
    page.write_text(text.replace("</body>", f"<script>{POINT}</script></body>"))
    whole, complaints = opened(page)
    assert complaints == ""
    found = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', whole)[-1])
    assert found["whole"][0] == "step 7, 0.007 million tokens" and "training: 0.1429" in found["whole"]
    assert found["whole"][-1] == "alarm: spike: loss 9 (skip)"
    assert found["zoomed"][0] == "step 12, 0.012 million tokens" and "training: 0.08333" in found["zoomed"]
    assert found["zoomed"][-1] == "resumed: guard.norm_deviations 20 to 100"
    assert found["ends"] == [True, "zoomed"] and found["restored"]


def test_steps_follow_from_tokens_where_batches_change(tmp_path: Path) -> None:
    run = read_run(leave_run(tmp_path / "toy", steps=4, experts=False))
    for line, tokens in zip(run.steps, (1000, 2000, 4000, 6000), strict=True):
        line["tokens"] = tokens
    assert step_places(run) == [(0.001, 1), (0.002, 2), (0.006, 4)]


def test_figures_take_the_pages_ink(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#0a0b0c" not in page
    assert not re.search(r"fill: #ffffff|fill: white", page)


def test_ids_of_figures_do_not_clash(page: str) -> None:
    clips = re.findall(r'<clipPath id="(\w+)"', page)
    assert len(clips) == len(set(clips))


def test_figures_and_texts_of_the_run(page: str) -> None:
    for text in (
        "3.500",  # mean validation loss
        "6.750",  # mean unigram entropy
        "1 min 15 s",
        "7.40M",
        "Some &lt;Processor&gt;",
        "if a &lt; b &amp; c:",
        "unigram entropy, prose: 7.00",
        "ab" * 32,
        "n_kv_heads: 2",
        "1.70 TFLOP/s",
        "In the last batch, 2 of 8 experts took none",
    ):
        assert text in page


def test_unfinished_run_has_a_page(tmp_path: Path) -> None:
    run_dir = leave_run(tmp_path / "toy", summary=False)
    page = write_report(run_dir).read_text()
    assert "not complete" in page and "refresh" not in page
    # 30,000 of 1,200,000 tokens; each step writes all its parts as 1 / step seconds for 1,000 tokens.
    seconds = sum(3 / step for step in range(2, STEPS + 1)) / (STEPS - 1) * 1170
    expected = f"2.5% done, stopped, {duration(seconds)} left once resumed, as of 2001-09-09 01:46:40 UTC"
    assert expected in page
    hold(run_dir, key="name", remedy="")
    try:
        live = write_report(run_dir).read_text()
    finally:
        release(run_dir)
    assert f"2.5% done, {duration(seconds)} left, as of" in live and 'http-equiv="refresh"' in live
    assert "Origin" not in page
    assert "Expert load" in page


def test_dense_run_has_no_experts(tmp_path: Path) -> None:
    assert "Expert load" not in write_report(leave_run(tmp_path / "toy", experts=False)).read_text()


def test_alarms_of_the_guard_are_on_the_page(tmp_path: Path) -> None:
    run_dir = leave_run(tmp_path / "toy")
    pieces = [{"domain": "code", "document": f"{name}.py", "tokens": 9 - n} for n, name in enumerate("abcde")]
    fields = {"alarms": ["spike: loss 9"], "action": "skip", "documents": pieces}
    StepLog(run_dir / "alarms.jsonl").write(7, fields)
    page = write_report(run_dir).read_text()
    assert "<h2>Alarms</h2>" in page and "spike: loss 9" in page
    assert "code: a.py, code: b.py, code: c.py, code: d.py and 1 more" in page


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_begun_run_has_a_page(tmp_path: Path, steps: int) -> None:
    assert (
        "<h2>Recipe</h2>" in write_report(leave_run(tmp_path / "toy", steps=steps, summary=False)).read_text()
    )


def test_diverged_run_has_a_page(tmp_path: Path) -> None:
    run_dir = leave_run(tmp_path / "toy", summary=False)
    record = StepLog(run_dir / "metrics.jsonl")
    record.drop_after(STEPS)
    for step in range(STEPS + 1, STEPS + 5):
        lost = {metrics.LOSS: float("nan"), metrics.GRADIENT_NORM: float("inf")}
        record.write(step, {"tokens": 1000 * step, "time": 1e9, **lost})
    assert "<h2>Loss</h2>" in write_report(run_dir).read_text()


def test_summary_comes_back_equal(tmp_path: Path) -> None:
    write_summary(tmp_path, SUMMARY)
    assert read_summary(tmp_path) == SUMMARY
    assert SUMMARY.mean_validation_loss == 3.5


def test_command_prints_and_writes_key_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = leave_run(tmp_path / "toy")
    figures = tmp_path / "figures.json"
    assert main([str(run_dir), "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"validation loss, mean +3\.5000\n", shown)
    assert shown.endswith(f"{run_dir}/report.html\n")
    assert json.loads(figures.read_text()) == key_figures(read_run(run_dir))


def test_other_folders_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: has no recipe.yaml; give the folder of a run, runs/NAME\n"


def test_thinning_keeps_means_and_order() -> None:
    series = Series(np.arange(10_000.0), np.arange(10_000.0) * 2)
    thin = thinned(series, points=100)
    assert len(thin) == 100
    assert np.allclose(thin.values, thin.tokens * 2)
    assert thin.values.mean() == pytest.approx(series.values.mean())


def test_smoothing_bends_no_line_and_passes_over_gaps() -> None:
    line = np.linspace(5.0, 1.0, 500)
    assert np.allclose(smoothed(line), line)
    line[100:110] = np.nan
    assert np.isfinite(smoothed(line, share=0.1)).all()
    rough = np.random.default_rng(0).normal(size=500)
    assert smoothed(rough)[50:-50].std() < rough.std() / 2


def test_an_overlay_shows_a_fork_upon_its_original_and_commits_shortened(tmp_path: Path) -> None:
    runs = [leave_run(tmp_path / name) for name in ("original", "fork")]
    other = leave_run(tmp_path / "other", steps=1)
    for run_dir in (*runs, other):
        write_summary(run_dir, replace(SUMMARY, git_commit="0123456789" * 4))
    write_overlay([*runs, other], tmp_path / "overlay.html")
    page = (tmp_path / "overlay.html").read_text()
    assert page.count(f'<td title="{"0123456789" * 4}">0123456789</td>') == 3
    loss = page[page.index("<h2>Loss") : page.index("<h2>Difference")]
    first, second, third = (
        [line for line in re.findall(r'<path d="M[^"]*L[^"]*"[^>]*>', loss) if f"stroke: {colour}" in line]
        for colour in COLOURS[:3]
    )
    assert first and not any("stroke-dasharray" in line for line in first)
    assert second and all("stroke-dasharray" in line for line in second)
    assert not any("stroke-dasharray" in line for line in third), "one equal step is no repetition"
