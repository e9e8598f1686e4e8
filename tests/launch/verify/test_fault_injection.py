"""Runs survive injected faults exactly, and the supervisor classifies each correctly."""

import random
from pathlib import Path

import pytest

from launch.verify.fault_injection import KINDS, FaultInjectionCheck, draw
from launch.verify.harness import Workspace
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


def test_faults_leave_no_trace_in_what_is_trained(tmp_path: Path) -> None:
    kinds = ["NaN", "torn files", "SIGSTOP", "wrong data", "flipped bit"]
    workspace = Workspace(load_recipe(YAMLS / "smoke.yaml"), tmp_path)
    faults = list(FaultInjectionCheck(kinds).run(workspace))
    assert [fault.what for fault in faults] == kinds
    assert [violation for fault in faults for violation in fault.violations] == []
    assert all(fault.batch and fault.ending in fault.figures for fault in faults)


def test_every_kind_is_drawn() -> None:
    kinds = draw(50, random.Random(0))
    assert len(kinds) == 50 and min(kinds.count(kind) for kind in KINDS) == 50 // len(KINDS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"--only.*'full disk'"):
        FaultInjectionCheck(["fire"])
