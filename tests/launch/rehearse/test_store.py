"""Requests, bytes and sockets of gloo groups: the closed forms against real groups of up to 64 ranks."""

import resource
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.rehearse.store import (
    CountingStore,
    Requests,
    StoreSpeed,
    count_gloo,
    gloo_key_bytes,
    gloo_requests,
    measure_store,
    nccl_requests,
)
from launch.verify.forked_ranks import run_ranks
from train.checkpoint.saver import CheckpointSaver
from train.health.descriptors import PER_GROUP
from train.layout.mesh import build_mesh
from train.recipe.schema import Parallelism
from train.recipe.topology import Topology

KEPT: list[object] = []
"""Groups of a forked rank: the process ends at once, while closing 64 takes a long time."""


def assert_is_of(counted: Requests, groups: list[int]) -> None:
    """Older torch does not read a rank's own key back."""
    whole = sum((gloo_requests(ranks) for ranks in groups), Requests())
    own = sum((Requests(2 * ranks, ranks * gloo_key_bytes(ranks)) for ranks in groups), Requests())
    assert counted in (whole, Requests(whole.calls - own.calls, whole.bytes - own.bytes))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 8, 32, 64])
def test_the_closed_forms_count_a_real_group(ranks: int) -> None:
    def work(_: Topology) -> tuple[Requests, int]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10_000), hard))
        before = open_files()
        stores, groups = count_gloo(ranks)
        total = sum((store.total() for store in stores), Requests())
        KEPT.append(groups)
        return total, open_files() - before

    ((counted, descriptors),) = run_ranks(1, work)
    assert_is_of(counted, [ranks])
    assert descriptors == ranks * (ranks + PER_GROUP)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Parallelism(), Parallelism(replicate=2, expert=2)], ids=str)
def test_the_saver_of_a_real_job_asks_as_much(layout: Parallelism, tmp_path: Path) -> None:
    """Forked ranks on one store, as a job's, and only the saver's group counted."""
    world = 8

    def work(topology: Topology) -> Requests:
        rank, stores = topology.rank, str(tmp_path / "store")
        dist.barrier()  # another rank may still be connecting to this one
        dist.destroy_process_group()
        store = CountingStore(dist.FileStore(stores, world))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        mesh = build_mesh(layout, world, "cpu")
        before = store.total()
        CheckpointSaver(
            tmp_path, topology, 1, mesh.dense.get_group("replicate") if layout.replicate > 1 else None
        )
        found = Requests(store.total().calls - before.calls, store.total().bytes - before.bytes)
        dist.barrier()
        return found

    assert_is_of(sum(run_ranks(world, work), Requests()), [world // layout.replicate])


def test_requests_add_up_and_take_the_time_that_a_store_needs() -> None:
    assert Requests(2, 10) + Requests(1, 5) == Requests(3, 15)
    assert nccl_requests(8) == Requests(9, 128 * 9)
    assert nccl_requests(3072).calls == 3072 + 24  # one root in 128 ranks
    speed = StoreSpeed(calls_per_second=1000, bytes_per_second=1e6)
    assert speed.seconds(Requests(2000, 3_000_000)) == 5.0


@pytest.mark.slow
def test_the_speed_of_a_store_is_measured() -> None:
    (speed,) = run_ranks(1, lambda _: measure_store())
    assert 1e3 < speed.calls_per_second < 1e7
    assert 1e6 < speed.bytes_per_second < 1e11
