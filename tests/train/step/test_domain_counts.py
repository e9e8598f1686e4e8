"""A batch's domain counts do not depend on its split over microbatches, and differ for other batches."""

import dataclasses
from pathlib import Path

import pytest
import torch

from data.shards.digest import digest_sequences
from launch.verify.forked_ranks import run_ranks
from train.recipe.curriculum import plan_stages
from train.recipe.reading import load_recipe
from train.recipe.topology import Topology
from train.record.metrics import (
    DOMAIN_EPOCHS,
    DOMAIN_SAMPLES,
    DOMAIN_TARGETS,
    DOMAIN_TOKENS,
    LOSS_DOMAIN,
    of_domain,
)
from train.step.batch_sums import BatchTotals
from train.step.data_log import DataLog, Domain
from train.step.domain_counts import DomainCounts, DomainEntry, read_entries

# B sequences of a batch, S tokens per sequence.
B, S = 12, 16
ROOT = Path(__file__).resolve().parents[3]


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


def close(whole: dict[str, torch.Tensor], microbatch: int) -> list[DomainEntry]:
    books = DomainCounts(3, torch.device("cpu"))
    books.clear()
    for begin in range(0, B, microbatch):
        part = slice(begin, begin + microbatch)
        books.add({key: value[part] for key, value in whole.items()}, losses()[part])
    return read_entries(books.reduce())


def whole_batch(**changes: torch.Tensor) -> list[DomainEntry]:
    return close(batch() | changes, B)


@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatches_change_nothing(microbatch: int) -> None:
    for entry, other in zip(close(batch(), microbatch), whole_batch(), strict=True):
        assert entry.loss_sum == pytest.approx(other.loss_sum, rel=1e-12)
        assert dataclasses.replace(entry, loss_sum=0.0) == dataclasses.replace(other, loss_sum=0.0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_change_nothing(world_size: int) -> None:
    def work(topology: Topology) -> list[DomainEntry]:
        mine = slice(topology.rank, None, topology.world_size)
        books = DomainCounts(3, torch.device("cpu"))
        books.clear()
        books.add({key: value[mine] for key, value in batch().items()}, losses()[mine])
        return read_entries(books.reduce())

    for entries in run_ranks(world_size, work):
        for entry, other in zip(entries, whole_batch(), strict=True):
            assert entry.loss_sum == pytest.approx(other.loss_sum, rel=1e-12)
            assert dataclasses.replace(entry, loss_sum=0.0) == dataclasses.replace(other, loss_sum=0.0)


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


def test_a_batchs_figures_are_its_means_and_the_totals_so_far() -> None:
    smoke = load_recipe(ROOT / "yamls/smoke.yaml", [f"training.global_batch_sequences={B}"])
    names = ("code", "prose", "messages")
    log = DataLog(None, [Domain(name, 8) for name in names], S, {}, plan_stages(smoke), counts_targets=True)
    whole = batch() | {"sample_positions": torch.arange(B)}
    books = DomainCounts(3, torch.device("cpu"))
    books.clear()
    books.add(whole, losses())
    none = torch.zeros(())
    figures = log.record(1, BatchTotals(none, none, B * S, S, None, books.reduce()))
    for domain, name in enumerate(names):
        mine = whole["domain_ids"] == domain
        targets = int((whole["targets"][mine] != -100).sum())
        expected = {
            LOSS_DOMAIN: float(losses()[mine].double().sum()) / targets,
            DOMAIN_TOKENS: S * int(mine.sum()),
            DOMAIN_TARGETS: targets,
            DOMAIN_SAMPLES: int(mine.sum()),
            DOMAIN_EPOCHS: int(mine.sum()) / 8,
        }
        for key, value in expected.items():
            assert figures[of_domain(key, name)] == pytest.approx(value, rel=1e-12)


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
