"""What one node must have before a job starts on it: GPUs, links, disk, memory, folders. Needs no torch."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.manifest import read_manifest
from train.recipe import RecipeError
from train.schema import Recipe

GPU_QUERY = "index,ecc.errors.uncorrected.volatile.total,clocks.max.sm,clocks_throttle_reasons.hw_slowdown"
WRITTEN_BYTES = 1 << 24
LEAST_SHARED_MEMORY_BYTES = 1 << 28
"""Loader workers hand batches over through it; a container's default of 64 MB is too little."""
COMMAND_SECONDS = 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    fault: str = ""
    """What is wrong and what to do, in one line; empty if nothing is."""


def check_node(recipe: Recipe, run_folder: Path, gpus: int) -> list[Check]:
    """Looks at this node.

    Args:
        recipe: the run's.
        run_folder: folder of the run.
        gpus: that the job wants on each node; 0 for a run on CPUs, where no GPU or InfiniBand is looked for.
    """
    checks = [
        check_disk(run_folder, recipe.preflight.least_disk_bytes),
        check_shared_memory(Path("/dev/shm")),
        check_shards(recipe),
    ]
    if gpus:
        checks += [
            *check_gpus(_output(["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]), gpus),
            check_nvlink(_output(["nvidia-smi", "nvlink", "--status"])),
            check_infiniband(Path("/sys/class/infiniband")),
        ]
    return checks


def check_disk(folder: Path, least_bytes: int) -> Check:
    """Room for checkpoints, and how fast 16 MiB get there."""
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
        return Check(
            "disk", "not writable", f"{folder}: {error.strerror}; mount it, or give another runs_dir"
        )
    found = f"{free / 1e9:,.0f} GB free, {speed / 1e6:,.0f} MB/s"
    fault = ""
    if free < least_bytes:
        fault = (
            f"{folder} has {free:,} bytes free, below preflight.least_disk_bytes={least_bytes:,}; make room"
        )
    return Check("disk", found, fault)


def check_shared_memory(folder: Path) -> Check:
    """Room in shared memory."""
    stat = os.statvfs(folder) if folder.is_dir() else None
    free = stat.f_bavail * stat.f_frsize if stat else 0
    fault = ""
    if free < LEAST_SHARED_MEMORY_BYTES:
        fault = f"{folder} has {free / 1e6:.0f} MB free; start the container with --ipc=host or --shm-size=1g"
    return Check("shared memory", f"{free / 1e9:.1f} GB", fault)


def check_shards(recipe: Recipe) -> Check:
    """Whether this node reads the shards; those that are still to be built or fetched are no fault."""
    root = Path(recipe.data.shards)
    try:
        manifest = read_manifest(root)
    except RecipeError as error:
        is_made_later = recipe.data.corpus is not None or recipe.data.remote is not None
        return Check("shards", "not there yet", "" if is_made_later and not root.exists() else str(error))
    return Check("shards", f"{manifest.digest[:12]}")


def check_gpus(listing: str, wanted: int) -> Iterator[Check]:
    """Number, ECC errors and clocks, from nvidia-smi's list (not yet run on a GPU)."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.strip()]
    fault = f"{len(rows)} GPUs answer, {wanted} are wanted; drain the node" if len(rows) < wanted else ""
    yield Check("GPUs", str(len(rows)), fault)
    bad = [f"GPU {row[0]}" for row in rows if len(row) > 3 and row[1] not in ("0", "[N/A]")]
    fault = f"{', '.join(bad)}: uncorrected ECC errors; reset the GPU or drain the node" if bad else ""
    yield Check("ECC", f"{len(bad)} with errors", fault)
    slow = [f"GPU {row[0]}" for row in rows if len(row) > 3 and row[3] == "Active"]
    fault = f"{', '.join(slow)}: slowed down by its hardware (heat, power); check cooling" if slow else ""
    yield Check("clocks", f"{len(slow)} slowed down", fault)


def check_nvlink(status: str) -> Check:
    """Links between the node's GPUs, from nvidia-smi's list (not yet run on a GPU)."""
    links = [line for line in status.splitlines() if line.strip().startswith("Link")]
    down = [line.strip() for line in links if "inactive" in line.lower()]
    fault = f"{len(down)} of {len(links)} links are down ({down[0]}); drain the node" if down else ""
    return Check("NVLink", f"{len(links) - len(down)} links up", fault)


def check_infiniband(root: Path) -> Check:
    """Ports that are up, from the kernel's files."""
    states = {
        f"{file.parents[2].name}/{file.parent.name}": file.read_text().strip()
        for file in sorted(root.glob("*/ports/*/state"))
    }
    down = [port for port, state in states.items() if "ACTIVE" not in state]
    fault = f"{', '.join(down)}: down; check cable and switch, or drain the node" if down else ""
    return Check("InfiniBand", f"{len(states) - len(down)} ports up", fault)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
