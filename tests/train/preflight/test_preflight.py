"""Slow ranks and pairs are named and no healthy one accused; what is wrong with a node is one line."""

import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from launch.preflight_trials import try_ranks
from launch.ranks import run_ranks
from train.preflight.links import find_slow, rounds
from train.preflight.node import check_disk, check_gpus, check_infiniband, check_nvlink, check_shared_memory
from train.preflight.together import preflight
from train.recipe import load_recipe
from train.topology import Topology

TRIALS, WORLD = 6, 4
YAMLS = Path(__file__).resolve().parents[3] / "yamls"
CPU = torch.device("cpu")


def test_the_slow_rank_is_named_and_no_healthy_run_accused() -> None:
    trials = list(try_ranks(WORLD, TRIALS, 3.0))
    assert [trial.named for trial in trials if trial.slow is not None] == [[n % WORLD] for n in range(TRIALS)]
    assert [trial.named + trial.pairs for trial in trials if trial.slow is None] == [[]] * TRIALS
    assert all(trial.has_passed for trial in trials)
    assert not replace(trials[1], named=[]).has_passed and not replace(trials[0], pairs=[(0, 1)]).has_passed


def test_a_slow_pair_is_named_and_not_its_ranks() -> None:
    seconds = {(one, other): 0.001 for one in range(5) for other in range(one + 1, 5)}
    assert find_slow(seconds | {(1, 3): 0.02}, 3.0) == ([], [(1, 3)])
    assert find_slow({pair: 0.02 if 2 in pair else 0.001 for pair in seconds}, 3.0) == ([2], [])
    assert find_slow({(0, 1): 1.0}, 3.0) == ([], [])


@pytest.mark.parametrize("world", [2, 3, 4, 7, 16])
def test_everybody_meets_everybody_once(world: int) -> None:
    met = [tuple(sorted(pair)) for pairs in rounds(world) for pair in pairs.items()]
    expected = [(one, other) for one in range(world) for other in range(one + 1, world)]
    assert sorted(met) == sorted(expected * 2)
    assert len(list(rounds(1000))) == 16


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml", [f"data.shards={tmp_path / 'none'}"])

    def work(topology: Topology) -> list[tuple[list[int], str]]:
        from train import provenance

        versions = provenance.package_versions() | ({"torch": "0.1"} if topology.rank == 2 else {})
        clock = time.time
        with (
            mock.patch.object(provenance, "package_versions", lambda: versions),
            mock.patch.object(time, "time", lambda: clock() + (60 if topology.rank == 1 else 0)),
        ):
            folder = tmp_path / ("elsewhere" if topology.rank == 0 else "shared")
            return preflight(recipe, folder, topology, CPU).faults

    faults = run_ranks(3, work)[1]
    by_word = {
        word: ranks
        for ranks, line in faults
        for word in ("torch is", "clock", "does not see")
        if word in line
    }
    assert by_word == {"torch is": [2], "clock": [1], "does not see": [1, 2]}


def test_what_a_node_lacks_is_said(tmp_path: Path) -> None:
    assert not check_disk(tmp_path, 1).fault
    assert "make room" in check_disk(tmp_path, 1 << 60).fault
    blocked = tmp_path / "file"
    blocked.touch()
    assert "not writable" in check_disk(blocked / "below", 1).found
    assert "--shm-size" in check_shared_memory(tmp_path / "none").fault
    listing = "0, 0, 1980, Not Active\n1, 3, 1980, Not Active\n2, 0, 1980, Active\n"
    count, ecc, clocks = check_gpus(listing, 4)
    assert "3 GPUs answer, 4 are wanted" in count.fault
    assert ecc.fault.startswith("GPU 1:") and clocks.fault.startswith("GPU 2:")
    assert [check.fault for check in check_gpus(listing.splitlines()[0], 1)] == ["", "", ""]
    links = "GPU 0: H100\n\t Link 0: 26.5 GB/s\n\t Link 1: <inactive>\n"
    assert "1 of 2 links are down" in check_nvlink(links).fault
    for port, state in (("mlx5_0/ports/1", "4: ACTIVE"), ("mlx5_1/ports/1", "1: DOWN")):
        (tmp_path / port).mkdir(parents=True)
        (tmp_path / port / "state").write_text(state)
    assert check_infiniband(tmp_path).fault.startswith("mlx5_1/1: down")
