"""The digest of the data that a step was trained on, summed over ranks: equal under every layout.

Each sequence is hashed to 64 bits from its tokens, their order and its position in training. A step's digest
is the sum of these modulo 2^64, so it does not matter which rank, microbatch or worker had which sequence. A
sequence that is missing, duplicated, altered or at another position changes it, except by chance in one of
2^64 cases; so does a loss on other tokens than the mask says. It detects errors; it has no secret and is no
protection against forgery.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# B sequences, S tokens per sequence.

_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_STEP = 0x9E3779B97F4A7C15
HALF = 1 << 32
MASK = (1 << 64) - 1


def digest_sequences(tokens_BS: NDArray[np.integer], positions_B: NDArray[np.int64]) -> int:
    """Computes the digest of sequences, in 0..2^64-1.

    Args:
        tokens_BS: token ids.
        positions_B: each sequence's position in training.
    """
    hashes = hash_sequences(torch.from_numpy(tokens_BS.astype(np.int64)), torch.from_numpy(positions_B))
    return sum(int(value) & MASK for value in hashes.tolist()) & MASK


def hash_sequences(tokens_BS: Tensor, positions_B: Tensor) -> Tensor:
    """Hashes each sequence, int64 [B] with the bits of the unsigned hash.

    A sum of the tokens, each multiplied by a factor that depends on its place (a multilinear hash; Lemire and
    Kaser 2014, section 3), mixed with the position by SplitMix64's output function. Runs on any device
    without synchronising with the host.
    """
    factors_S = _place_factors(tokens_BS.shape[1], tokens_BS.device)
    content_B = ((tokens_BS + 1) * factors_S).sum(dim=1)
    return _mix(content_B + _mix(positions_B * _signed(_STEP)))


def with_mask(tokens_BS: Tensor, unwanted_BS: Tensor) -> Tensor:
    """Returns tokens to hash that tell where a next token is no target, int64; those given if all are.

    Args:
        tokens_BS: token ids.
        unwanted_BS: places whose next token is known and has no loss.
    """
    return tokens_BS + HALF * unwanted_BS


def halves(hashes_B: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits in float64, which sums up to two million of each exactly, on any backend."""
    return ((hashes_B >> 32) & (HALF - 1)).double(), (hashes_B & (HALF - 1)).double()


def join(upper: float, lower: float) -> int:
    """Computes the digest from the sums of both halves."""
    return (int(upper) * HALF + int(lower)) & MASK


@functools.lru_cache(maxsize=8)
def _place_factors(length: int, device: torch.device) -> Tensor:
    places = torch.arange(1, length + 1, dtype=torch.int64, device=device)
    return _mix(places * _signed(_STEP)) | 1


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood 2014, figure 17) on int64, which wraps around."""
    values = (values ^ _shift(values, 30)) * _signed(_MULTIPLIERS[0])
    values = (values ^ _shift(values, 27)) * _signed(_MULTIPLIERS[1])
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros; int64's own shift repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
