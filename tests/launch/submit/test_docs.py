"""Commands shown in README and docs/cluster.md are accepted as written."""

import re
import shlex
from pathlib import Path

import pytest

from launch.submit.__main__ import main
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology

ROOT = Path(__file__).resolve().parents[3]
TEXT = "\n".join((ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "docs/cluster.md"))
ANY_RECIPE = "yamls/dbrx-moe-a.yaml"


def commands(beginning: str) -> list[str]:
    """Returns the commands in fences, tables and sentences, without comments."""
    found = re.findall(rf"(?:^|`){beginning} [^`#\n]*(?:#\w[^`\n]*)?", TEXT, re.MULTILINE)
    return sorted({line.strip("`").split("  #")[0].strip() for line in found})


@pytest.mark.parametrize("command", commands("python -m launch.submit"))
def test_jobs_are_rendered(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word.replace("yamls/X.yaml", ANY_RECIPE) for word in shlex.split(command)[3:]]
    assert main([*words, "--render"]) == 0


@pytest.mark.parametrize(
    "command", commands(r"(?:python -m launch.restart -- )?composer -n \d+ train/main.py")
)
def test_runs_of_several_ranks_are_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    words = words[words.index("composer") :]
    ranks, (recipe, *overrides) = int(words[2]), words[4:]
    recipe = recipe.replace("yamls/X.yaml", ANY_RECIPE)
    validate(load_recipe(recipe, overrides), Topology(0, ranks, 0, ranks), recipe)


def test_the_commands_are_found() -> None:
    assert len(commands("python -m launch.submit")) >= 8
    assert len(commands(r"composer -n \d+ train/main.py")) >= 1
