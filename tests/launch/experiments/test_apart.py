"""Experiments are evidence, not product: nothing outside of them imports them; the README has them all."""

import re
from pathlib import Path

import pytest

from launch.experiments.preflight_trials import main

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "launch" / "experiments"


def test_nothing_outside_imports_them() -> None:
    outside = [
        file
        for top in ("train", "data", "launch")
        for file in (ROOT / top).rglob("*.py")
        if not file.is_relative_to(FOLDER)
    ]
    assert len(outside) > 100
    imports = re.compile(
        r"^\s*(from launch\.experiments|import launch\.experiments|from launch import .*\bexperiments)", re.M
    )
    assert [str(file) for file in outside if imports.search(file.read_text())] == []


def test_the_readme_has_every_command_and_no_other() -> None:
    said = set(re.findall(r"python -m (launch\.experiments[\w.]*)", (FOLDER / "README.md").read_text()))
    files = [file for file in FOLDER.rglob("*.py") if '__name__ == "__main__"' in file.read_text()]
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for file in files
    }
    assert said == names


@pytest.mark.parametrize("options", [["--ranks", "2"], ["--trials", "0"]])
def test_trials_that_tell_nothing_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "yamls/smoke.yaml"), *options]) == 2
    assert "--ranks 3 or more" in capsys.readouterr().err
