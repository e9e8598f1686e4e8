"""How ranks come together: who has not come is named, and process groups wait longer than the watchdog."""

import datetime
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from composer.devices import Device
from composer.utils import dist as composer_dist

from train.exit_status import UNFIT_STATUS
from train.schema import Recipe
from train.topology import Topology
from train.watch.records import (
    RECORDS_VARIABLE,
    Beat,
    Failure,
    beat_file,
    failure_file,
    host_name,
    pid_space,
    ranges,
    read_records,
    records_folder,
    write_record,
)


def join(recipe: Recipe, device: Device, topology: Topology) -> None:
    """Joins the job's process group.

    Under a supervisor each rank leaves a sign of life first, so that those that never came can be told.

    Raises:
        SystemExit: with status 78 if ranks have not come within `watch.start_seconds`.
    """
    folder = records_folder(Path(recipe.runs_dir) / recipe.name)
    is_supervised = bool(os.environ.get(RECORDS_VARIABLE))
    if is_supervised:
        folder.mkdir(parents=True, exist_ok=True)
        run, now = str(Path(recipe.runs_dir) / recipe.name), time.time()
        beat = Beat(topology.rank, host_name(), os.getpid(), pid_space(), 0, now, "joining the job", 0, run)
        write_record(beat_file(folder, topology.rank), beat)
    seconds = recipe.watch.start_seconds
    try:
        composer_dist.initialize_dist(device, timeout=seconds)
    except RuntimeError as error:
        came = {beat.rank for beat in read_records(folder, "beat-*.json", Beat)}
        missing = [rank for rank in range(topology.world_size) if rank not in came]
        who = f": ranks {ranges(missing)}" if is_supervised and missing else ""
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        line = (
            f"JoinError: not all {topology.world_size} ranks have come within {seconds:.0f} s{who}; look at "
            f"the logs of their nodes, and whether all nodes reach {address} (--interface)"
        )
        print(f"{line} ({' '.join(str(error).split())[:200]})", file=sys.stderr, flush=True)
        if is_supervised:
            failure = Failure(topology.rank, host_name(), time.time(), 0, line)
            write_record(failure_file(folder, topology.rank), failure)
        raise SystemExit(UNFIT_STATUS) from None


def outlast_watchdog(recipe: Recipe) -> None:
    """Lets every process group of this rank wait longer than the watchdog, which knows more than they do.

    NCCL's groups would give up after 10 minutes by default, and abort the process before anybody is named.
    """
    watch = recipe.watch
    patience = datetime.timedelta(seconds=2 * max(watch.hang_seconds or 0.0, watch.start_seconds))
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(patience, group)
