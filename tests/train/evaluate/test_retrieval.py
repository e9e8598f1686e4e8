"""Retrieval: the pair is at its depth, and a model that copies finds it."""

import random
from typing import Any

import pytest
import torch

from train.evaluate.retrieval import make_prompt, retrieval
from train.recipe.errors import UserError


def _encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_fits_and_asks_for_the_pair_at_its_depth(depth: float) -> None:
    ids, answer, pairs = make_prompt(_encode, 500, depth, random.Random(1))
    text, value = bytes(ids).decode(), bytes(answer).decode()
    # The longest that fits: no room for another pair of 24 characters.
    assert 500 - 24 - 4 <= len(ids) + len(answer) <= 500 and text.count('": "') == pairs
    key = text.rpartition('Key: "')[2][:8]
    place = text.index(f'"{key}": "{value}"')
    before = text[:place].count('": "')
    assert before == round(depth * (pairs - 1))
    assert text.endswith(': "')


class Copier:
    """A model that copies what followed the same eight letters earlier, within the first `reach` letters."""

    def __init__(self, reach: int) -> None:
        self.reach, self.limit = reach, 10_000

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        text = bytes(ids_BS[0].tolist()).decode()
        key = text.rpartition('Key: "')[2][:8]
        value = text[: self.reach].partition(f'"{key}": "')[2][:8].ljust(8, "x")
        logits = torch.zeros(1, len(text), 256)
        for i, letter in enumerate(value):
            logits[0, len(text) - 9 + i, ord(letter)] = 20.0
        return logits


def test_what_is_out_of_reach_is_not_found() -> None:
    scorer: Any = Copier(reach=300)
    cells = retrieval(scorer, _encode, [200, 600], [0.0, 1.0], trials=2)
    assert {(c.length_tokens, c.depth): c.accuracy for c in cells} == {
        (200, 0.0): 1.0,
        (200, 1.0): 1.0,
        (600, 0.0): 1.0,
        (600, 1.0): 0.0,
    }
    assert cells[0].token_loss < 1e-3 < cells[-1].token_loss


@pytest.mark.parametrize(("length", "complaint"), [(20_000, "exceed the model's"), (60, "two pairs")])
def test_impossible_lengths(length: int, complaint: str) -> None:
    scorer: Any = Copier(reach=300)
    with pytest.raises(UserError, match=complaint):
        retrieval(scorer, _encode, [length], [0.0], trials=1)
