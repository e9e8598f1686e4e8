import itertools

import numpy as np
import pytest

from data.shards.packing import PADDING, pack, pack_whole

EOS, PAD = 1000, 1001


def packed(lengths: list[int], sequence_tokens: int) -> tuple[list[np.ndarray], list]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 999, length).astype(np.int32) for length in lengths]
    return documents, list(
        pack(enumerate(documents), sequence_tokens=sequence_tokens, eos_id=EOS, pad_id=PAD)
    )


@pytest.mark.parametrize(
    ("lengths", "sequence_tokens"),
    [([5, 1, 0, 30, 7], 8), ([7], 8), ([7, 7], 8), ([100], 8), ([3], 8), ([0], 8), ([1] * 40, 8), ([], 8)],
)
def test_nothing_is_dropped_and_boundaries_are_kept(lengths: list[int], sequence_tokens: int):
    documents, samples = packed(lengths, sequence_tokens)
    for sample in samples:
        assert sample.tokens.shape == (sequence_tokens,) and sample.lengths.sum() == sequence_tokens
        assert (sample.lengths > 0).all()
    tokens = np.concatenate([sample.tokens for sample in samples]) if samples else np.array([])
    owners = [np.repeat(sample.documents, sample.lengths) for sample in samples]
    owner = np.concatenate(owners) if owners else np.array([])
    for ordinal, ids in enumerate(documents):
        assert tokens[owner == ordinal].tolist() == [*ids.tolist(), EOS]
    filling = tokens[owner == PADDING]
    assert (filling == PAD).all() and filling.size < sequence_tokens
    assert tokens.size == sum(lengths) + len(lengths) + filling.size


def test_only_the_end_is_filled():
    _, samples = packed([9] * 20, 16)
    assert all(PADDING not in sample.documents for sample in samples[:-1])
    assert samples[-1].documents[-1] == PADDING and samples[-1].lengths[-1] == 8
    # 20 documents of 10 tokens are 12.5 sequences.
    assert len(samples) == 13


@pytest.mark.parametrize("seed", range(12))
def test_best_fit_cuts_nothing_that_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(4, 40))
    lengths = [*np.minimum(rng.geometric(1 / size, 150), 5 * size).tolist(), size, 2 * size, 2 * size + 1]
    numbers = np.sort(rng.choice(1000, len(lengths), replace=False)).tolist()
    documents = {
        n: rng.integers(0, 999, length).astype(np.int32) for n, length in zip(numbers, lengths, strict=True)
    }
    samples = pack_whole(documents.items(), sequence_tokens=size, pad_id=PAD)
    stream: list[tuple[int, np.ndarray, int]] = []
    for number, sample in enumerate(samples):
        parts = np.split(sample.tokens, np.cumsum(sample.lengths)[:-1])
        assert sample.lengths.sum() == sample.tokens.size == size and (sample.lengths > 0).all()
        for ordinal, part in zip(sample.documents.tolist(), parts, strict=True):
            if ordinal == PADDING:
                assert part is parts[-1] and (part == PAD).all()
            else:
                stream.append((ordinal, part, number))
    found = {n: [(part, at) for ordinal, part, at in stream if ordinal == n] for n in documents}
    for n, ids in documents.items():
        assert np.concatenate([part for part, _ in found[n]]).tolist() == ids.tolist()
        assert len(found[n]) == -(-ids.size // size)
        # Parts that fill sequences are neighbours; what is left comes later.
        places = [at for _, at in found[n]]
        assert places[:-1] == list(range(places[0], places[0] + len(places) - 1)) and places == sorted(places)
    begins = [int(sample.documents[0]) for sample in samples]
    assert begins == sorted(begins)
    for before, after in itertools.pairwise(samples):
        if before.documents[-1] == after.documents[0]:  # Read as one document that continues.
            assert before.documents.size == 1
    sizes = [min(size, ids.size - at) for ids in documents.values() for at in range(0, ids.size, size)]
    assert len(samples) == best_fit_decreasing(sizes, size)


def best_fit_decreasing(sizes: list[int], room: int) -> int:
    """The number of sequences that the plain form fills: it looks at every one for every piece."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        left = min((it for it in rooms if it >= size), default=room)
        if left in rooms:
            rooms.remove(left)
        rooms.append(left - size)
    return len(rooms)
