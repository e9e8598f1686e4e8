import numpy as np
import pytest

from data.shards.packing import PADDING, pack

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
