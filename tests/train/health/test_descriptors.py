"""Open files: the closed form against real gloo groups, and the limit that each rank raises."""

import resource
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.verify.forked_ranks import run_ranks
from train.checkpoint.saver import CheckpointSaver
from train.health.descriptors import (
    OTHERS,
    PER_GROUP,
    gloo_groups,
    needed_descriptors,
    raise_descriptor_limit,
)
from train.layout.mesh import build_mesh
from train.recipe.errors import UserError
from train.recipe.schema import Parallelism
from train.recipe.topology import Topology

LAYOUTS = [
    Parallelism(),
    Parallelism(expert=2),
    Parallelism(replicate=2),
    Parallelism(replicate=2, expert=2),
    Parallelism(expert=2, context=4),
    Parallelism(replicate=2, pipeline=2, pipeline_chunks=2),
    Parallelism(pipeline=2, tensor=2),
]
DBRX = Parallelism(replicate=24, expert=16)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("world", [4, 8])
def test_the_closed_form_counts_real_groups(layout: Parallelism, world: int, tmp_path: Path) -> None:
    def work(topology: Topology) -> tuple[int, int]:
        before = _open_files()
        mesh = build_mesh(layout, topology.world_size, "cpu")
        replicas = mesh.dense.get_group("replicate") if layout.replicate > 1 else None
        of_mesh = _open_files()
        CheckpointSaver(tmp_path, topology, 1, replicas)
        return of_mesh - before, _open_files() - of_mesh

    saver, _world, *mesh = gloo_groups(layout, world, uses_gpus=False)
    counted = run_ranks(world, work)
    assert {of_mesh for of_mesh, _ in counted} == {sum(size + PER_GROUP for size in mesh)}
    assert sorted(of_saver for _, of_saver in counted if of_saver) == [saver + PER_GROUP] * saver


def test_a_gpu_rank_of_3072_needs_less_than_a_thousand_and_only_rank_0_more() -> None:
    assert gloo_groups(DBRX, 3072, uses_gpus=True) == [128]
    assert needed_descriptors(DBRX, Topology(1, 3072, 1, 8), uses_gpus=True) == OTHERS + 131 < 1000
    assert needed_descriptors(DBRX, Topology(0, 3072, 0, 8), uses_gpus=True) == OTHERS + 131 + 3072
    assert needed_descriptors(DBRX, Topology(), uses_gpus=True) < 1024


@pytest.mark.slow
def test_each_rank_raises_its_limit_and_a_hard_limit_too_low_is_one_line() -> None:
    def work(topology: Topology) -> tuple[int, str]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
        raise_descriptor_limit(Parallelism(), Topology(1, 64, 1, 8), uses_gpus=True)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        with pytest.raises(UserError) as caught:
            raise_descriptor_limit(DBRX, Topology(0, 3072, 0, 8), uses_gpus=True)
        return soft, str(caught.value)

    ((soft, line),) = run_ranks(1, work)
    assert soft == 2048
    assert line == (
        "rank 0 of 3072 may need 3,715 open files, and this node's hard limit is 2,048; "
        "raise it where the job starts: ulimit -n 3715"
    )


@pytest.mark.slow
def test_the_limit_is_raised_before_a_rank_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import run
    from train.recipe.schema import Recipe

    def work(topology: Topology) -> tuple[int, bool]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))
        seen = []
        monkeypatch.setattr(
            run, "join", lambda *_: seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        )
        run.start_processes(Recipe(), Topology(0, 2, 0, 2))
        return seen[0], dist.is_initialized()

    assert run_ranks(1, work) == [(2048, False)]
