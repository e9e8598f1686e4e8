"""Missing ranks are named; process groups time out after the watchdog."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from composer.utils import get_device

from launch.verify.forked_ranks import Ranks, run_ranks
from train.health.heartbeat import RECORDS_VARIABLE, Failure, failure_file, read_record
from train.health.joining import join, outlast_watchdog
from train.layout.mesh import build_mesh
from train.recipe.exit_status import UNFIT_STATUS
from train.recipe.reliability import Watch
from train.recipe.schema import Parallelism, Recipe
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

BUFFER = "TORCH_NCCL_TRACE_BUFFER_SIZE"


def places(port: int, records: Path) -> dict[str, str]:
    """The launcher's variables for the first of three ranks, each on its own node."""
    ranks = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), RECORDS_VARIABLE: str(records)}


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    recipe = replace(Recipe(), watch=Watch(start_seconds=3.0))

    def work(topology: Topology) -> None:
        with mock.patch.dict(os.environ, places(0, tmp_path)):
            join(recipe, get_device("cpu"), Topology(0, 3, 0, 1))

    with Ranks(1, work, tmp_path / "out") as ranks:
        assert ranks.exit_codes(60) == [UNFIT_STATUS]
    failure = read_record(failure_file(tmp_path, 0), Failure)
    assert failure is not None and "not all 3 ranks have come within 3 s: ranks 1-2;" in failure.error


def test_what_fails_at_once_is_not_called_waiting(tmp_path: Path) -> None:
    def work(topology: Topology) -> str:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with mock.patch.dict(os.environ, places(taken.getsockname()[1], tmp_path)):
                try:
                    join(Recipe(), get_device("cpu"), Topology(0, 3, 0, 1))
                except RuntimeError as error:
                    return str(error)
        raise AssertionError("the port is taken")

    (said,) = run_ranks(1, work)
    failure = read_record(failure_file(tmp_path, 0), Failure)
    assert "address already in use" in said.lower() and failure is not None
    assert "address already in use" in failure.error.lower() and "JoinError" not in failure.error


@pytest.mark.parametrize(
    "hang,given,kept", [(600.0, None, "2000"), (600.0, "50", "50"), (None, None, None)], ids=str
)
def test_nccl_keeps_its_collectives_for_the_watchdog(
    hang: float | None, given: str | None, kept: str | None, tmp_path: Path
) -> None:
    recipe = replace(Recipe(), watch=Watch(hang_seconds=hang))

    def work(topology: Topology) -> str | None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = places(port, tmp_path) | {"WORLD_SIZE": "1"}
        with mock.patch.dict(os.environ, environment | ({} if given is None else {BUFFER: given})):
            if given is None:
                os.environ.pop(BUFFER, None)
            join(recipe, get_device("cpu"), Topology())
            return os.environ.get(BUFFER)

    assert run_ranks(1, work) == [kept]


@pytest.mark.parametrize("start,hang,patience", [(7.0, 3.0, 14.0), (7.0, None, 14.0), (1.0, 9.0, 18.0)])
def test_every_group_outlasts_the_watchdog(start: float, hang: float | None, patience: float) -> None:
    recipe = replace(Recipe(), watch=Watch(start_seconds=start, hang_seconds=hang))

    def work(topology: Topology) -> set[float]:
        build_mesh(Parallelism(expert=2), topology.world_size, "cpu")
        outlast_watchdog(recipe)
        groups = dist.distributed_c10d._world.pg_map
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        assert len(backends) > 1, "the mesh has groups of its own"
        return {backend.options._timeout.total_seconds() for backend in backends}

    assert run_ranks(2, work) == [{patience}, {patience}]
