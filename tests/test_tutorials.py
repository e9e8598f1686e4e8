"""Commands of docs/tutorials.md: those that check, plan or render run; the others are parsed."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology
from train.record.command import Command, CommandGroup

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/tutorials.md").read_text()
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
HARMLESS = ("--dry-run", "launch.plan", "--render")
OURS = ("mine.yaml", "continue.yaml", "tune.yaml")
"""Recipes that the reader writes."""


def words_of(line: str) -> tuple[str, list[str]]:
    """Splits a command into module and arguments; of a launcher or the supervisor, what it starts."""
    words = shlex.split(line, comments=True)
    if "--" in words:
        assert words[:4] == ["python", "-m", "launch.restart", "--"]
        words = words[words.index("--") + 1 :]
    if words[0] == "composer":
        assert words[1] == "-n" and words[2].isdecimal()
        words = ["python", *words[3:]]
    assert words[0] == "python", line
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


def command_of(module: str) -> Command | CommandGroup:
    """Imports the command of a module."""
    try:
        found = importlib.import_module(f"{module}.__main__")
    except ModuleNotFoundError:
        found = importlib.import_module(module)
    command: Command | CommandGroup = found.main
    return command


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("make ")])
def test_every_command_is_one_that_there_is(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = words_of(line)
    command = command_of(module)
    taken: list[object] = []

    def run(_command: Command, options: object) -> int:
        taken.append(options)
        return 0

    # Options are parsed as the command itself does it, and the work is left out.
    monkeypatch.setattr(Command, "run", run)
    assert command(arguments) == 0 and len(taken) == 1
    for word in arguments:
        if word.endswith(".yaml") and word not in OURS:
            assert (ROOT / word).is_file(), word
    if arguments[0] == "check":  # Weights under our names come first, as an import before has written them.
        assert arguments[1] in {words_of(each)[1][2] for each in LINES if "train.hf import" in each}
    pairs = zip(["", *arguments], arguments, strict=False)
    keys = [word for before, word in pairs if before[:2] != "--" and re.match(r"[a-z_.]+=", word)]
    load_recipe(ROOT / "yamls/quickstart-8gpu.yaml", keys)


@pytest.mark.parametrize("line", [line for line in LINES if any(word in line for word in HARMLESS)])
def test_commands_that_change_nothing_run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module, arguments = words_of(line)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert command_of(module)(arguments) == 0
    assert said.getvalue()


def test_the_quoted_plan_is_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command_of("launch.plan")(["yamls/quickstart-8gpu.yaml", "--gpus", "8", "--gpu", "h100"])
    total = re.search(r"total +([\d.]+) +of ([\d.]+): fits", said.getvalue())
    speed = re.search(r"([\d,]+) tokens/s per GPU", said.getvalue())
    took = re.search(r"(.+) for 382 steps", said.getvalue())
    assert total and speed and took
    of_page = " ".join(PAGE.split())
    assert f"{float(total[1]):.0f} of {float(total[2]):.0f} GiB" in of_page
    assert f"{round(int(speed[1].replace(',', '')), -2):,} tokens/s" in of_page
    assert f"{took[1]} for the 382 steps" in of_page


def test_recipes_that_the_reader_writes_are_read(tmp_path: Path) -> None:
    domains = {"mine": ["web", "code"], "continue": ["web", "code"], "tune": ["chats", "chats", "web"]}
    imported = tmp_path / "weights/mixtral/model.yaml"
    imported.parent.mkdir(parents=True)
    imported.write_text("model: { d_model: 4096, n_layers: 32, n_heads: 32, moe: { experts: 8, top_k: 2 } }")
    texts = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    for text, (name, wanted) in zip(texts, domains.items(), strict=True):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text.replace("yamls/", f"{ROOT}/yamls/"))
        recipe = load_recipe(file, [])
        validate(recipe, Topology(0, 8, 0, 8), file.name)
        assert recipe.name == name and recipe.data.corpus is None
        assert [source.domain for source in recipe.data.sources] == wanted
