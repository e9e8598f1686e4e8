"""Joining the process group: names missing ranks, and makes process groups time out after the watchdog."""

import datetime
import os
import time
from pathlib import Path

import torch.distributed as dist
from composer.devices import Device
from composer.utils import dist as composer_dist

from train.health.heartbeat import (
    Heartbeat,
    heartbeat_file,
    is_supervised,
    ranges,
    read_records,
    record_failure,
    records_folder,
    write_record,
)
from train.health.nccl import keep_collectives
from train.recipe.exit_status import UNFIT_STATUS
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record import log
from train.record.process import host_name, pid_space

logger = log.get_logger(__name__)

SHARE_OF_TIMEOUT = 0.9
"""Failures before this share of the timeout are not timeouts: a port that is taken, for example."""


class JoinError(RuntimeError):
    """Ranks of the job have not joined: recorded by this name for the supervisor, never raised."""


def join(recipe: Recipe, device: Device, topology: Topology) -> None:
    """Joins the job's process group.

    Under a supervisor each rank writes a heartbeat first, so that missing ranks can be named.

    Raises:
        SystemExit: with status 78 if ranks have not joined within `watch.start_seconds`.
        RuntimeError: for errors that occur at once.
    """
    run = Path(recipe.runs_dir) / recipe.name
    folder, seconds = records_folder(run), recipe.watch.start_seconds
    if is_supervised():
        folder.mkdir(parents=True, exist_ok=True)
        host, pid, where = host_name(), os.getpid(), "joining the job"
        beat = Heartbeat(topology.rank, host, pid, pid_space(), 0, time.time(), where, 0, str(run))
        write_record(heartbeat_file(folder, topology.rank), beat)
    if recipe.watch.hang_seconds is not None:
        keep_collectives()
    begun = time.monotonic()
    try:
        composer_dist.initialize_dist(device, timeout=seconds)
    except RuntimeError as error:
        has_waited = time.monotonic() - begun > SHARE_OF_TIMEOUT * seconds
        failure = JoinError(missing_line(folder, topology, seconds)) if has_waited else error
        if is_supervised():
            record_failure(folder, topology, 0, failure)
        if not has_waited:
            raise
        logger.error(f"{failure} ({' '.join(str(error).split())[:200]})", extra=log.ALL_RANKS)
        raise SystemExit(UNFIT_STATUS) from None


def hosts_of_ranks(topology: Topology) -> list[str]:
    """Returns every rank's host; every rank calls it."""
    hosts = [host_name()] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(hosts, host_name())
    return hosts


def missing_line(folder: Path, topology: Topology, seconds: float) -> str:
    """Returns the message that names the missing ranks, as far as the records tell."""
    came = {beat.rank for beat in read_records(folder, "beat-*.json", Heartbeat)}
    missing = [rank for rank in range(topology.world_size) if rank not in came]
    who = f": ranks {ranges(missing)}" if is_supervised() and missing else ""
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (
        f"not all {topology.world_size} ranks have come within {seconds:.0f} s{who}; check the logs of "
        f"their nodes, and that all nodes reach {address} (--interface)"
    )


def outlast_watchdog(recipe: Recipe) -> None:
    """Makes every process group of this rank time out after the watchdog, whose report says more.

    By default NCCL's groups time out after 10 minutes and abort the process before any rank is named.
    """
    watch = recipe.watch
    timeout = datetime.timedelta(seconds=2 * max(watch.hang_seconds or 0.0, watch.start_seconds))
    # torch 2.7 has no public call; no version has a public list of all groups.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in dist.distributed_c10d._world.pg_map:
        set_timeout(timeout, group)
