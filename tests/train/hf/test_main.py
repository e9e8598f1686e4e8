"""The command line: its help, and errors for incompatible arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.hf.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ("import", "export", "upcycle", "check", "serving")


def test_help_lists_every_command_and_needs_no_torch() -> None:
    code = (
        "import sys; from train.hf.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"python -m train.hf {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "folder"], "import: give SOURCE and OUT, or --verify and a folder"),
        (["import", "folder", "out", "--verify"], "import: give SOURCE and OUT, or --verify and a folder"),
        (["check", "folder"], "check: give SOURCE and FOLDER, or neither to check every architecture"),
    ],
)
def test_arguments_that_do_not_go_together_are_a_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{words}\n"


@pytest.mark.parametrize("option", [["--experts", "0"], ["--granularity", "x"]])
def test_counts_are_positive(option: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["upcycle", "source", "out", *option])
