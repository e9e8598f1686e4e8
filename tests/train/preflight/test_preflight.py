"""Preflight: slow ranks and pairs are named, healthy ones are not; each problem of a node is one line."""

import os
import shutil
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.opened import OpenedData
from data.write_shards import build_shards
from launch.experiments.preflight_trials import try_ranks
from launch.preflight import describe
from launch.verify.forked_ranks import Ranks, run_ranks
from tests.data.conftest import small_documents
from train.health.heartbeat import FINDING_FILE, RECORDS_FOLDER, Finding, read_record
from train.preflight import links, together
from train.preflight.links import _all_to_all, by_kind, find_slow, measure_collectives, rounds
from train.preflight.node import (
    NodeCheck,
    check_compiler,
    check_disk,
    check_gpus,
    check_infiniband,
    check_nvlink,
    check_shards,
    check_shared_memory,
)
from train.preflight.together import SLOW, UNFIT, Findings, PreflightRow, preflight
from train.recipe.exit_status import HANG_STATUS
from train.recipe.reading import load_recipe
from train.recipe.reliability import Watch
from train.recipe.schema import Precision
from train.recipe.topology import Topology
from train.record.process import HOST_VARIABLE
from train.run import Machine, is_fit

pytestmark = pytest.mark.slow

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


def test_links_are_held_to_their_own_kind() -> None:
    """Two nodes of four: links between them take ten times as long as inside, and no rank is slow."""
    pairs = [(one, other) for one in range(8) for other in range(one + 1, 8)]
    inside = {pair: 0.001 for pair in pairs if pair[0] // 4 == pair[1] // 4}
    between = {pair: 0.01 for pair in pairs if pair not in inside}
    # A link within a node that is as slow as one between nodes: only its kind reveals it.
    odd = inside | {(0, 1): 0.01}
    assert find_slow(odd | between, 3.0) == ([], [])
    assert find_slow(by_kind(odd, between), 3.0) == ([], [(0, 1)])
    assert find_slow(by_kind(inside, between), 3.0) == ([], [])
    slow = [{p: took * (10 if 5 in p else 1) for p, took in kind.items()} for kind in (inside, between)]
    assert find_slow(by_kind(*slow), 3.0) == ([5], [])


@pytest.mark.parametrize("world", [2, 3, 4, 7, 16])
def test_everybody_meets_everybody_once(world: int) -> None:
    met = [tuple(sorted(pair)) for pairs in rounds(world) for pair in pairs.items()]
    expected = [(one, other) for one in range(world) for other in range(one + 1, world)]
    assert sorted(met) == sorted(expected * 2)
    assert len(list(rounds(1000))) == 16


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    overrides = [f"data.shards={tmp_path / 'none'}", "preflight.expected_gigabits=1e9"]
    recipe = load_recipe(YAMLS / "smoke.yaml", overrides)

    def work(topology: Topology) -> Findings:
        from train.record import provenance

        versions = provenance.package_versions() | ({"torch": "0.1"} if topology.rank == 2 else {})
        clock = time.time
        digest = "b" if topology.rank == 1 else "a"
        with (
            mock.patch.object(provenance, "package_versions", lambda: versions),
            mock.patch.object(time, "time", lambda: clock() + (60 if topology.rank == 1 else 0)),
            mock.patch.dict(os.environ, {HOST_VARIABLE: f"n{topology.rank}"}),
            mock.patch.object(together, "check_node", lambda *_: [NodeCheck("shards", digest)]),
        ):
            folder = tmp_path / ("elsewhere" if topology.rank == 0 else "shared")
            folder.mkdir(exist_ok=True)
            # Each rank is alone on its node.
            alone = replace(topology, local_rank=0, local_world_size=1)
            return preflight(OpenedData(recipe), folder, alone, CPU)

    findings = run_ranks(3, work)[1]
    by_word = {
        word: ranks
        for ranks, line in findings.faults
        for word in ("torch is", "clock", "does not see", "n1: shards: b, elsewhere a")
        if word in line
    }
    assert by_word == {
        "torch is": [2],
        "clock": [1],
        "does not see": [1, 2],
        "n1: shards: b, elsewhere a": [1],
    }
    bad = {row.check: row.verdict for row in findings.rows if row.is_bad}
    assert bad == dict.fromkeys(("shards", "packages", "checkpoint folder", "clocks"), UNFIT) | dict.fromkeys(
        ("all-reduce", "all-gather"), SLOW
    )
    assert {row.where for row in findings.rows if row.check == "links"} == {"between nodes"}


def test_all_to_all_is_over_the_expert_groups() -> None:
    def work(topology: Topology) -> tuple[set[str], set[str], list[float]]:
        out = torch.full((4,), -1.0)
        _all_to_all(out, 10.0 * topology.rank + torch.arange(4), 2, None)
        return set(measure_collectives(CPU, 1)), set(measure_collectives(CPU, 2)), out.tolist()

    found = run_ranks(4, work)
    assert all(alone == {"all-reduce", "all-gather"} for alone, _, _ in found)
    assert all(shared == {"all-reduce", "all-gather", "all-to-all"} for _, shared, _ in found)
    # Each rank's half from its only peer; its own stays where it is.
    assert [out for _, _, out in found] == [
        [-1.0, -1.0, 10.0, 11.0],
        [2.0, 3.0, -1.0, -1.0],
        [-1.0, -1.0, 30.0, 31.0],
        [22.0, 23.0, -1.0, -1.0],
    ]


def test_measurements_leave_no_group_and_make_one_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "TOURNAMENTS", 1)

    def work(_alone: Topology) -> tuple[int, list[int], int]:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3072)
        groups = dist.distributed_c10d._world.pg_map
        made, new_group = [], dist.new_group

        def counted(*args: Any, **kwargs: Any) -> Any:
            made.append(len(args[0]) if args else dist.get_world_size())
            return new_group(*args, **kwargs)

        monkeypatch.setattr(dist, "new_group", counted)
        with links.measuring_group(CPU) as group:
            assert group is not None
            for pairs in rounds(3072):
                links.send(torch.zeros(1), pairs[0], group)
            measure_collectives(CPU, 16, group, repeats=1)
            during = len(groups)
        return during, made, len(groups)

    assert run_ranks(1, work) == [(2, [3072], 1)]


def test_a_rank_that_hangs_in_preflight_is_named(tmp_path: Path) -> None:
    limits = Watch(hang_seconds=2.0, start_seconds=2.0)
    recipe = replace(load_recipe(YAMLS / "smoke.yaml", [f"data.shards={tmp_path / 'none'}"]), watch=limits)

    def work(topology: Topology) -> None:
        def hang(*_: object) -> list[NodeCheck]:
            time.sleep(60 if topology.rank == 1 else 0)
            return []

        alone = replace(topology, local_rank=0, local_world_size=1)
        with mock.patch.object(together, "check_node", hang):
            is_fit(OpenedData(recipe), tmp_path, Machine(alone, "cpu", Precision.fp32))

    with Ranks(3, work, tmp_path / "out") as ranks:
        assert HANG_STATUS in ranks.exit_codes(60)
    finding = read_record(tmp_path / RECORDS_FOLDER / FINDING_FILE, Finding)
    assert finding is not None and [suspect.rank for suspect in finding.suspects] == [1]
    assert "preflight" in finding.line and "in hang" in finding.suspects[0].stacks


def test_the_table_has_a_line_for_many_nodes_and_one_verdict() -> None:
    rows = [
        PreflightRow("disk", f"n{node}", f"{node} MB/s", is_of_node=True, level=node)
        for node in range(3, 300)
    ]
    rows += [PreflightRow("GPUs", f"n{node}", "8", "8", is_of_node=True) for node in range(3, 300)]
    lines = list(describe(Findings(rows), 2376))
    assert len(lines) == 5 and lines[-1] == "FIT: a job of 2376 ranks may start"
    assert "worst of 297 nodes: n3  3 MB/s" in lines[1] and "297 nodes " in lines[2]
    # Unfit nodes are shown before the slowest.
    rows[100] = replace(rows[100], verdict=UNFIT)
    lines = list(describe(Findings(rows, faults=[([824], "n103: disk: full")]), 2376))
    assert "worst of 297 nodes: n103" in lines[1] and lines[1].endswith(UNFIT)
    assert lines[-2:] == [
        "UNFIT: n103: disk: full",
        "UNFIT: 1 problem; a job of 2376 ranks must not start here",
    ]
    (*_, last) = describe(Findings(rows[:1], warnings=[([1], "rank 1 on n1: 4.0 times as slow")]), 2)
    assert last.startswith("FIT, but slow")


def test_shards_are_opened_and_not_only_listed(tmp_path: Path) -> None:
    recipe = load_recipe(
        YAMLS / "smoke.yaml", [f"data.shards={tmp_path / 'shards'}", "data.corpus_bytes=1000000"]
    )
    build_shards(recipe, documents=small_documents)
    assert not check_shards(OpenedData(recipe)).problem
    (shard, *_) = sorted((tmp_path / "shards/code/train").glob("shard.*"))
    shard.unlink()
    assert str(shard) in check_shards(OpenedData(recipe)).problem
    shutil.rmtree(tmp_path / "shards")
    # To be built when the run starts.
    assert not check_shards(OpenedData(recipe)).problem
    no_corpus = replace(recipe, data=replace(recipe.data, corpus=None))
    assert "no shards at" in check_shards(OpenedData(no_corpus)).problem


def test_what_a_node_lacks_is_said(tmp_path: Path) -> None:
    assert not check_disk(tmp_path, 1).problem
    assert "free some space" in check_disk(tmp_path, 1 << 60).problem
    assert "preflight.least_disk_speed" in check_disk(tmp_path, 1, 1e15).problem
    blocked = tmp_path / "file"
    blocked.touch()
    assert "not writable" in check_disk(blocked / "below", 1).found
    assert "--shm-size" in check_shared_memory(tmp_path / "none").problem
    listing = "0, 0, 1980, Not Active\n1, 3, 1980, Not Active\n2, 0, 1980, Active\n"
    count, ecc, slowed, clocks = check_gpus(listing, 4)
    assert "3 GPUs answer, 4 are wanted" in count.problem
    assert ecc.problem.startswith("GPU 1:") and slowed.problem.startswith("GPU 2:") and not clocks.problem
    (*_, clocks) = check_gpus(listing + "3, 0, 1410, Not Active\n", 4)
    assert clocks.problem.startswith("GPU 3 (1410): the others have 1980")
    assert [check.problem for check in check_gpus(listing.splitlines()[0], 1)] == ["", "", "", ""]
    links = "GPU 0: H100\n\t Link 0: 26.5 GB/s\n\t Link 1: <inactive>\n"
    assert "1 of 2 links are down" in check_nvlink(links).problem
    for port, state in (("mlx5_0/ports/1", "4: ACTIVE"), ("mlx5_1/ports/1", "1: DOWN")):
        (tmp_path / port).mkdir(parents=True)
        (tmp_path / port / "state").write_text(state)
    assert check_infiniband(tmp_path).problem.startswith("mlx5_1/1: down")


def test_a_node_on_which_triton_could_compile_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "my-cc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    assert check_compiler().found == "my-cc" and bool(check_compiler().problem) != header.is_file()
    monkeypatch.delenv("CC")
    assert "Triton needs a C compiler (install gcc" in check_compiler().problem
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert f"Triton needs {tmp_path}/Python.h (install python3-dev" in check_compiler().problem
    (tmp_path / "Python.h").touch()
    assert not check_compiler().problem and check_compiler().found == f"{tmp_path}/gcc"
