"""Faults of the drill are survived exactly and called by their names."""

from pathlib import Path

from launch.verify.fault_injection import draw, drill
from train.recipe.reading import load_recipe

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


def test_faults_leave_no_trace_in_what_is_trained(tmp_path: Path) -> None:
    kinds = ["NaN", "bad checkpoint", "SIGSTOP", "bad shard"]
    faults = list(drill(load_recipe(YAMLS / "smoke.yaml"), kinds, 0, tmp_path))
    assert [fault.kind for fault in faults] == kinds
    assert [problem for fault in faults for problem in fault.faults] == []


def test_every_kind_is_drawn() -> None:
    import random

    kinds = draw(50, random.Random(0))
    assert len(kinds) == 50 and min(kinds.count(kind) for kind in set(kinds)) == 5
