"""The books of a batch: equal however it is split over ranks and microbatches, others for another batch."""

from pathlib import Path

import pytest
import torch

from data.digest import digest_sequences
from launch.ranks import run_ranks
from train.domain_books import DomainBooks, DomainEntry
from train.topology import Topology

# B sequences of a batch, S tokens per sequence.
B, S = 12, 16


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, 100, (B, S), generator=generator)
    targets[:, -1] = -100
    targets[3, 5:] = -100
    return {
        "input_ids": torch.randint(0, 100_000, (B, S), generator=generator),
        "targets": targets,
        "sample_positions": torch.arange(B) + 2**33,
        "domain_ids": torch.tensor([0, 1, 1, 2] * 3),
    }


def losses() -> torch.Tensor:
    return torch.rand(B, S, generator=torch.Generator().manual_seed(6))


def close(topology: Topology, whole: dict[str, torch.Tensor], microbatch: int) -> list[DomainEntry]:
    books, mine = DomainBooks(3, torch.device("cpu")), B // topology.world_size
    books.clear()
    for begin in range(topology.rank * mine, (topology.rank + 1) * mine, microbatch):
        part = slice(begin, begin + microbatch)
        books.add({key: value[part] for key, value in whole.items()}, losses()[part])
    return books.close()


def whole_batch(**changes: torch.Tensor) -> list[DomainEntry]:
    return close(Topology(), batch() | changes, B)


@pytest.mark.parametrize(("ranks", "microbatch"), [(1, 3), (2, 3), (4, 1)])
def test_ranks_and_microbatches_change_nothing(ranks: int, microbatch: int, tmp_path: Path) -> None:
    expected = whole_batch()
    for entries in run_ranks(ranks, lambda topology: close(topology, batch(), microbatch)):
        for entry, other in zip(entries, expected, strict=True):
            assert entry.loss_sum == pytest.approx(other.loss_sum, rel=1e-12)
            assert (entry.sequences, entry.targets, entry.position_sum, entry.digest) == (
                other.sequences,
                other.targets,
                other.position_sum,
                other.digest,
            )


def test_sums_are_those_of_the_batch() -> None:
    whole, entries = batch(), whole_batch()
    for domain, entry in enumerate(entries):
        mine = whole["domain_ids"] == domain
        assert entry.sequences == int(mine.sum())
        assert entry.targets == int((whole["targets"][mine] != -100).sum())
        assert entry.position_sum == int(whole["sample_positions"][mine].sum())
        assert entry.loss_sum == pytest.approx(float(losses()[mine].double().sum()), rel=1e-12)
        assert entry.digest == digest_sequences(
            whole["input_ids"][mine].numpy(), whole["sample_positions"][mine].numpy()
        )


def test_every_fault_of_a_batch_changes_a_digest() -> None:
    whole = batch()
    repeated, swapped, altered, reordered = (whole["input_ids"].clone() for _ in range(4))
    repeated[1] = repeated[2]
    swapped[[1, 2]] = swapped[[2, 1]]
    altered[4, 7] ^= 1
    reordered[0, [0, 1]] = reordered[0, [1, 0]]
    digests = [
        [entry.digest for entry in whole_batch(input_ids=ids)]
        for ids in (repeated, swapped, altered, reordered)
    ]
    digests += [[entry.digest for entry in whole_batch(sample_positions=whole["sample_positions"] + 1)]]
    digests += [[entry.digest for entry in whole_batch(domain_ids=torch.tensor([1, 0, 1, 2] * 3))]]
    expected = [entry.digest for entry in whole_batch()]
    assert [sum(a != b for a, b in zip(some, expected, strict=True)) for some in digests] == [
        1,
        1,
        1,
        1,
        3,
        2,
    ]
