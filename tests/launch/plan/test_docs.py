"""Planner output shown in the docs equals what the planner prints today."""

import re
from pathlib import Path

import pytest

from launch.plan.__main__ import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("page", "arguments"),
    [
        ("planner.md", ["yamls/dbrx.yaml", "--gpus", "3072"]),
        ("recipes.md", ["--table5"]),
    ],
)
def test_what_the_docs_show_is_what_the_command_prints(
    page: str, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 0
    shown = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert capsys.readouterr().out.strip() in [block.strip() for block in shown]


def test_each_planned_recipe_of_the_docs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    rows = re.findall(
        r"^\| ([a-z0-9-]+) \| (\d+) \| .* ([\d,]+) \|$",
        (ROOT / "docs" / "planner.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 15
    for recipe, gpus, gpu_hours in rows:
        assert main([f"yamls/{recipe}.yaml", "--gpus", gpus]) == 0
        assert f"{gpu_hours} GPU-hours" in capsys.readouterr().out, recipe
