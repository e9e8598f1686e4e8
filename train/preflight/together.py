"""Preflight before a job: checks of each node, then agreement between all ranks, then the links."""

import hashlib
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.opened import OpenedData
from train.health.joining import outlast_watchdog
from train.preflight.links import (
    ALL_TO_ALL,
    COLLECTIVES,
    MESSAGE_BYTES,
    measure_collectives,
    measure_links,
    measuring_group,
)
from train.preflight.node import SHARDS, NodeCheck, check_node
from train.recipe.reading import to_yaml
from train.recipe.reliability import Preflight, PreflightWhen
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record import provenance
from train.record.process import host_name

TOKEN_FILE = ".preflight-token"
FIT, SLOW, UNFIT = "ok", "slow", "UNFIT"
LINKS = "links"
SPEEDS = (LINKS, *COLLECTIVES)


@dataclass(frozen=True)
class PreflightRow:
    """The result of one check, and its place."""

    check: str
    where: str
    """A node, or a group of ranks."""
    found: str
    wanted: str = ""
    """The limit, in words; empty: reported only."""
    verdict: str = FIT
    """FIT, SLOW, UNFIT; empty if nothing was checked."""
    is_of_node: bool = False
    """True for a check that every node has."""
    level: float = 0.0
    """Value for comparing nodes: the lowest is the worst."""

    @property
    def is_bad(self) -> bool:
        """True if the limit is violated."""
        return self.verdict in (SLOW, UNFIT)


@dataclass
class Findings:
    """The results of preflight, equal on all ranks."""

    rows: list[PreflightRow] = field(default_factory=list)
    faults: list[tuple[list[int], str]] = field(default_factory=list)
    """Problems because of which the job must not start: the ranks concerned, and one line."""
    warnings: list[tuple[list[int], str]] = field(default_factory=list)
    """Problems that only slow the job down, in the same form."""

    @property
    def speed(self) -> str:
        """Measured speed of the links, in one line."""
        return "; ".join(f"{row.check} {row.found}" for row in self.rows if row.check in SPEEDS)


def is_wanted(recipe: Preflight, topology: Topology) -> bool:
    """Returns True if a run begins with preflight."""
    if recipe.when is PreflightWhen.multi_node:
        return topology.world_size > topology.local_world_size
    return recipe.when is PreflightWhen.always


def preflight(opened: OpenedData, run_folder: Path, topology: Topology, device: torch.device) -> Findings:
    """Runs all checks; every rank calls it, in the process group that the job will use."""
    recipe = opened.recipe
    findings, limits = Findings(), recipe.preflight
    gpus = topology.local_world_size if device.type == "cuda" else 0
    # One rank checks each node.
    checks = check_node(limits, opened, run_folder, gpus) if topology.local_rank == 0 else []
    mine = {"host": host_name(), "checks": checks, "token": secrets.token_hex(8)}
    by_rank = gather(mine, topology)
    of_nodes = [(rank, one["host"], check) for rank, one in enumerate(by_rank) for check in one["checks"]]
    for rank, host, check in _same_shards(of_nodes):
        verdict = UNFIT if check.problem else FIT
        findings.rows.append(
            PreflightRow(check.name, host, check.found, check.wanted, verdict, True, check.level)
        )
        if check.problem:
            findings.faults.append(([rank], f"{host}: {check.name}: {check.problem}"))
    if not gpus:
        findings.rows.append(
            PreflightRow("GPUs, InfiniBand", "no node", "not looked at: ranks on CPUs", verdict="")
        )
    _agree(findings, recipe, topology, by_rank)
    _share_folder(findings, run_folder, topology, by_rank)
    if topology.world_size > 1:
        _compare_clocks(findings, limits, topology, by_rank)
        with measuring_group(device) as group:
            outlast_watchdog(recipe)
            _compare_links(findings, recipe, device, by_rank, group)
    else:
        findings.rows.append(PreflightRow(LINKS, "one rank", "not measured: a single rank", verdict=""))
    return findings


def gather(mine: Any, topology: Topology) -> list[Any]:
    """Gathers an object from every rank, by rank."""
    if topology.world_size == 1:
        return [mine]
    by_rank: list[Any] = [None] * topology.world_size
    dist.all_gather_object(by_rank, mine)
    return by_rank


def _same_shards(checks: list[tuple[int, str, NodeCheck]]) -> Iterator[tuple[int, str, NodeCheck]]:
    """Yields the nodes' checks (rank, node, check), adding a problem if a node has other shards than most."""
    seen = Counter(check.found for _, _, check in checks if _has_shards(check))
    for rank, host, check in checks:
        usual = seen.most_common(1)[0][0] if _has_shards(check) else check.found
        if check.found != usual:
            problem = f"{check.found}, elsewhere {usual}; mount the same folder everywhere"
            check = replace(check, problem=problem)  # noqa: PLW2901
        yield rank, host, check


def _has_shards(check: NodeCheck) -> bool:
    return check.name == SHARDS and check.level >= 0


def _agree(findings: Findings, recipe: Recipe, topology: Topology, by_rank: list[Any]) -> None:
    """Checks that recipe, code and packages are the same on all ranks."""
    mine = {
        "recipe": hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12],
        "code": provenance.git_commit(),
        **provenance.package_versions(),
    }
    everybody = gather(mine, topology)
    is_odd_package = False
    for name in mine:
        values = Counter(one.get(name) for one in everybody)
        usual = values.most_common(1)[0][0]
        odd = [rank for rank, one in enumerate(everybody) if one.get(name) != usual]
        if name in ("recipe", "code"):
            findings.rows.append(
                PreflightRow(name, "all ranks", str(usual)[:12], "all equal", UNFIT if odd else FIT)
            )
        is_odd_package |= bool(odd) and name not in ("recipe", "code")
        if odd:
            where = f"rank {odd[0]} on {by_rank[odd[0]]['host']}"
            line = f"{where}: {name} is {everybody[odd[0]].get(name)}, elsewhere {usual}; install the same"
            findings.faults.append((odd, line))
    packages = PreflightRow("packages", "all ranks", f"{len(mine) - 2} versions", "all equal")
    findings.rows.append(replace(packages, verdict=UNFIT if is_odd_package else FIT))


def _share_folder(findings: Findings, run_folder: Path, topology: Topology, by_rank: list[Any]) -> None:
    """Checks that all ranks see what rank 0 writes to the run's folder."""
    file, token = run_folder / TOKEN_FILE, by_rank[0]["token"]
    if topology.is_main:
        try:
            file.write_text(token)
        except OSError:
            # The node's own check reports the reason.
            token = ""
    gather(True, topology)
    sees = gather(_reads(file, token), topology)
    blind = [rank for rank, does in enumerate(sees) if not does]
    seen_by = f"seen by {len(sees) - len(blind)} of {len(sees)}"
    findings.rows.append(
        PreflightRow("checkpoint folder", "all ranks", seen_by, "all", UNFIT if blind else FIT)
    )
    if blind:
        where = f"rank {blind[0]} on {by_rank[blind[0]]['host']}"
        line = f"{where}: does not see what rank 0 wrote to {run_folder}; mount one file system on all nodes"
        findings.faults.append((blind, line))
    if topology.is_main:
        file.unlink(missing_ok=True)


def _reads(file: Path, token: str) -> bool:
    try:
        return file.read_text() == token
    except OSError:
        return False


def _compare_clocks(findings: Findings, limits: Preflight, topology: Topology, by_rank: list[Any]) -> None:
    """Compares clocks read just after a barrier, by the median of several readings."""
    readings = []
    for _ in range(5):
        dist.barrier()
        readings.append(time.time())
    everybody = gather(readings, topology)
    usual = [statistics.median(column) for column in zip(*everybody, strict=True)]
    skews = [
        statistics.median(one - middle for one, middle in zip(mine, usual, strict=True)) for mine in everybody
    ]
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank]))
    late = [rank for rank, skew in enumerate(skews) if abs(skew) > limits.most_skew_seconds]
    findings.rows.append(
        PreflightRow(
            "clocks",
            "all ranks",
            f"within {abs(skews[worst]):.3f} s",
            f"{limits.most_skew_seconds:g} s",
            UNFIT if late else FIT,
        )
    )
    if late:
        where = f"rank {late[0]} on {by_rank[late[0]]['host']}"
        findings.faults.append((late, f"{where}: its clock is {skews[late[0]]:+.1f} s off; start NTP"))


def _compare_links(
    findings: Findings,
    recipe: Recipe,
    device: torch.device,
    by_rank: list[Any],
    group: dist.ProcessGroup | None,
) -> None:
    limits, expert = recipe.preflight, recipe.parallelism.expert
    links = measure_links(device, limits.slow_factor, [one["host"] for one in by_rank], group)
    place, bad = (findings.faults, UNFIT) if limits.stop_on_slow else (findings.warnings, SLOW)
    wanted = f"none {limits.slow_factor:g} times the others'"
    verdict = bad if links.slow_ranks or links.slow_pairs else FIT
    for where, usual in (("inside nodes", links.usual_inside), ("between nodes", links.usual_between)):
        if usual is not None:
            gigabits = 8e-9 * 2 * MESSAGE_BYTES[device.type] / usual
            found = f"{1e3 * usual:.2f} ms there and back, {gigabits:.2f} Gbit/s"
            findings.rows.append(PreflightRow(LINKS, where, found, wanted, verdict))
    for rank in links.slow_ranks:
        took = statistics.median(s for pair, s in links.seconds.items() if rank in pair)
        place.append(
            (
                [rank],
                f"rank {rank} on {by_rank[rank]['host']}: {took / links.usual:.1f} times as slow as usual",
            )
        )
    for one, other in links.slow_pairs:
        times = links.seconds[one, other] / links.usual
        where = f"rank {one} on {by_rank[one]['host']} and rank {other} on {by_rank[other]['host']}"
        place.append(([one, other], f"between {where}: {times:.1f} times as slow as usual"))
    least = limits.expected_gigabits and limits.expected_gigabits / limits.slow_factor
    for name, gigabits in measure_collectives(device, expert, group).items():
        where = f"expert groups of {expert}" if name == ALL_TO_ALL else "all ranks"
        found = f"{gigabits:.2f} Gbit/s"
        if least is None:
            findings.rows.append(PreflightRow(name, where, found, verdict=""))
            continue
        verdict = bad if gigabits < least else FIT
        findings.rows.append(PreflightRow(name, where, found, f"{least:g} Gbit/s", verdict))
        if verdict is bad:
            place.append(([], f"{name}: {gigabits:.2f} Gbit/s, expected {limits.expected_gigabits:g}"))
