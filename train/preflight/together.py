"""The whole check before a job: each node by itself, then what all ranks must agree on, then the links."""

import hashlib
import secrets
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train import provenance
from train.fault_schema import Preflight, PreflightWhen
from train.preflight.links import measure_collectives, measure_links
from train.preflight.node import Check, check_node
from train.recipe import to_yaml
from train.schema import Recipe
from train.topology import Topology
from train.watch.records import host_name

TOKEN_FILE = ".preflight-token"


@dataclass
class Findings:
    """What preflight came to, equal on all ranks."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """Check, where, what was found."""
    faults: list[tuple[list[int], str]] = field(default_factory=list)
    """Ranks that are to blame, and why in one line: the job must not start."""
    warnings: list[tuple[list[int], str]] = field(default_factory=list)
    """The same for what only slows it down."""


def is_wanted(recipe: Preflight, topology: Topology) -> bool:
    """Whether a run begins with preflight."""
    if recipe.when is PreflightWhen.multi_node:
        return topology.world_size > topology.local_world_size
    return recipe.when is PreflightWhen.always


def preflight(recipe: Recipe, run_folder: Path, topology: Topology, device: torch.device) -> Findings:
    """Checks everything; every rank calls it, in the process group that the job will use."""
    findings, limits = Findings(), recipe.preflight
    gpus = topology.local_world_size if device.type == "cuda" else 0
    # One rank of a node looks at the node.
    checks = check_node(recipe, run_folder, gpus) if topology.local_rank == 0 else []
    host = host_name()
    token = secrets.token_hex(8)
    said = gather({"host": host, "checks": checks, "token": token}, topology)
    for rank, one in enumerate(said):
        for check in one["checks"]:
            assert isinstance(check, Check)
            findings.rows.append((check.name, one["host"], check.found))
            if check.fault:
                findings.faults.append(([rank], f"{one['host']}: {check.name}: {check.fault}"))
    _agree(findings, recipe, topology, said)
    _share_folder(findings, run_folder, topology, said)
    if topology.world_size > 1:
        _compare_clocks(findings, limits, topology, said)
        _compare_links(findings, limits, device, said)
    return findings


def gather(mine: Any, topology: Topology) -> list[Any]:
    """What every rank has to say, by rank."""
    if topology.world_size == 1:
        return [mine]
    said: list[Any] = [None] * topology.world_size
    dist.all_gather_object(said, mine)
    return said


def _agree(findings: Findings, recipe: Recipe, topology: Topology, said: list[Any]) -> None:
    """Recipe, code and packages must be the same on all ranks."""
    mine = {
        "recipe": hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12],
        "code": provenance.git_commit(),
        **provenance.package_versions(),
    }
    everybody = gather(mine, topology)
    for name in mine:
        values = Counter(one.get(name) for one in everybody)
        usual = values.most_common(1)[0][0]
        odd = [rank for rank, one in enumerate(everybody) if one.get(name) != usual]
        if name in ("recipe", "code"):
            findings.rows.append((name, "all ranks", str(usual)))
        if odd:
            where = f"rank {odd[0]} on {said[odd[0]]['host']}"
            line = f"{where}: {name} is {everybody[odd[0]].get(name)}, elsewhere {usual}; install the same"
            findings.faults.append((odd, line))


def _share_folder(findings: Findings, run_folder: Path, topology: Topology, said: list[Any]) -> None:
    """Whether all ranks see in the run's folder what rank 0 writes there."""
    file, token = run_folder / TOKEN_FILE, said[0]["token"]
    if topology.is_main:
        try:
            file.write_text(token)
        except OSError:
            # The node's own check says why.
            token = ""
    gather(True, topology)
    sees = gather(_reads(file, token), topology)
    blind = [rank for rank, does in enumerate(sees) if not does]
    findings.rows.append(
        ("checkpoint folder", "all ranks", f"seen by {len(sees) - len(blind)} of {len(sees)}")
    )
    if blind:
        where = f"rank {blind[0]} on {said[blind[0]]['host']}"
        line = f"{where}: does not see what rank 0 wrote to {run_folder}; mount one file system on all nodes"
        findings.faults.append((blind, line))
    if topology.is_main:
        file.unlink(missing_ok=True)


def _reads(file: Path, token: str) -> bool:
    try:
        return file.read_text() == token
    except OSError:
        return False


def _compare_clocks(findings: Findings, limits: Preflight, topology: Topology, said: list[Any]) -> None:
    """Clocks read just after a barrier, the median of several."""
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
    findings.rows.append(("clocks", "all ranks", f"within {abs(skews[worst]):.3f} s"))
    late = [rank for rank, skew in enumerate(skews) if abs(skew) > limits.most_skew_seconds]
    if late:
        where = f"rank {late[0]} on {said[late[0]]['host']}"
        findings.faults.append((late, f"{where}: its clock is {skews[late[0]]:+.1f} s off; start NTP"))


def _compare_links(findings: Findings, limits: Preflight, device: torch.device, said: list[Any]) -> None:
    links = measure_links(device, limits.slow_factor)
    usual = links.usual
    findings.rows.append(("links", f"{len(links.seconds)} pairs", f"{1e3 * usual:.2f} ms there and back"))
    place = findings.faults if limits.stop_on_slow else findings.warnings
    for rank in links.slow_ranks:
        took = statistics.median(s for pair, s in links.seconds.items() if rank in pair)
        place.append(
            ([rank], f"rank {rank} on {said[rank]['host']}: {took / usual:.1f} times as slow as usual")
        )
    for one, other in links.slow_pairs:
        times = links.seconds[one, other] / usual
        where = f"rank {one} on {said[one]['host']} and rank {other} on {said[other]['host']}"
        place.append(([one, other], f"between {where}: {times:.1f} times as slow as usual"))
    for name, gigabits in measure_collectives(device).items():
        findings.rows.append((name, "all ranks", f"{gigabits:.2f} Gbit/s"))
        if limits.expected_gigabits is not None and gigabits < limits.expected_gigabits / limits.slow_factor:
            place.append(([], f"{name}: {gigabits:.2f} Gbit/s, expected {limits.expected_gigabits:g}"))
