"""Blockwise softmax on CPUs against the plain one."""

import pytest
import torch

from train.cpu import softmax
from train.model import loss

TOKENS, VOCABULARY = 23, 50


@pytest.mark.parametrize("cached", [VOCABULARY // 2, 5 * VOCABULARY, TOKENS * VOCABULARY])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_equal_the_whole(
    cached: int, write: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax is row-wise: splitting between rows changes no bit."""
    monkeypatch.setattr(softmax, "CACHED_ELEMENTS", cached)
    logits = (10 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)).to(dtype)
    ours, theirs = logits.clone(), logits.clone()
    sums = softmax.softmax_in_place(ours, write), loss.softmax_in_place.plain(theirs, write)
    assert torch.equal(*sums) and torch.equal(ours, theirs)
    exact = logits.double()
    torch.testing.assert_close(sums[0].double(), exact.logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    expected = exact.softmax(dim=1) if write else exact
    torch.testing.assert_close(ours, expected.to(dtype))


def test_the_loss_takes_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss.softmax_in_place, "plain", None)
    assert loss.softmax_in_place(torch.zeros(1, 2), True).item() == pytest.approx(0.6931472)
