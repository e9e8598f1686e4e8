"""Fill-in-the-middle: documents of packed sequences, cut in three and put in another order as they are read.

Bavarian et al. 2022, "Efficient training of language models to fill in the middle" (arXiv 2207.14255), at the
level of the context, with cuts between tokens. A document's tokens within a sequence become

- ``<prefix> P <suffix> S <middle> M`` (PSM), or
- ``<prefix> <suffix> S <middle> P M`` (SPM, the paper's second form),

and the token that ends it stays last. The three sentinels take the room of the three tokens before that one,
which are not read, so every document, sequence and border keeps its place, and only ids and targets change.

Whether and where a document is cut is a function of the seed and of the place of its first token in the run,
which depends neither on ranks, workers, microbatches nor the start. In another epoch it is cut elsewhere.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.order.permutation import mix
from data.shards.packing import PADDING, Sample
from data.tokenizer import TokenizerHandle, find_sentinels
from train.recipe.curriculum import Curriculum, Stage
from train.recipe.schema import Recipe

# P pieces of documents in a sequence, K samples of it, S tokens of a sample.

SHORTEST = 16
"""Documents of fewer tokens in a sequence are left as they are: three sentinels would be too much of them."""
PSM, SPM = "PSM", "SPM"
_DRAWS = np.arange(1, 5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Cut:
    """A document of a sequence that is rearranged."""

    begin: int
    """Place of its first token in the sequence."""
    end: int
    """Place after the last that moves; the token that ends the document stays."""
    order: str
    """:data:`PSM` or :data:`SPM`."""
    first: int
    """Tokens of the prefix."""
    second: int
    """Tokens of prefix and middle."""


class FillInMiddleTransform:
    """Rearranges documents of a run's sequences.

    Args:
        sentinels: ids of the tokens before prefix, suffix and middle.
        eos_id: the id that ends a document.
        seed: the run's.
        sample_tokens: S.
    """

    def __init__(
        self, sentinels: tuple[int, int, int], eos_id: int, *, seed: int, sample_tokens: int
    ) -> None:
        self._sentinels, self._eos_id, self._sample_tokens = sentinels, eos_id, sample_tokens
        digest = hashlib.blake2b(f"fill-in-the-middle {seed}".encode(), digest_size=8).digest()
        self._key = np.frombuffer(digest, "<u8")

    def rearrange(
        self,
        samples: Sequence[Sample],
        numbers: NDArray[np.int64],
        *,
        position: int,
        domain: str,
        stage: Stage,
    ) -> list[Sample]:
        """Returns the samples of a sequence with some of its documents rearranged.

        Args:
            samples: K samples that make up a sequence.
            numbers: their numbers in the domain's shards [K]; a document continues only in a neighbour.
            position: position of the first in the run.
            domain: their domain.
            stage: the stage of their batch, with the shares.
        """
        cuts = list(self.cuts(samples, numbers, position=position, domain=domain, stage=stage))
        if not cuts:
            return list(samples)
        tokens = np.concatenate([sample.tokens for sample in samples])
        before, between, after = (np.array([number], np.int32) for number in self._sentinels)
        for cut in cuts:
            text = tokens[cut.begin : cut.end - 3]
            prefix, middle, suffix = text[: cut.first], text[cut.first : cut.second], text[cut.second :]
            parts = (
                [before, prefix, between, suffix, after, middle]
                if cut.order == PSM
                else [before, between, suffix, after, prefix, middle]
            )
            tokens[cut.begin : cut.end] = np.concatenate(parts)
        parts = np.split(tokens, len(samples))
        return [replace(sample, tokens=part) for sample, part in zip(samples, parts, strict=True)]

    def cuts(
        self,
        samples: Sequence[Sample],
        numbers: NDArray[np.int64],
        *,
        position: int,
        domain: str,
        stage: Stage,
    ) -> Iterator[Cut]:
        """Yields the documents of a sequence that are rearranged; arguments as of :meth:`rearrange`.

        Documents of which only some tokens have a loss are left as they are, and so is all of their domain.
        """
        share = stage.fill_in_middle.get(domain, 0.0)
        if not share or any(sample.trained is not None for sample in samples):
            return
        begins, ends = _pieces(samples, numbers)
        tokens = np.concatenate([sample.tokens for sample in samples])
        moved = ends - (tokens[ends - 1] == self._eos_id)
        is_long = moved - begins >= SHORTEST
        begins, moved = begins[is_long], moved[is_long]
        draws_P4 = self._draw(position * self._sample_tokens + begins)
        for begin, end, draws in zip(begins.tolist(), moved.tolist(), draws_P4, strict=True):
            if draws[0] < share:
                places = end - begin - 3 + 1
                first, second = sorted(int(draw * places) for draw in draws[2:])
                yield Cut(begin, end, SPM if draws[1] < stage.spm else PSM, first, second)

    def _draw(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Draws four numbers in [0, 1) for each token of the run, [P] to [P, 4]."""
        noise = mix(mix(tokens.astype(np.uint64) + self._key)[:, None] + _DRAWS)
        return (noise >> np.uint64(11)).astype(np.float64) * 2.0**-53


def open_fill_in_middle(
    tokenizer: TokenizerHandle, recipe: Recipe, curriculum: Curriculum
) -> FillInMiddleTransform | None:
    """Returns what rearranges a run's documents; None if no phase asks for it.

    Raises:
        UserError: if the tokenizer lacks the three tokens.
    """
    if not any(stage.fill_in_middle for stage in curriculum.stages):
        return None
    return FillInMiddleTransform(
        find_sentinels(tokenizer, recipe.tokenizer),
        tokenizer.eos_id,
        seed=recipe.seed,
        sample_tokens=recipe.data.sequence_tokens,
    )


def _pieces(
    samples: Sequence[Sample], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns where the documents of a sequence begin and end, without padding, [P] each."""
    ends = np.cumsum(np.concatenate([sample.lengths for sample in samples]), dtype=np.int64)
    begins = np.append(0, ends[:-1])
    documents = np.concatenate([sample.documents for sample in samples])
    firsts = np.cumsum([sample.lengths.size for sample in samples])[:-1]
    # A document that continues in the neighbour is one.
    joins = firsts[(np.diff(numbers) == 1) & (documents[firsts] == documents[firsts - 1])]
    begins, ends = np.delete(begins, joins), np.delete(ends, joins - 1)
    is_text = np.delete(documents, joins) != PADDING
    return begins[is_text], ends[is_text]
