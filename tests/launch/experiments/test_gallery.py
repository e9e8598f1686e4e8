"""The gallery trains, draws and tabulates its runs; its faults change what they are named for."""

import re
from pathlib import Path

import pytest

from launch.experiments import gallery
from train.report.run_record import read_run

pytestmark = pytest.mark.slow


def test_every_run_has_a_figure_and_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)]
    page = tmp_path / gallery.PAGE
    page.write_text("no place for a table\n")
    assert gallery.main(arguments) == 2
    assert "has no lines" in capsys.readouterr().err
    page.write_text(f"before\n{gallery.BEGIN}\n{gallery.END}\nafter\n")
    short = ["training.duration_tokens=12288", "schedule.warmup_tokens=512", "guard.collapse_batches=4"]
    assert gallery.main([*arguments, *short]) == 0
    assert page.read_text().startswith("before\n") and page.read_text().endswith(f"{gallery.END}\nafter\n")
    runs = {each.name: read_run(tmp_path / "runs" / each.name) for each in gallery.EXHIBITS}
    for exhibit in gallery.EXHIBITS:
        text = (tmp_path / gallery.FOLDER / f"{exhibit.name}.svg").read_text()
        assert exhibit.title in text and "busiest expert" in text and "http-equiv" not in text
        assert f"| {exhibit.title}" in page.read_text()
    assert any("collapsed" in reason for alarm in runs["collapse"].alarms for reason in alarm.reasons)
    assert runs["collapse"].load_shares[-1].max() > 1.5 * runs["healthy"].load_shares[-1].max()
    assert runs["places"].steps[0]["gradient_norm"] != runs["healthy"].steps[0]["gradient_norm"]
    assert gallery.main([*arguments, *short]) == 0, "complete runs are drawn again"


def test_the_page_shows_every_figure() -> None:
    shown = set(re.findall(r"\]\(gallery/(\w+)\.svg\)", (gallery.DOCS / gallery.PAGE).read_text()))
    assert shown == {each.name for each in gallery.EXHIBITS}
    files = list((gallery.DOCS / gallery.FOLDER).glob("*.svg"))
    assert {file.stem for file in files} == shown
    assert sum(file.stat().st_size for file in files) < 1_000_000
