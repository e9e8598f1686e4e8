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


def test_replicate_repeats_columns_and_sums_them_back() -> None:
    x, ends = torch.tensor([[5, 6, 7]]), torch.tensor([2, 2, 5], dtype=torch.int32)
    out = torch.empty(1, 5, dtype=x.dtype)
    megablocks_ops.replicate_forward(x, ends, out)
    assert out.tolist() == [[5, 5, 7, 7, 7]]
    back = torch.empty_like(x)
    megablocks_ops.replicate_backward(torch.tensor([[1, 2, 3, 4, 5]]), ends, back)
    assert back.tolist() == [[3, 0, 12]]


SIZES = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 2, 70, 0], [64, 64, 0, 64], [0, 0, 0, 0])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("trans_b", [False, True])
def test_grouped_product_and_gradients_equal_a_loop(sizes: list[int], trans_b: bool) -> None:
    a = torch.randn(sum(sizes), 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, *((5, 6) if trans_b else (6, 5)), dtype=torch.float64, requires_grad=True)
    out = megablocks_ops.gmm(a, b, torch.tensor(sizes), trans_b)
    expected = torch.cat([rows @ (b[e].t() if trans_b else b[e]) for e, rows in enumerate(a.split(sizes))])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (a, b), grad)
    theirs = torch.autograd.grad(expected, (a, b), grad)
    torch.testing.assert_close(ours, theirs)


def test_under_autocast_grouped_products_are_bf16() -> None:
    x, w = torch.randn(6, 8), torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert megablocks_ops.gmm(x, w, torch.tensor([2, 4]), trans_b=True).dtype == torch.bfloat16


def test_installing_again_changes_nothing() -> None:
    from megablocks.backend import kernels
    from megablocks.layers import glu

    before = [sys.modules["megablocks_ops"], kernels.gather, glu.memory_optimized_grouped_glu]
    megablocks_ops.install()
    assert before == [sys.modules["megablocks_ops"], kernels.gather, glu.memory_optimized_grouped_glu]


def test_a_compiled_module_is_left_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "grouped_gemm.py").write_text("COMPILED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "grouped_gemm")
    megablocks_ops.install()
    import grouped_gemm

    assert grouped_gemm.COMPILED
