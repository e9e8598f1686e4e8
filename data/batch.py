"""Batches of named tensors, built from samples in blocks that a worker sends to the trainer as one tensor."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.shards.packing import PADDING, Sample

# B sequences of a rank's batch, S tokens per sequence.

Batch = dict[str, Tensor]
Positions = NDArray[np.int64]

NO_TARGET = -100
"""Target of a position that has no loss."""
HEADER = 4
"""Words in a block's header: number of sequences, their length, sequences per batch, whether some tokens have
no loss."""


def make_batch(samples: list[Sample], positions: Positions, domains: Positions) -> Batch:
    """Builds a batch from samples.

    Args:
        samples: B samples of S tokens.
        positions: ``sample_positions`` [B].
        domains: ``domain_ids`` [B].
    """
    return open_block(make_block(samples, positions, domains))


def make_block(
    samples: list[Sample],
    positions: Positions,
    domains: Positions,
    *,
    follows: NDArray[np.bool_] | None = None,
    step: int = 1,
    batch: int = 0,
) -> Tensor:
    """Builds one or more batches as one int64 tensor, with a header of :data:`HEADER` words.

    Sending a tensor from a worker to the trainer takes longer than filling it, whatever its size, so batches
    are sent in blocks.

    Args:
        samples: N samples of S / step tokens, ``step`` consecutive ones for each of the B sequences.
        positions: ``sample_positions`` [B].
        domains: ``domain_ids`` [B].
        follows: [N], whether a sample directly follows the previous one of its sequence in the shard.
        step: samples per sequence.
        batch: sequences per batch; 0: all are one batch.
    """
    count, size = len(samples), samples[0].tokens.size
    shape = count // step, size * step
    is_masked = any(sample.trained is not None for sample in samples)
    block = np.empty(_Layout(*shape, is_masked).words, np.int64)
    block[:HEADER] = *shape, batch or shape[0], is_masked
    views = open_block(torch.from_numpy(block))
    input_ids_BS, targets_BS = views["input_ids"].numpy(), views["targets"].numpy()
    np.stack([sample.tokens for sample in samples], out=input_ids_BS.reshape(count, size), casting="safe")
    lengths = np.concatenate([sample.lengths for sample in samples])
    documents = np.concatenate([sample.documents for sample in samples])
    ends = np.cumsum([sample.lengths.size for sample in samples])
    firsts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    is_new = np.ones(lengths.size, np.int32)
    if follows is not None:
        # A document that continues in the next sample stays one document.
        continued = firsts[follows]
        is_new[continued[documents[continued] == documents[continued - 1]]] = 0
    places = np.cumsum(is_new, dtype=np.int32)
    places -= np.repeat(places[firsts[::step]], np.diff(np.append(firsts[::step], lengths.size)))
    views["document_ids"].numpy()[:] = np.repeat(places, lengths).reshape(shape)
    targets_BS[:, :-1] = input_ids_BS[:, 1:]
    last_of_sample = targets_BS.reshape(count, size)[:, -1]
    if follows is None or not follows.any():
        last_of_sample[:] = NO_TARGET
    else:
        last_of_sample[~np.append(follows[1:], False)] = NO_TARGET
    is_padding = documents == PADDING
    if is_padding.any():
        padded_BS = np.repeat(is_padding, lengths).reshape(shape)
        targets_BS[:, :-1][padded_BS[:, 1:]] = NO_TARGET
        targets_BS[padded_BS] = NO_TARGET  # Also before the next sample of a sequence.
    if is_masked:
        views["continues"].numpy()[:] = targets_BS != NO_TARGET
        trained_BS = np.stack([sample.is_trained() for sample in samples]).reshape(shape)
        targets_BS[:, :-1][~trained_BS[:, 1:]] = NO_TARGET
    views["sample_positions"].numpy()[:] = positions
    views["domain_ids"].numpy()[:] = domains
    return torch.from_numpy(block)


def batch_of_block(block: Tensor) -> int:
    """Sequences per batch of a block."""
    return int(block[2])


def open_block(block: Tensor) -> Batch:
    """Returns a batch of tensors as views of a block from :func:`make_block`."""
    sequences, length, _, is_masked = block[:HEADER].tolist()
    layout = _Layout(sequences, length, bool(is_masked))
    rows = block[HEADER : layout.token_end].view(-1, length)
    documents = block[layout.token_end : layout.document_end].view(torch.int32)
    views = {
        "input_ids": rows[:sequences],
        "document_ids": documents[: sequences * length].view(sequences, length),
        "targets": rows[sequences:],
        "sample_positions": block[layout.document_end : layout.document_end + sequences],
        "domain_ids": block[layout.document_end + sequences : layout.id_end],
    }
    if is_masked:
        flags = block[layout.id_end :].view(torch.bool)
        views["continues"] = flags[: sequences * length].view(sequences, length)
    return views


class _Layout:
    """Offsets of a batch's tensors in its block, in words of 8 bytes."""

    def __init__(self, sequences: int, length: int, is_masked: bool) -> None:
        self.token_end = HEADER + 2 * sequences * length
        self.document_end = self.token_end + math.ceil(sequences * length / 2)
        self.id_end = self.document_end + 2 * sequences
        self.words = self.id_end + (math.ceil(sequences * length / 8) if is_masked else 0)
