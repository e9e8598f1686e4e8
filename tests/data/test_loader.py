import dataclasses
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import NO_TARGET, Batch, make_batch, make_block, open_block
from data.loader import NO_POSITION, build_train_loader, build_validation_loaders, validation_entropy
from data.opened import OpenedData
from data.shards.manifest import unigram_entropy
from data.shards.packing import PADDING, Sample, pack, pack_whole
from data.shards.streams import ShardFolder
from train.recipe.curriculum import Skip, continue_stages, plan_stages
from train.recipe.errors import UserError
from train.recipe.schema import Recipe
from train.start.readiness import check_readiness

pytestmark = pytest.mark.slow

BATCHES = 100


@pytest.fixture(scope="module")
def whole(built: Recipe) -> list[Batch]:
    """The first batches of a single rank."""
    return read(built, BATCHES)


def read(recipe: Recipe, batches: int, **place: Any) -> list[Batch]:
    place = {"rank": 0, "world_size": 1} | place
    return list(islice(build_train_loader(OpenedData(recipe), **place), batches))


def with_workers(recipe: Recipe, workers: int, batch: int = 8) -> Recipe:
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, workers=workers),
        training=dataclasses.replace(recipe.training, global_batch_sequences=batch),
    )


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def joined(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_a_batch_is_what_the_plan_says(built: Recipe, whole: list[Batch]):
    root = Path(built.data.shards)
    plan = OpenedData(built).plan(plan_stages(built))
    everything = joined(whole)
    picks = plan.samples(0, 8 * BATCHES)
    assert everything["sample_positions"].tolist() == list(range(8 * BATCHES))
    assert everything["domain_ids"].tolist() == picks.domain.tolist()
    folders = [ShardFolder(root / domain / "train") for domain in plan.domains]
    for row, (domain, sample) in enumerate(zip(picks.domain, picks.sample, strict=True)):
        assert everything["input_ids"][row].tolist() == folders[domain][sample].tokens.tolist()
    # Small domains are repeated within this many batches.
    assert picks.epoch.max() > 0
    shares = np.bincount(picks.domain) / picks.domain.size
    assert dict(zip(plan.domains, shares, strict=True)) == pytest.approx(
        {"code": 0.7, "prose": 0.3}, abs=0.01
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(built: Recipe, whole: list[Batch], workers: int):
    assert_equal(read(with_workers(built, workers), 39), whole[:39])


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0), (2, 2)])
def test_ranks_share_the_same_global_batches(
    built: Recipe, whole: list[Batch], world_size: int, workers: int
):
    recipe = with_workers(built, workers)
    ranks = [read(recipe, 20, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_equal([joined(list(parts)) for parts in zip(*ranks, strict=True)], whole[:20])


@pytest.mark.parametrize("seed", range(5))
def test_resuming_anywhere_goes_on_as_if_nothing_had_happened(built: Recipe, whole: list[Batch], seed: int):
    rng = np.random.default_rng(seed)
    start = 8 * int(rng.integers(1, 30))
    world_size, workers, batch = (
        int(rng.choice([1, 2, 4])),
        int(rng.choice([0, 1, 2])),
        int(rng.choice([4, 8, 16])),
    )
    recipe = with_workers(built, workers, batch)
    ranks = [
        read(
            recipe,
            3,
            rank=rank,
            world_size=world_size,
            start_sample=start,
            curriculum=continue_stages(plan_stages(built), recipe, start),
        )
        for rank in range(world_size)
    ]
    resumed = joined([joined(list(parts)) for parts in zip(*ranks, strict=True)])
    everything = joined(whole)
    expected = {key: value[start : start + 3 * batch] for key, value in everything.items()}
    assert_equal([resumed], [expected])


def test_iterating_draws_nothing_from_the_global_generator(built: Recipe):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(with_workers(built, 1), 2)
    for loader in build_validation_loaders(OpenedData(built), rank=0, world_size=1).values():
        list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_targets_and_documents():
    documents = [(4, np.array([1, 2, 3])), (9, np.array([5])), (6, np.array([7, 8]))]
    samples = list(
        pack(((n, ids.astype(np.int32)) for n, ids in documents), sequence_tokens=5, eos_id=90, pad_id=91)
    )
    batch = make_batch(samples, np.array([30, 31]), np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 90, 5], [90, 7, 8, 90, 91]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 2]]
    assert batch["targets"].tolist() == [[2, 3, 90, 5, NO_TARGET], [7, 8, 90, NO_TARGET, NO_TARGET]]
    assert batch["sample_positions"].tolist() == [30, 31] and batch["domain_ids"].tolist() == [0, 1]
    types = {key: value.dtype for key, value in batch.items()}
    assert types.pop("document_ids") == torch.int32 and set(types.values()) == {torch.int64}


def test_a_sequence_of_padding_has_no_target():
    padding = Sample(np.full(4, 9, np.int32), np.array([4], np.int32), np.array([PADDING]))
    assert (make_batch([padding], np.array([-1]), np.array([0]))["targets"] == NO_TARGET).all()


@pytest.mark.parametrize("seed", range(4))
def test_documents_packed_whole_are_learnt_whole_and_padding_never(seed: int):
    rng = np.random.default_rng(seed)
    texts = {n: rng.integers(0, 50, rng.integers(7, 30)).astype(np.int32) for n in range(40)}
    samples = pack_whole(texts.items(), sequence_tokens=12, pad_id=91)
    samples = samples[: len(samples) // 2 * 2]
    follows = np.arange(len(samples)) % 2 == 1
    rows = np.arange(len(samples) // 2)
    batch = open_block(make_block(samples, rows, rows, follows=follows, step=2))
    owner_BS = np.stack([np.repeat(it.documents, it.lengths) for it in samples]).reshape(-1, 24)
    assert (owner_BS == PADDING).any()
    for ids, targets, documents, owners in zip(
        *(batch[key].numpy() for key in ("input_ids", "targets", "document_ids")), owner_BS, strict=True
    ):
        wanted = np.append(ids[1:], NO_TARGET)
        wanted[(owners == PADDING) | (np.append(owners[1:], PADDING) == PADDING)] = NO_TARGET
        assert targets.tolist() == wanted.tolist()
        # One number per document, also across the border between samples; padding has its own.
        borders = np.flatnonzero(np.diff(owners)) + 1
        assert (np.flatnonzero(np.diff(documents)) + 1).tolist() == borders.tolist()
        for part, owner in zip(np.split(ids, borders), owners[[0, *borders]], strict=True):
            assert owner == PADDING or part.tobytes() in texts[owner].astype(np.int64).tobytes()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_the_same_sequences_on_any_number_of_ranks(built: Recipe, world_size: int):
    ranks = [
        build_validation_loaders(OpenedData(built), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(list(loaders) == ["code", "prose"] for loaders in ranks)
    for index, domain in enumerate(("code", "prose")):
        per_rank = [list(loaders[domain]) for loaders in ranks]
        assert all(len(batches) == len(ranks[0][domain]) for batches in per_rank)
        assert max(len(batch["input_ids"]) for batches in per_rank for batch in batches) <= 2
        everything = joined([batch for batches in per_rank for batch in batches])
        real = everything["sample_positions"] != NO_POSITION
        assert everything["sample_positions"][real].tolist() == list(range(5))
        assert (everything["targets"][~real] == NO_TARGET).all()
        assert set(everything["domain_ids"].tolist()) == {index}
        folder = ShardFolder(Path(built.data.shards) / domain / "validation")
        chosen = [n * len(folder) // 5 for n in range(5)]
        assert everything["input_ids"][real].tolist() == [folder[n].tokens.tolist() for n in chosen]
        targets = everything["targets"][everything["targets"] != NO_TARGET].numpy()
        assert validation_entropy(OpenedData(built))[domain] == pytest.approx(unigram_entropy(targets))


def test_too_few_validation_sequences_are_refused_before_and_after_the_start(
    built: Recipe, make_recipe: Callable[..., Recipe], tmp_path: Path
):
    recipe = make_recipe(Path(built.data.shards), validation_sequences=10_000)
    refused = r"data.validation_sequences: is 10000, but .* has \d+ of code"
    with pytest.raises(UserError, match=refused):
        build_validation_loaders(OpenedData(recipe), rank=0, world_size=1)
    with pytest.raises(UserError, match=r"r\.yaml: " + refused):
        check_readiness(dataclasses.replace(recipe, runs_dir=str(tmp_path)), "r.yaml")


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_blocks_open_to_views_of_every_shape(sequences: int):
    rng = np.random.default_rng(0)
    # An odd number of int32 does not end at a word boundary.
    samples = [
        Sample(rng.integers(0, 99, 7).astype(np.int32), np.array([3, 4], np.int32), np.array([n, n + 1]))
        for n in range(sequences)
    ]
    block = make_block(samples, np.arange(sequences) + 50, np.arange(sequences))
    batch = open_block(block)
    assert {tensor.untyped_storage().data_ptr() for tensor in batch.values()} == {
        block.untyped_storage().data_ptr()
    }
    assert batch["input_ids"].tolist() == [sample.tokens.tolist() for sample in samples]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1]] * sequences
    assert batch["sample_positions"].tolist() == list(range(50, 50 + sequences))
    assert batch["domain_ids"].tolist() == list(range(sequences))


def test_a_worker_survives_the_schedulers_sigterm_and_ends_with_the_loader(built: Recipe, whole: list[Batch]):
    loader = build_train_loader(OpenedData(with_workers(built, 1)), rank=0, world_size=1)
    batches = iter(loader)
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    # More than was prefetched.
    assert_equal([first, *islice(batches, 59)], whole[:60])
    assert worker.is_alive()
    del batches, loader
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize(("workers", "rank", "ranks"), [(0, 0, 1), (2, 1, 2)])
def test_skipped_batches_leave_the_others_as_they_were(
    built: Recipe, workers: int, rank: int, ranks: int
) -> None:
    recipe = dataclasses.replace(built, data=dataclasses.replace(built.data, workers=workers))
    opened = OpenedData(recipe)
    whole, place = plan_stages(recipe), {"rank": rank, "world_size": ranks}
    every = list(islice(build_train_loader(opened, whole, **place), 40))
    less = dataclasses.replace(
        whole, skips=(Skip(43, 50, "b"), Skip(16, 24, "a"), Skip(56, 57, "c"), Skip(250, 251, "d"))
    )
    left = [batch for number, batch in enumerate(every) if number not in (2, 5, 6, 7, 31)]
    assert len(left) == 35
    for start, first in ((0, 0), (24, 2), (40, 4), (48, 4)):
        # Resumed at the beginning of the third batch, and of an excluded batch.
        found = list(islice(build_train_loader(opened, less, start_sample=start, **place), 35 - first))
        for batch, expected in zip(found, left[first:], strict=True):
            assert all(torch.equal(batch[key], expected[key]) for key in expected), start
