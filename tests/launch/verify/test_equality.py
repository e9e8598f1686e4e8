"""The first difference between two runs is found in their records, before any checkpoint is opened."""

import json
import math
from pathlib import Path

import pytest
import torch

from launch.verify.equality import differences, unequal
from train.record import metrics
from train.record.run_folder import DATA_LOG_FILE, METRICS_FILE


def recorded(folder: Path, losses: list[float], tokens: int = 8) -> Path:
    """Returns a run's folder with its metrics and data log."""
    folder.mkdir()
    rows = [{"step": step + 1, metrics.LOSS: loss} for step, loss in enumerate(losses)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = [{"step": row["step"], "tokens": tokens} for row in rows]
    (folder / DATA_LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


@pytest.mark.parametrize(
    ("losses", "tokens", "said"),
    [
        ([2.0, 1.0, 0.5], 8, "has steps [1, 2, 3]"),
        ([2.0, 1.0 + 2**-40], 8, "step 2: loss"),
        ([2.0, math.nan], 8, "step 2: loss"),
        ([2.0, 1.0], 9, "the data log has"),
    ],
)
def test_a_difference_in_the_record_is_named(
    losses: list[float], tokens: int, said: str, tmp_path: Path
) -> None:
    whole = recorded(tmp_path / "whole", [2.0, 1.0])
    [found] = differences(whole, recorded(tmp_path / "other", losses, tokens))
    assert found.startswith(said), found


def test_a_tensor_that_is_missing_or_differs_is_named() -> None:
    one = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert list(unequal(one, dict(one))) == []
    assert list(unequal(one, one | {"b": torch.tensor([1.0, 1.0 + 2**-20])})) == ["b differs"]
    assert list(unequal(one, {"a": one["a"]})) == ["tensors are missing or new: ['b']"]
