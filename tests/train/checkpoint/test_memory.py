"""Copies in hosts' memory: a run resumed from them is the uninterrupted one, whatever of them is lost."""

import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.verify.cases import Layout
from launch.verify.equality import differences
from launch.verify.forked_ranks import Ranks, run_ranks
from launch.verify.tiny_runs import (
    PATIENCE_SECONDS,
    await_moment,
    named,
    prepare,
    steps,
    tail,
    trainer,
    uninterrupted,
)
from tests.train.checkpoint.test_replicas import OPTIMIZERS, built, held, step
from train.checkpoint.files import Progress, agree
from train.checkpoint.memory_reader import find_copy
from train.checkpoint.memory_writer import MemoryWriter, shift_of
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Checkpoint, Optimizer, Parallelism, Recipe
from train.recipe.topology import Topology
from train.record.host_memory import (
    MEMORY,
    TOKEN_FILE,
    copies_in,
    copy_name,
    forget,
    memory_folder,
    newest_batch,
    take_token,
)
from train.record.process import HOST_VARIABLE

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"
PAIR = Layout(1, 2, 1)

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run, which leaves nothing in memory."""
    folder = tmp_path / "r"
    folder.mkdir()
    yield folder
    forget(folder)


def train_on(recipe: Recipe, names: str, until: int | None) -> str:
    """Trains with each rank on a host of its own name, until a batch or the end; returns what was printed."""
    folder, train = Path(recipe.runs_dir) / recipe.name, trainer(recipe)
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)

    def work(topology: Topology) -> None:
        # In place of pytest's, which write elsewhere.
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        os.environ[HOST_VARIABLE] = names[topology.rank]
        train(topology)

    with Ranks(2, work, log) as ranks:
        if until is not None:
            assert await_moment(ranks, lambda: steps(folder) >= until), tail(folder)
        else:
            assert ranks.exit_codes(PATIENCE_SECONDS) == [0, 0], tail(folder)
    return log.read_text()


def newest_whole(memory: Path, hosts: str) -> int:
    """The newest batch of which all hosts have both copies; newer ones, cut short by a kill, are removed."""
    files = [(batch, file) for host in hosts for (_, batch), file in copies_in(memory / host).items()]
    batches = [batch for batch, _ in files]
    newest = max(batch for batch in batches if batches.count(batch) == 2 * len(hosts))
    for batch, file in files:
        if batch > newest:
            file.unlink()
    return newest


def damage(file: Path, place: int = -40) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_run_killed_again_and_again_is_the_uninterrupted_one(run: Path) -> None:
    small = prepare(load_recipe(SMOKE), run.parent)
    whole = uninterrupted(small, PAIR)
    saves = Checkpoint(interval_batches=6, memory_interval_batches=1)
    recipe = replace(named(small, PAIR, run.name), checkpoint=saves)
    shutil.rmtree(run)
    train_on(recipe, "ab", until=9)
    memory = memory_folder(run, (run / TOKEN_FILE).read_text()).parent
    assert {rank for rank, _ in copies_in(memory / "a")} == {0, 1}, "its own state, and its neighbour's"

    # Host b is gone with its memory: rank 1 begins on another, and host a sends it what it has of it.
    shutil.rmtree(memory / "b")
    newest = newest_whole(memory, "a")
    assert newest > 6
    said = train_on(recipe, "ac", until=14)
    assert f"resumed from the copy in memory of batch {newest} (rank 1's from a), " in said

    # Of the newest copies none is sound, each in another way: those before them are used, or the checkpoint.
    newest = newest_whole(memory, "ac")
    for host, rank in (("a", 1), ("c", 0)):
        damage(memory / host / copy_name(rank, newest))
    for host, rank in (("a", 0), ("c", 1)):
        file = memory / host / copy_name(rank, newest)
        os.truncate(file, file.stat().st_size // 2)
    said = train_on(recipe, "ac", until=None)
    assert said.count("another copy is used instead") == 4
    older = (f"the copy in memory of batch {newest - 1}, ", "/checkpoints/batch-00000012, ")
    assert any(each in said for each in older)
    assert list(differences(whole, run)) == []
    assert not list(MEMORY.glob(f"{memory.name}*")), "a run that has ended leaves nothing in memory"


def copied(writer: MemoryWriter, decoder: Any, optimizer: Any, batch: int) -> list[bool]:
    """Makes a copy and waits for it; returns the flags of this rank."""
    writer.start(decoder, optimizer, Progress(batch, 8 * batch, 64 * batch, 1.0))
    while writer.flags()[0]:
        time.sleep(0.001)
    return writer.flags()


@pytest.mark.parametrize("own", OPTIMIZERS, ids=lambda own: f"{own.kind.value}-{own.moments.value}")
@pytest.mark.parametrize("layout", [Parallelism(replicate=2, expert=2), Parallelism(pipeline=2, expert=2)])
def test_every_rank_gets_back_what_it_had(own: Optimizer, layout: Parallelism, run: Path) -> None:
    token, hosts = take_token(run), ["a", "a", "b", "b"]

    def work(topology: Topology) -> tuple[bool, dict[int, str]]:
        os.environ[HOST_VARIABLE] = hosts[topology.rank]
        decoder, optimizer = built(layout, topology, seed=1, own=own)
        step(decoder, optimizer)
        before = held(decoder, optimizer)
        writer = MemoryWriter(memory_folder(run, token), topology, "l", "m", hosts)
        torch.manual_seed(topology.rank)
        random.seed(topology.rank)
        assert copied(writer, decoder, optimizer, 1) == [False, False]
        drawn = torch.rand(3).tolist(), random.random()
        step(decoder, optimizer)
        agree(None, topology)
        if topology.rank == 1:
            # Ranks 0 and 1 are on host b now, which has a damaged copy of rank 1 and none of rank 0.
            damage(memory_folder(run, token).parent / "b" / copy_name(1, 1))
            (memory_folder(run, token).parent / "b" / copy_name(0, 1)).unlink()
        agree(None, topology)
        os.environ[HOST_VARIABLE] = hosts[topology.rank - 2]
        other, of_other = built(layout, topology, seed=2, own=own)
        copy, complaints = find_copy(run, "l", topology, at_least=1)
        assert copy is not None, complaints
        (complaint,) = complaints
        assert complaint.endswith("is not what was written (SHA-256 differs); another copy is used instead")
        copy.load(other, of_other, topology)
        copy.restore_random_states()
        assert (torch.rand(3).tolist(), random.random()) == drawn
        assert find_copy(run, "another layout", topology, at_least=1) == (None, [])
        assert find_copy(run, "l", topology, at_least=2) == (None, [])
        assert find_copy(run, "l", topology, 1, lambda _: "refused") == (None, ["refused"])
        return held(other, of_other) == before, copy.sent

    assert run_ranks(4, work) == [(True, {0: "a", 1: "a"})] * 4


def test_weights_that_are_trained_otherwise_now_are_refused(run: Path) -> None:
    token, layout = take_token(run), Parallelism()

    def work(topology: Topology) -> str:
        decoder, optimizer = built(layout, topology, seed=1)
        step(decoder, optimizer)
        copied(MemoryWriter(memory_folder(run, token), topology, "l", "m", ["a", "a"]), decoder, optimizer, 1)
        optimizer.param_groups[0]["weight_decay"] = 0.25 * topology.rank
        copy, _ = find_copy(run, "l", topology, at_least=1)
        assert copy is not None
        with pytest.raises(UserError) as caught:
            copy.load(decoder, optimizer, topology)
        return str(caught.value)

    first, second = run_ranks(2, work)
    assert first == second and "weight_decay of " in first and first.startswith("checkpoint.memory_interval")


def test_parts_of_two_starts_are_never_taken_for_one(run: Path) -> None:
    token, hosts = take_token(run), ["a", "b"]

    def work(topology: Topology) -> bool:
        os.environ[HOST_VARIABLE] = hosts[topology.rank]
        decoder, optimizer = built(Parallelism(), topology, seed=1)
        step(decoder, optimizer)
        folder = memory_folder(run, token)
        copied(MemoryWriter(folder, topology, "l", "first", hosts), decoder, optimizer, 1)
        agree(None, topology)
        copied(MemoryWriter(folder, topology, "l", "second", hosts), decoder, optimizer, 1)
        agree(None, topology)
        (folder / copy_name(1 - topology.rank, 1)).unlink()
        found = find_copy(run, "l", topology, at_least=1)[0] is not None
        if topology.is_main:
            copied(MemoryWriter(folder, topology, "l", "third", ["a", "a"]), decoder, optimizer, 1)
        return found and find_copy(run, "l", topology, at_least=1)[0] is None

    assert run_ranks(2, work) == [True, True]


def test_copies_are_kept_until_all_have_the_next(run: Path) -> None:
    token, hosts = take_token(run), ["a", "b"]

    def work(topology: Topology) -> list[list[int]]:
        os.environ[HOST_VARIABLE] = hosts[topology.rank]
        folder = memory_folder(run, token)
        decoder, optimizer = built(Parallelism(), topology, seed=1)
        step(decoder, optimizer)
        writer = MemoryWriter(folder, topology, "l", "m", hosts)
        seen = []
        for batch in (1, 2, 3):
            copied(writer, decoder, optimizer, batch)
            seen.append(sorted({batch for _, batch in copies_in(folder)}))
        agree(None, topology)
        writer.drop_after(2)
        seen.append(sorted({batch for _, batch in copies_in(folder)}))
        writer.finish()
        return [*seen, [int(folder.exists())]]

    assert run_ranks(2, work) == [[[1], [1, 2], [2, 3], [2], [0]]] * 2


def test_a_rank_without_room_lets_its_neighbour_finish_and_says_why(run: Path) -> None:
    take_token(run)
    (run / "file").touch()

    def work(topology: Topology) -> tuple[list[bool], str]:
        decoder, optimizer = built(Parallelism(), topology, seed=1)
        folder = run / ("folder", "file")[topology.rank] / "copies"
        writer = MemoryWriter(folder, topology, "l", "m", ["a", "b"])
        return copied(writer, decoder, optimizer, 1), writer.error

    (sound, _), (failed, error) = run_ranks(2, work)
    assert sound == [False, False] and failed == [False, True] and error.startswith("NotADirectoryError: ")
    assert len(copies_in(run / "folder" / "copies")) == 2


def test_a_run_that_begins_again_does_not_find_the_copies_of_another(run: Path) -> None:
    folder = memory_folder(run, take_token(run))
    folder.mkdir(parents=True)
    (folder / copy_name(0, 7)).touch()
    assert newest_batch(run) == 7 and memory_folder(run, take_token(run)) == folder
    (run / TOKEN_FILE).unlink()
    assert memory_folder(run, take_token(run)) != folder and newest_batch(run) == 0


@pytest.mark.parametrize(
    ("hosts", "shift"),
    [("a", 0), ("aaa", 0), ("ab", 1), ("aabb", 2), ("aabbcc", 2), ("aaab", 0), ("abab", 1)],
)
def test_a_neighbour_is_on_another_host(hosts: str, shift: int) -> None:
    assert shift_of(hosts) == shift
