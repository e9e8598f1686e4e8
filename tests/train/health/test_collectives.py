"""Collectives are recorded on gloo with a watchdog; otherwise torch's methods are untouched."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from launch.verify.forked_ranks import Ranks, run_ranks
from train.health import collectives
from train.health.collectives import METHODS, CollectiveRecorder, collectives_of, recorded_collectives
from train.health.nccl import NcclRecorder
from train.health.stragglers import Stragglers
from train.health.watched import watched
from train.recipe.reliability import Watch
from train.recipe.schema import Recipe
from train.recipe.topology import Topology


def methods() -> dict[str, object]:
    return {name: vars(dist.ProcessGroup)[name] for name in METHODS} | {"wait": vars(dist.Work)["wait"]}


TORCHS_OWN = methods()


def wrapped() -> set[str]:
    """Names of the methods that are wrapped."""
    return {name for name, method in methods().items() if method is not TORCHS_OWN[name]}


def test_recorder_counts_by_group_and_forgets_what_is_complete() -> None:
    def work(topology: Topology) -> tuple[CollectiveRecorder, int, bool]:
        with recorded_collectives() as recorder:
            return record(topology, recorder)

    def record(topology: Topology, recorder: CollectiveRecorder) -> tuple[CollectiveRecorder, int, bool]:
        for _ in range(3):
            dist.all_reduce(torch.ones(2))
        before = len(recorder.waiting())
        if topology.rank == 1:
            time.sleep(0.5)
        handle = dist.all_gather_into_tensor(torch.empty(4), torch.ones(2), async_op=True)
        last = recorder.last(1)[0]
        assert last.operation in ("allgather_base", "all_gather_single")
        assert (last.number, last.size_bytes) == (4, 16)
        is_waiting = bool(recorder.waiting())
        handle.wait()
        assert recorder.waiting() == []
        return list(recorder.issued.values()), before, is_waiting

    with Ranks(2, work) as ranks:
        found = ranks.results(30)
    assert [issued for issued, _, _ in found] == [[4], [4]]
    assert [before for _, before, _ in found] == [0, 0]
    assert found[0][2], "rank 0 must be seen to wait for rank 1"


def x(*rows: float) -> torch.Tensor:
    return torch.tensor(rows)


COLLECTIVES: dict[str, Callable[[Topology], object]] = {
    "all_gather": lambda _: dist.all_gather([x(0), x(0)], x(1)),
    "all_gather_into_tensor": lambda _: dist.all_gather_into_tensor(x(0, 0), x(1)),
    "all_reduce": lambda _: dist.all_reduce(x(1)),
    "all_to_all_single": lambda _: dist.all_to_all_single(x(0, 0), x(1, 2)),
    "barrier": lambda _: dist.barrier(),
    "broadcast": lambda _: dist.broadcast(x(1), 0),
    "gather": lambda t: dist.gather(x(1), [x(0), x(0)] if t.is_main else None),
    "reduce": lambda _: dist.reduce(x(1), 0),
    "reduce_scatter_tensor": lambda _: dist.reduce_scatter_tensor(x(0), x(1, 2)),
    "scatter": lambda t: dist.scatter(x(0), [x(1), x(2)] if t.is_main else None),
}
"""Collectives of torch's Python functions, which torch's versions send through different methods."""


def test_every_collective_is_recorded_once() -> None:
    def work(topology: Topology) -> dict[str, int]:
        counts = {}
        for name, issue in COLLECTIVES.items():
            with recorded_collectives() as recorder:
                issue(topology)
            counts[name] = recorder.progress()
        return counts

    assert run_ranks(2, work) == [dict.fromkeys(COLLECTIVES, 1)] * 2


def test_on_gloo_under_a_watchdog_all_is_wrapped_for_as_long_as_it_watches(tmp_path: Path) -> None:
    def work(topology: Topology) -> tuple[set[str], set[str], list[type]]:
        with watched(Recipe(), tmp_path, topology) as watch:
            within, callbacks = wrapped(), [type(callback) for callback in watch.callbacks()]
        dist.all_reduce(torch.ones(1))  # torch still works
        return within, wrapped(), callbacks

    for within, after, callbacks in run_ranks(2, work):
        assert within == {*METHODS, "wait"} and after == set()
        assert Stragglers in callbacks


@pytest.mark.parametrize(("backend", "hang_seconds"), [("gloo", None), ("nccl", None), ("nccl", 600.0)])
def test_nothing_is_wrapped_without_a_watchdog_or_beside_gloo(
    backend: str, hang_seconds: float | None, tmp_path: Path
) -> None:
    def work(topology: Topology) -> tuple[set[str], type, list[type]]:
        recipe = replace(Recipe(), watch=Watch(hang_seconds=hang_seconds))
        with (
            mock.patch.object(collectives.dist, "get_backend", return_value=backend),
            watched(recipe, tmp_path, topology) as watch,
        ):
            return wrapped(), type(watch.recorder), [type(callback) for callback in watch.callbacks()]

    for within, recorder, callbacks in run_ranks(2, work):
        assert within == set()
        assert recorder is (type(None) if hang_seconds is None else NcclRecorder)
        assert Stragglers not in callbacks, "their own time is not known"


def test_without_a_process_group_there_is_nothing_to_record() -> None:
    with collectives_of(True) as recorder:
        assert recorder is None and wrapped() == set()


def test_an_error_within_leaves_torch_as_it_was() -> None:
    with pytest.raises(RuntimeError), recorded_collectives():
        assert "allreduce" in wrapped()
        raise RuntimeError
    assert wrapped() == set()
