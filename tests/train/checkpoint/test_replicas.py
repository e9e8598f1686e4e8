"""Of the ranks that hold the same shard one reads it, and a plan that stays the same is sent once."""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from launch.verify.forked_ranks import run_ranks
from tests.fake_world import CFG, whole
from train.checkpoint.files import CheckpointError, Progress, check_checkpoint, writing_ranks
from train.checkpoint.loading import load_checkpoint
from train.checkpoint.reading import CheckpointReader
from train.checkpoint.saver import CheckpointSaver
from train.hf.initial_weights import restore_optimizer
from train.layout.mesh import build_mesh, build_sharded, replicas_of
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.recipe.errors import UserError
from train.recipe.schema import Moments, Optimizer, OptimizerKind, Parallelism, Precision
from train.recipe.sizes import place_of, stage_parts
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

ADAMW = Optimizer(learning_rate=0.01)
OPTIMIZERS = [
    *(Optimizer(kind=kind, learning_rate=0.01) for kind in OptimizerKind),
    Optimizer(learning_rate=0.01, moments=Moments.bf16, average_decay=0.5),
]
LAYOUTS = [Parallelism(replicate=2), Parallelism(replicate=2, expert=2), Parallelism(replicate=4)]


def built(
    layout: Parallelism, topology: Topology, seed: int, own: Optimizer = ADAMW
) -> tuple[Decoder, torch.optim.Optimizer]:
    _, stage, _ = place_of(layout, topology.world_size, topology.rank)
    model = replace(CFG, n_layers=layout.pipeline)
    decoder = Decoder(model, device="meta", parts=stage_parts(model, layout, stage))
    build_sharded(decoder, build_mesh(layout, topology.world_size, "cpu"), Precision.fp32, seed)
    return decoder, build_optimizer(decoder, own)


def step(decoder: Decoder, optimizer: torch.optim.Optimizer) -> float:
    ids_BS = torch.arange(16).view(2, 8)
    if decoder.pipeline is None:
        loss = decoder(ids_BS, None, ids_BS).loss_sum
        loss.backward()
    else:  # whose stages need each other
        loss = torch.zeros(())
        for parameter in decoder.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def held(decoder: Decoder, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that this rank holds."""
    found: list[Any] = []

    def collect(tree: Any) -> None:
        if isinstance(tree, dict | list):
            for item in tree.values() if isinstance(tree, dict) else tree:
                collect(item)
        elif isinstance(tree, Tensor):
            local = tree.to_local() if isinstance(tree, DTensor) else tree
            found.append(local.detach().tolist())
        else:
            found.append(tree)

    for part in get_state_dict(decoder, optimizer):
        collect(part)
    return found


@contextmanager
def _opened(folder: Path) -> Iterator[list[str]]:
    """Notes the files of a checkpoint that this process opens."""
    names: list[str] = []
    is_on = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on and event == "open" and str(arguments[0]).startswith(str(folder / "state")):
            names.append(Path(str(arguments[0])).name)

    sys.addaudithook(hook)  # for good: the rank is a process of its own
    yield names
    is_on = False


def _saved(root: Path, layout: Parallelism, topology: Topology, own: Optimizer) -> tuple[Any, ...]:
    """Saves after a step, and returns what the rank held and the loss of its next step."""
    decoder, optimizer = built(layout, topology, 1, own)
    step(decoder, optimizer)
    saver = CheckpointSaver(root, topology, 1, replicas_of(decoder))
    saver.start(decoder, optimizer, Progress(1, 8, 80, 1.5))
    saved = saver.wait()
    assert (saved is not None) == saver.is_writer and (saved is None or not saved.error)
    return held(decoder, optimizer), step(decoder, optimizer)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("own", OPTIMIZERS, ids=lambda own: f"{own.kind.value}-{own.moments.value}")
def test_a_shard_is_read_once_and_held_by_all_that_held_it(
    layout: Parallelism, own: Optimizer, tmp_path: Path
) -> None:
    folder = tmp_path / "batch-00000001"

    def save_and_load(topology: Topology) -> tuple[Any, ...]:
        before = _saved(tmp_path, layout, topology, own)
        dist.barrier()
        decoder, optimizer = built(layout, topology, 2, own)
        with _opened(folder) as hashed:
            check_checkpoint(folder, topology=topology)
        with _opened(folder) as names:
            load_checkpoint(folder, decoder, optimizer, topology, replicas_of(decoder))
        # It has compared the digest of what it loads; of other shards it loads only what is replicated.
        assert set(hashed) - {".metadata"} <= set(names)
        return before, (held(decoder, optimizer), step(decoder, optimizer)), names

    found = run_ranks(4, save_and_load)
    check_checkpoint(folder)
    for before, after, _ in found:
        assert after == before
    readers = writing_ranks(4, layout.replicate)
    assert [rank for rank, (*_, names) in enumerate(found) if names] == readers
    shards = {f"__{place}_0.distcp" for place in range(len(readers))}
    assert {name for *_, names in found for name in names} == shards | {".metadata"}


def test_a_restored_optimizer_is_read_once(tmp_path: Path) -> None:
    layout, own = LAYOUTS[1], ADAMW
    before = run_ranks(4, lambda topology: _saved(tmp_path, layout, topology, own))
    folder = tmp_path / "batch-00000001"

    def restore(topology: Topology) -> tuple[Any, ...]:
        decoder, optimizer = built(layout, topology, 2, own)
        with _opened(folder) as names:
            restore_optimizer(folder, decoder, optimizer, topology, replicas_of(decoder))
        return held(decoder, optimizer), names

    after = run_ranks(4, restore)
    # Only tensors: rates and decay are this recipe's.
    tensors = [[value for value in held if isinstance(value, list)] for held, _ in before]
    assert [[value for value in held if isinstance(value, list)] for held, _ in after] == tensors
    readers = [rank for rank, (_, names) in enumerate(after) if set(names) - {".metadata"}]
    assert layout.replicate > 1 and readers == writing_ranks(4, layout.replicate)


def test_a_run_of_another_layout_reads_what_one_replica_wrote(tmp_path: Path) -> None:
    run_ranks(4, lambda topology: _saved(tmp_path, LAYOUTS[1], topology, ADAMW))
    folder = tmp_path / "batch-00000001"

    def load(topology: Topology) -> list[Any]:
        found = []
        for layout in (LAYOUTS[0], LAYOUTS[2], Parallelism(expert=4)):
            decoder, optimizer = built(layout, topology, 2)
            load_checkpoint(folder, decoder, optimizer, topology, replicas_of(decoder))
            found.append([whole(each).tolist() for each in decoder.parameters()])
        return found

    for first, second, third in run_ranks(4, load):
        assert first == second == third


@pytest.mark.parametrize(
    ("name", "error"), [("__1_0.distcp", CheckpointError), (".metadata", UserError)], ids=str
)
def test_a_file_that_one_rank_cannot_read_ends_the_load_on_all(
    name: str, error: type[Exception], tmp_path: Path
) -> None:
    run_ranks(4, lambda topology: _saved(tmp_path, LAYOUTS[1], topology, ADAMW))
    folder = tmp_path / "batch-00000001"
    (folder / "state" / name).write_bytes(b"damaged")

    def load(topology: Topology) -> str:
        decoder, optimizer = built(LAYOUTS[1], topology, 2)
        try:
            load_checkpoint(folder, decoder, optimizer, topology, replicas_of(decoder))
        except BaseException as failure:  # torch's is no Exception
            return type(failure).__name__
        return ""

    found = run_ranks(4, load)
    assert all(found) and error.__name__ in found


def test_a_plan_that_stays_the_same_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, scatter = dist.gather_object, dist.scatter_object_list

    def work(topology: Topology) -> tuple[list[int], list[Any], list[bool]]:
        sent: list[int] = []

        def gathered(**named: Any) -> None:
            sent.append(len(pickle.dumps(named["obj"])))
            gather(**named)

        def scattered(**named: Any) -> None:
            sent.append(len(pickle.dumps(named["scatter_object_input_list"])))
            scatter(**named)

        monkeypatch.setattr(dist, "gather_object", gathered)
        monkeypatch.setattr(dist, "scatter_object_list", scattered)
        decoder, optimizer = built(LAYOUTS[1], topology, 1)
        step(decoder, optimizer)
        saver = CheckpointSaver(tmp_path, topology, 9, replicas_of(decoder))
        sizes, metadata, are_equal = [], [], []
        for batch in (1, 2, 3):
            if batch == 3:  # a state of another form: the plan is made again
                decoder.register_buffer("more", torch.ones(1000))
            sent.clear()
            saver.start(decoder, optimizer, Progress(batch, 8, 80, 1.5))
            saved = saver.wait()
            if saved is not None:
                assert saved.folder is not None
                reader = CheckpointReader(saved.folder / "state")
                metadata.append(sorted(reader.metadata.state_dict_metadata))
                # The plan's gather and, on rank 0, its scatter; the second gather is that of the results.
                sizes.append(max(sent[:2] if topology.is_main else sent[:1]))
            before = held(decoder, optimizer)
            other, other_optimizer = built(LAYOUTS[1], topology, 2)
            if batch == 3:
                other.register_buffer("more", torch.zeros(1000))
            load_checkpoint(
                tmp_path / f"batch-{batch:08d}", other, other_optimizer, topology, replicas_of(other)
            )
            are_equal.append(held(other, other_optimizer) == before)
            step(decoder, optimizer)
        return sizes, metadata, are_equal

    for rank, (sizes, metadata, are_equal) in enumerate(run_ranks(4, work)):
        assert are_equal == [True] * 3
        if rank in writing_ranks(4, 2):
            first, second, third = sizes
            assert second < 1000 < first and third > second
            assert metadata[0] == metadata[1]


def test_another_savers_plan_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """Ranks are forked from a process that has saved before, as the checks' are."""
    for number in range(2):
        model = torch.nn.Linear(5, 4 + number)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        saver = CheckpointSaver(tmp_path / str(number), Topology(), 1)
        saver.start(model, optimizer, Progress(1, 8, 80, 1.5))
        assert (saver.wait() or pytest.fail("no outcome")).error == ""
    run_ranks(4, lambda topology: _saved(tmp_path / "forked", LAYOUTS[1], topology, ADAMW))
    names = {file.name for file in (tmp_path / "forked" / "batch-00000001" / "state").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
