"""Commands of the previous release run under their old names."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from train.old_names import RENAMED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("new", RENAMED.values())
def test_every_new_name_is_a_command(new: str) -> None:
    module = new.split(maxsplit=1)[0]
    spec = find_spec(module)
    assert (spec is not None and spec.origin is not None) or find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize(
    "old", ["launch.ladder", "launch.drill", "launch.bench.data", "train.interchange.serving"]
)
def test_an_old_command_runs_the_new_one_and_says_so(old: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", old, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == f"python -m {old} is now called python -m {RENAMED[old]}\n"
    assert f"python -m {RENAMED[old].split(maxsplit=1)[0]}" in done.stdout


def test_what_never_was_a_command_is_not_found() -> None:
    assert find_spec("train.exports") is None


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ("launch.plan --published", ["--gpu", "b300"]),
        ("launch.preflight --trials", ["0", "yamls/smoke.yaml"]),
    ],
)
def test_an_option_that_became_a_command_runs_it(old: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *old.split(), *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    first, mistake = done.stderr.splitlines()
    assert first == f"python -m {old} is now called python -m {RENAMED[old]}"
    assert done.returncode == 2 and ("b300" in mistake or "0 trials" in mistake)
