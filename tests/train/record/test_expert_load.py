import math

import pytest
import torch

from train.record.expert_load import ExpertLoad, measure_load


def test_known_counts() -> None:
    balanced, skewed, single = measure_load(torch.tensor([[5, 5, 5, 5], [8, 4, 2, 2], [0, 16, 0, 0]]))
    assert (balanced.busiest, balanced.idlest, balanced.dead) == (0.25, 0.25, 0)
    assert balanced.entropy == pytest.approx(1)
    assert (skewed.busiest, skewed.idlest, skewed.dead) == (0.5, 0.125, 0)
    # Half, a quarter and two eighths: 1.75 of at most 2 bits.
    assert skewed.entropy == pytest.approx(1.75 / 2)
    assert (single.busiest, single.idlest, single.dead) == (1, 0, 3)
    assert single.entropy == 0


def test_no_tokens_at_all() -> None:
    (load,) = measure_load(torch.zeros(1, 4, dtype=torch.int64))
    assert (load.busiest, load.entropy, load.dead) == (0, 0, 4)


def test_one_expert_alone() -> None:
    (load,) = measure_load(torch.tensor([[7]]))
    assert (load.busiest, load.idlest, load.dead) == (1, 1, 0)
    assert math.isfinite(load.entropy)


@pytest.mark.parametrize(("batches", "interval"), [(1, 1), (400, 1), (401, 2), (500_000, 1250)])
def test_heat_map_columns_are_bounded(tmp_path, batches: int, interval: int) -> None:
    callback = ExpertLoad(tmp_path, batches, lambda: None)
    assert callback.interval_batches == interval
    callback.log.close()
