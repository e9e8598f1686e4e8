"""MegaBlocks' low-level operations against their definitions, and their installation."""

import sys
from pathlib import Path

import pytest
import torch

from train.model import megablocks_ops

megablocks_ops.install()


def test_counts_and_running_sums() -> None:
    x = torch.tensor([3, 0, 3, 1], dtype=torch.int32)
    assert megablocks_ops.histogram(x, 5).tolist() == [1, 1, 0, 2, 0]
    assert megablocks_ops.histogram(x, 5).dtype == torch.int32
    inclusive, exclusive = torch.empty(1, 4, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32)
    megablocks_ops.inclusive_cumsum(x.view(1, 4), 1, inclusive)
    megablocks_ops.exclusive_cumsum(x.view(1, 4), 1, exclusive)
    assert inclusive.tolist() == [[3, 3, 6, 7]]
    assert exclusive.tolist() == [[0, 3, 3, 6]]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("most", [1, 127, 128, 255, 256, 30_000])
def test_every_type_is_sorted_and_counted(dtype: torch.dtype, most: int) -> None:
    from megablocks import ops

    x = torch.randint(0, most + 1, (300,), generator=torch.Generator().manual_seed(most)).to(dtype)
    values, places = ops.sort(x, 16)
    wanted, order = torch.sort(x, stable=True)
    assert values.dtype == places.dtype == dtype
    assert values.equal(wanted) and places.long().equal(order)
    assert ops.histogram(x, most + 1).equal(torch.bincount(x.long(), minlength=most + 1).int())
    rows = ops.histogram(x.view(3, 100), most + 1)
    assert rows.equal(torch.stack([ops.histogram(row, most + 1) for row in x.view(3, 100)]))


def test_replicate_repeats_columns_and_sums_them_back() -> None:
    x, ends = torch.tensor([[5, 6, 7]]), torch.tensor([2, 2, 5], dtype=torch.int32)
    out = torch.empty(1, 5, dtype=x.dtype)
    megablocks_ops.replicate_forward(x, ends, out)
    assert out.tolist() == [[5, 5, 7, 7, 7]]
    back = torch.empty_like(x)
    megablocks_ops.replicate_backward(torch.tensor([[1, 2, 3, 4, 5]]), ends, back)
    assert back.tolist() == [[3, 0, 12]]


def test_no_sum_of_rows_is_tuned_by_time() -> None:
    """Triton would choose the block in each process, and the block decides the order of the sum."""
    megablocks_ops.install()
    from megablocks.backend import kernels

    assert len(kernels._padded_copy_wgrad.configs) == 1


def test_installing_again_changes_nothing() -> None:
    from megablocks.backend import kernels

    before = [sys.modules["megablocks_ops"], kernels.gather]
    megablocks_ops.install()
    assert before == [sys.modules["megablocks_ops"], kernels.gather]


def test_a_compiled_module_is_left_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "megablocks_ops.py").write_text("COMPILED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "megablocks_ops")
    megablocks_ops.install()
    import megablocks_ops as compiled

    assert compiled.COMPILED
