"""Mutants are what a test may notice; the lines that a test file runs are found in all its processes."""

import ast
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.experiments.mutants import mutants_of
from launch.experiments.mutation import (
    KILLED,
    SURVIVED,
    UNSEEN,
    map_tests,
    read_outcomes,
    run_mutant,
    sample,
    table_of,
)

ROOT = Path(__file__).resolve().parents[3]
SOURCE = '''"""Documentation, 1 < 2."""
import math

LIMIT: int = 3


@functools.lru_cache(maxsize=4)
def f(x: "int < 5", *rest: int) -> bool:
    """Says 1 + 1."""
    assert x > 0
    if not rest and x ** 2 <= LIMIT:
        raise ValueError(f"{x + 1} is too much")
    rest.append("ü" * 2, min(x, 1))
    x -= -y
    return True if x in rest else x
'''


def test_every_mutant_is_a_program_that_differs_in_what_it_does(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text(SOURCE)
    found = mutants_of(file, tmp_path)
    assert sorted((mutant.line, mutant.before, mutant.after) for mutant in found) == sorted(
        [
            (4, "3", "(4)"),
            (11, "not rest and x ** 2 <= LIMIT", "(not rest or x ** 2 <= LIMIT)"),
            (11, "not rest", "(rest)"),
            (11, "x ** 2", "(x * 2)"),
            (11, "x ** 2 <= LIMIT", "(x ** 2 < LIMIT)"),
            (11, "2", "(3)"),
            (13, 'rest.append("ü" * 2, min(x, 1))', "pass"),
            (13, '"ü" * 2', "('ü' / 2)"),
            (13, "2", "(3)"),
            (13, "min(x, 1)", "(max(x, 1))"),
            (13, "1", "(2)"),
            (14, "x -= -y", "x += -y"),
            (14, "-y", "(y)"),
            (15, "True if x in rest else x", "(x if x in rest else True)"),
            (15, "True", "(False)"),
            (15, "x in rest", "(x not in rest)"),
        ]
    )
    whole = ast.dump(ast.parse(SOURCE))
    texts = [mutant.applied_to(SOURCE.encode()).decode() for mutant in found]
    assert all(ast.dump(ast.parse(text)) != whole for text in texts) and len(set(texts)) == len(found)


def test_a_larger_sample_contains_the_smaller_one() -> None:
    few, many = sample("data/order", 5, seed=3), sample("data/order", 20, seed=3)
    assert few == many[:5] and sample("data/order", 20, seed=4) != many
    assert all(mutant.file.startswith("data/order/") for mutant in many)


THING = """
def checked(x):
    return x + 1

def called(x):
    return x * 2

def unseen(x):
    return x - 3
"""
TEST = """
import multiprocessing
from data.thing import called, checked

def work():
    called(1)
    assert checked(1) == 2

def test_it():
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring")
def test_mutants_are_judged_by_the_tests_that_run_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = Path("launch/experiments/seen_lines.py")
    for name, text in {
        "data/thing.py": THING,
        "tests/test_thing.py": TEST,
        "tests/test_broken.py": "assert False",
        str(plugin): (ROOT / plugin).read_text(),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    kept = tmp_path / "map.json"
    tests = map_tests(tmp_path, ["tests/test_thing.py", "tests/test_broken.py"], kept)
    assert "tests/test_broken.py FAILS: left out" in capsys.readouterr().out
    (seen,) = tests.values()
    assert {3, 6} <= set(seen.lines["data/thing.py"]) and 9 not in seen.lines["data/thing.py"]
    assert map_tests(tmp_path, list(tests), kept) == tests and not capsys.readouterr().out

    mutants = [each for each in mutants_of(tmp_path / "data/thing.py", tmp_path) if each.before[0] == "x"]
    outcomes = [run_mutant(tmp_path, "data", mutant, tests) for mutant in mutants]
    assert [outcome.status for outcome in outcomes] == [KILLED, SURVIVED, UNSEEN]
    assert [outcome.by for outcome in outcomes] == ["tests/test_thing.py", "", ""]
    assert (tmp_path / "data/thing.py").read_text() == THING
    assert table_of(["data"], outcomes).splitlines()[-1].split() == ["data", "3", "1", "33%"]
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(asdict(outcomes[0])) + "\n" + '{"name": "cut o')
    assert read_outcomes(out) == outcomes[:1]
