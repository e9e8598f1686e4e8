"""Hosts that computed wrongly: recorded when they are found, refused by every later start. Needs no torch."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from train.health.heartbeat import Failure, failure_file, write_record
from train.recipe.exit_status import UNFIT_STATUS
from train.recipe.topology import Topology
from train.record import log
from train.record.files import write_whole
from train.record.process import host_name

logger = log.get_logger(__name__)

EXCLUDED_FILE = "excluded-hosts.json"
"""Hosts and why, in the folder of the ranks' records; no try removes it."""
CORRUPTION_FILE = "corruption.jsonl"
"""All that rechecks have found, a line each."""


def excluded_hosts(folder: Path) -> dict[str, str]:
    """Returns the excluded hosts of a job and why; none if there is no such file or it can't be read."""
    try:
        tree = json.loads((folder / EXCLUDED_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return {str(host): str(why) for host, why in tree.items()} if isinstance(tree, dict) else {}


def refuse_excluded(folder: Path, topology: Topology) -> None:
    """Ends this rank if its host is excluded.

    Args:
        folder: of the ranks' records.
        topology: this rank.

    Raises:
        SystemExit: with status 78.
    """
    host = host_name()
    why = excluded_hosts(folder).get(host)
    if why is None:
        return
    remedy = f"give the job another, or remove {folder / EXCLUDED_FILE} once it is checked"
    line = f"{host} is excluded: {why}; {remedy}"
    _blame(folder, topology, 0, f"ExcludedError: {line}", host)
    logger.error(line, extra=log.ALL_RANKS)
    raise SystemExit(UNFIT_STATUS)


def report_corruption(
    folder: Path,
    topology: Topology,
    batch: int,
    line: str,
    suspects: Mapping[int, str],
    *,
    is_persistent: bool,
) -> None:
    """Records what a recheck found; every rank calls it. A host that does it again and again is excluded.

    Args:
        folder: of the ranks' records.
        topology: this rank.
        batch: batches trained before.
        line: the finding.
        suspects: ranks that it may have been, each with its host. Of several hosts none is excluded, since
            most of them would be sound.
        is_persistent: False: training continues.
    """
    hosts = sorted(set(suspects.values()))
    line = f"{line} on {', '.join(hosts) or 'an unknown host'}"
    if topology.is_main:
        logger.warning(line)
        found = {"time": time.time(), "batch": batch, "line": line, "ranks": list(suspects), "hosts": hosts}
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / CORRUPTION_FILE).open("a") as file:
                file.write(json.dumps(found | {"persistent": is_persistent}) + "\n")
            if is_persistent and len(hosts) == 1:
                excluded = excluded_hosts(folder) | {hosts[0]: line}
                write_whole(folder / EXCLUDED_FILE, json.dumps(excluded, indent=1) + "\n")
    if is_persistent and topology.rank in (suspects or (0,)):
        _blame(folder, topology, batch, f"CorruptionError: {line}", ", ".join(hosts))


def _blame(folder: Path, topology: Topology, batch: int, error: str, host: str) -> None:
    """Records why this rank ends, for whoever starts the job again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(failure_file(folder, topology.rank), Failure(topology.rank, host, time.time(), batch, error))
