"""Checks of one node before a job starts on it: GPUs, links, disk, memory, folders. Needs no torch."""

import itertools
import os
import shutil
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.recipe.errors import UserError
from train.recipe.reliability import Preflight

if TYPE_CHECKING:
    from data.opened import OpenedData

GPU_QUERY = "index,ecc.errors.uncorrected.volatile.total,clocks.max.sm,clocks_throttle_reasons.hw_slowdown"
WRITTEN_BYTES = 1 << 24
LEAST_SHARED_MEMORY_BYTES = 1 << 28
"""Loader workers pass batches through it; a container's default of 64 MB is too little."""
COMMAND_SECONDS = 30
SHARDS = "shards"


@dataclass(frozen=True)
class NodeCheck:
    """The result of one check."""

    name: str
    found: str
    wanted: str = ""
    """The limit, in words."""
    problem: str = ""
    """The problem and its remedy, in one line; empty if there is none."""
    level: float = 0.0
    """Value for comparing nodes: the lowest is the worst."""


def check_node(limits: Preflight, opened: "OpenedData", run_folder: Path, gpus: int) -> list[NodeCheck]:
    """Checks this node.

    Args:
        limits: the recipe's limits.
        opened: the run's data.
        run_folder: folder of the run.
        gpus: GPUs that the job needs per node; 0 for a run on CPUs, which checks neither GPUs nor InfiniBand.
    """
    checks = [
        check_disk(run_folder, limits.least_disk_bytes, limits.least_disk_speed),
        check_shared_memory(Path("/dev/shm")),
        check_shards(opened),
    ]
    if gpus:
        checks += [
            *check_gpus(_output(["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]), gpus),
            check_nvlink(_output(["nvidia-smi", "nvlink", "--status"])),
            check_infiniband(Path("/sys/class/infiniband")),
            check_compiler(),
        ]
    return checks


def check_disk(folder: Path, least_bytes: int, least_speed: float = 0.0) -> NodeCheck:
    """Checks the free space for checkpoints and the write speed for 16 MiB.

    Args:
        folder: the run's folder.
        least_bytes: minimum free bytes.
        least_speed: minimum bytes per second.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize
        probe = folder / f".preflight-{os.uname().nodename}-{os.getpid()}"
        begun = time.perf_counter()
        with probe.open("wb") as stream:
            stream.write(os.urandom(WRITTEN_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        speed = WRITTEN_BYTES / (time.perf_counter() - begun)
        probe.unlink()
    except OSError as error:
        remedy = f"{folder}: {error.strerror}; mount it, or use another runs_dir"
        return NodeCheck("disk", "not writable", problem=remedy, level=-1.0)
    found = f"{free / 1e9:,.0f} GB free, {speed / 1e6:,.0f} MB/s"
    wanted = f"{least_bytes / 1e9:,.0f} GB" + (f", {least_speed / 1e6:,.0f} MB/s" if least_speed else "")
    problem = ""
    if free < least_bytes:
        problem = (
            f"{folder} has {free:,} bytes free, below preflight.least_disk_bytes={least_bytes:,}; "
            "free some space"
        )
    elif speed < least_speed:
        problem = (
            f"{folder} writes {speed:,.0f} bytes/s, below preflight.least_disk_speed={least_speed:,.0f}; "
            "check for a full or failing disk, or a mount over another network"
        )
    return NodeCheck("disk", found, wanted, problem, speed)


def check_shared_memory(folder: Path) -> NodeCheck:
    """Checks the free shared memory."""
    stat = os.statvfs(folder) if folder.is_dir() else None
    free = stat.f_bavail * stat.f_frsize if stat else 0
    problem = ""
    if free < LEAST_SHARED_MEMORY_BYTES:
        problem = (
            f"{folder} has {free / 1e6:.0f} MB free; start the container with --ipc=host or --shm-size=1g"
        )
    wanted = f"{LEAST_SHARED_MEMORY_BYTES / 1e9:.1f} GB"
    return NodeCheck("shared memory", f"{free / 1e9:.1f} GB free", wanted, problem, free)


def check_shards(opened: "OpenedData") -> NodeCheck:
    """Checks that this node can read the shards; shards still to be built or fetched are fine.

    Rank 0 has compared every file with the manifest; here one file of each folder is opened.
    """
    root, data = opened.root, opened.recipe.data
    try:
        manifest = opened.manifest
    except UserError as error:
        is_made_later = data.corpus is not None or data.remote is not None
        problem = "" if is_made_later and not root.exists() else str(error)
        return NodeCheck(SHARDS, "not there yet", problem=problem, level=-1.0)
    try:
        for name, domain in manifest.domains.items():
            # Shards in an object store are fetched when they are read.
            for split in domain.splits if data.remote is None else ():
                for shard in itertools.islice(opened.index(name, split), 1):
                    with shard.path.open("rb") as stream:
                        stream.read(1)
    except (OSError, ValueError, LookupError) as error:
        problem = f"{error}; mount {root} on this node so that it can be read"
        return NodeCheck(SHARDS, "not readable", problem=problem, level=-1.0)
    return NodeCheck(SHARDS, manifest.digest[:12], "the same everywhere")


def check_gpus(listing: str, wanted: int) -> Iterator[NodeCheck]:
    """Checks number, ECC errors and clocks in nvidia-smi's list (not yet run on a GPU)."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.strip()]
    problem = f"{len(rows)} GPUs answer, {wanted} are wanted; drain the node" if len(rows) < wanted else ""
    yield NodeCheck("GPUs", str(len(rows)), str(wanted), problem, len(rows))
    bad = [f"GPU {row[0]}" for row in rows if len(row) > 3 and row[1] not in ("0", "[N/A]")]
    problem = f"{', '.join(bad)}: uncorrected ECC errors; reset the GPU or drain the node" if bad else ""
    yield NodeCheck("ECC", f"{len(bad)} with errors", "0", problem, -len(bad))
    slow = [f"GPU {row[0]}" for row in rows if len(row) > 3 and row[3] == "Active"]
    problem = f"{', '.join(slow)}: throttled by hardware (heat, power); check cooling" if slow else ""
    yield NodeCheck("slowed down", f"{len(slow)} by heat or power", "0", problem, -len(slow))
    yield _check_clocks([(row[0], row[2]) for row in rows if len(row) > 3])


def _check_clocks(clocks: list[tuple[str, str]]) -> NodeCheck:
    """Checks for GPUs whose maximum clock differs from the node's others."""
    usual = Counter(clock for _, clock in clocks).most_common(1)[0][0] if clocks else "none"
    odd = [f"GPU {index} ({clock})" for index, clock in clocks if clock != usual]
    remedy = f"the others have {usual}; another model or a limited clock: drain the node"
    return NodeCheck(
        "GPU clocks", usual, "all equal", f"{', '.join(odd)}: {remedy}" if odd else "", -len(odd)
    )


def check_nvlink(status: str) -> NodeCheck:
    """Checks the links between the node's GPUs in nvidia-smi's list (not yet run on a GPU)."""
    links = [line for line in status.splitlines() if line.strip().startswith("Link")]
    down = [line.strip() for line in links if "inactive" in line.lower()]
    problem = f"{len(down)} of {len(links)} links are down ({down[0]}); drain the node" if down else ""
    up = len(links) - len(down)
    return NodeCheck("NVLink", f"{up} links up", "none down", problem, up)


def check_compiler() -> NodeCheck:
    """Checks that Triton finds what it compiles the launchers of its kernels with: a C compiler and Python.h.

    Without them a run on GPUs raises in its first step: experts, packed documents and loss use its kernels.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # As Triton finds it: Debian's own scheme has another folder.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    lacking = [] if compiler else ["a C compiler (install gcc, or name one in CC)"]
    if not header.is_file():
        lacking.append(f"{header} (install python3-dev, or use a Python that has it)")
    problem = f"Triton needs {' and '.join(lacking)}; or use the image" if lacking else ""
    return NodeCheck("compiler", compiler or "none", "a C compiler and Python.h", problem, -len(lacking))


def check_infiniband(root: Path) -> NodeCheck:
    """Checks that all ports are up, from the kernel's files."""
    states = {
        f"{file.parents[2].name}/{file.parent.name}": file.read_text().strip()
        for file in sorted(root.glob("*/ports/*/state"))
    }
    down = [port for port, state in states.items() if "ACTIVE" not in state]
    problem = f"{', '.join(down)}: down; check cable and switch, or drain the node" if down else ""
    up = len(states) - len(down)
    return NodeCheck("InfiniBand", f"{up} ports up", "none down", problem, up)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
