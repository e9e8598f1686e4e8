"""Key-value retrieval by depth and length: can the model find a value anywhere in its context?

The prompt is a JSON object of random keys and values and asks for the value of one key, as in Liu et al. 2023
("Lost in the Middle", section 3); the requested pair is at a given depth. Greedy decoding must produce the
value, which one forward pass shows: each of its tokens must be the most likely after the true previous ones.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch

from train.evaluate.scorer import Scorer
from train.recipe.errors import UserError

Encode = Callable[[str], list[int]]
HEX_DIGITS = 8


@dataclasses.dataclass(frozen=True)
class RetrievalCell:
    """The result for one length and depth."""

    length_tokens: int
    """Maximum length of prompt and answer."""
    depth: float
    """Position of the pair: 0 is the beginning, 1 the end."""
    pairs: int
    """Number of pairs in the first prompt."""
    accuracy: float
    token_loss: float
    """Mean cross entropy of the value's tokens, in nats; shows progress before any value is fully right."""


def retrieval(
    scorer: Scorer,
    encode: Encode,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[RetrievalCell]:
    """Measures every combination of length and depth.

    Args:
        scorer: the decoder.
        encode: text to token ids.
        lengths: lengths of prompt and answer in tokens.
        depths: positions in [0, 1].
        trials: prompts per cell.
        seed: seed of keys and values; the same prompts for every model with this tokenizer.
        progress: called with the number of finished cells and their total.

    Raises:
        UserError: if a length exceeds the model's, or is too short for two pairs.
    """
    for length in lengths:
        if length > scorer.limit:
            raise UserError(
                f"{length} tokens exceed the model's {scorer.limit}", key="--lengths", remedy="lower it"
            )
    cells = []
    for length in lengths:
        for depth in depths:
            draw = random.Random(f"{seed} {length} {depth}")
            prompts = [make_prompt(encode, length, depth, draw) for _ in range(trials)]
            outcomes = [_answer(scorer, ids, answer) for ids, answer, _ in prompts]
            right = sum(is_right for is_right, _ in outcomes) / trials
            loss = sum(loss for _, loss in outcomes) / trials
            cells.append(RetrievalCell(length, depth, prompts[0][2], right, loss))
            progress(len(cells), len(lengths) * len(depths))
    return cells


def make_prompt(
    encode: Encode, length: int, depth: float, draw: random.Random
) -> tuple[list[int], list[int], int]:
    """Makes the longest prompt that fits; returns its token ids, the answer's, and the number of pairs.

    Raises:
        UserError: if two pairs do not fit.
    """
    pairs: list[tuple[str, str]] = []
    # All pairs have about as many tokens as the first: make enough, then remove the surplus.
    cost = max(1, len(encode(_pair(*_draw_pair(draw)))))
    pairs = [_draw_pair(draw) for _ in range(max(2, length // cost + 1))]
    while True:
        asked = round(depth * (len(pairs) - 1))
        ids, answer = encode(_prompt(pairs, asked)), encode(pairs[asked][1])
        if len(ids) + len(answer) <= length:
            return ids, answer, len(pairs)
        surplus = len(ids) + len(answer) - length
        pairs = pairs[: len(pairs) - max(1, surplus // (2 * cost))]
        if len(pairs) < 2:
            raise UserError(f"two pairs do not fit in {length} tokens", key="--lengths", remedy="raise it")


def _draw_pair(draw: random.Random) -> tuple[str, str]:
    return f"{draw.getrandbits(4 * HEX_DIGITS):08x}", f"{draw.getrandbits(4 * HEX_DIGITS):08x}"


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}",\n'


def _prompt(pairs: Sequence[tuple[str, str]], asked: int) -> str:
    body = "".join(_pair(*pair) for pair in pairs)
    return f'JSON data:\n{{{body}}}\nKey: "{pairs[asked][0]}"\nCorresponding value: "'


def _answer(scorer: Scorer, ids: list[int], answer: list[int]) -> tuple[bool, float]:
    """Returns whether greedy decoding would give the answer, and the answer's loss per token."""
    logits_SV = scorer.logits(torch.tensor([ids + answer]))[0, len(ids) - 1 : -1]
    wanted = torch.tensor(answer, device=logits_SV.device)
    loss = torch.nn.functional.cross_entropy(logits_SV, wanted)
    return bool((logits_SV.argmax(dim=-1) == wanted).all()), float(loss)
