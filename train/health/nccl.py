"""NCCL's collectives, read from torch's flight recorder in C++: nothing is wrapped and no handle is kept.

The recorder keeps TORCH_NCCL_TRACE_BUFFER_SIZE collectives per rank, none by default;
:func:`keep_collectives` sets it, before the process group is created.
"""

import json
import math
import os
from typing import Any

import torch
import torch.distributed as dist

from train.health.snapshot import IssuedCollective, Snapshot

DTYPE_BYTES = {
    "Bool": 1,
    "Byte": 1,
    "Char": 1,
    "Short": 2,
    "Half": 2,
    "BFloat16": 2,
    "Int": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
}
"""Bytes per element by the recorder's name of its type; other types count as 0."""


KEPT_COLLECTIVES = 2000
"""Collectives that the recorder keeps per rank, unless the environment says otherwise."""


def keep_collectives() -> None:
    """Makes the recorder keep collectives; has no effect once the process group exists."""
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(KEPT_COLLECTIVES))


class NcclRecorder:
    """This process's collectives in torch's flight recorder."""

    def progress(self) -> int:
        """Returns the number of collectives enqueued, started and completed, over all groups."""
        status: dict[str, dict[str, int | str]] = json.loads(nccl_trace(entries=False) or "{}").get(
            "pg_status", {}
        )
        # torch 2.15 writes them as strings.
        return sum(int(count) for counts in status.values() for count in counts.values())

    def snapshot(self) -> Snapshot:
        """Returns everything in the recorder."""
        return read_trace(nccl_trace())


def nccl_trace(entries: bool = True) -> str:
    """Returns the flight recorder as JSON; empty if torch has none.

    Args:
        entries: include the collectives, not only counts by group; this asks the GPU which are complete.
    """
    # No version up to 2.15 has a public call; torch without NCCL lacks them.
    calls, which = torch._C._distributed_c10d, {}
    dump, name = getattr(calls, "_dump_nccl_trace_json", None), implementation()
    if name not in ("", "nccl"):
        dump, which = getattr(calls, "_dump_fr_trace_json", None), {"backend": name}
    if dump is None:
        return ""
    text = dump(includeCollectives=entries, onlyActive=False, **which)
    return text.decode() if isinstance(text, bytes) else str(text)


def implementation() -> str:
    """Returns torch's name for what "nccl" is, each of which has its own recorder; empty if there is none.

    torch 2.15 has a second implementation, `nccl2`, and takes it unless TORCH_DIST_USE_NCCL2 is 0.
    """
    if not dist.is_initialized():
        return ""
    group = dist.group.WORLD
    assert group is not None
    try:
        return str(group._get_backend(torch.device("cuda")).name())
    except RuntimeError:  # none for that device
        return ""


def read_trace(text: str) -> Snapshot:
    """Converts a trace to a snapshot. All ranks of a group number its collectives alike."""
    trace = json.loads(text or "{}")
    ranks = {group["name"]: _ranks(group["ranks"]) for group in trace.get("pg_config", {}).values()}
    issued: dict[str, int] = {}
    waiting = []
    for entry in trace.get("entries", []):
        if entry.get("is_p2p"):  # counted separately, by pairs of ranks
            continue
        collective = _collective(entry)
        group = collective.group
        issued[group] = max(issued.get(group, 0), collective.number)
        if entry["state"] != "completed":
            waiting.append(collective)
            ranks.setdefault(group, [])
    return Snapshot(issued, ranks, waiting, text)


def _collective(entry: dict[str, Any]) -> IssuedCollective:
    sizes = [
        sum(
            math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
            for shape, dtype in zip(entry[f"{side}_sizes"], entry[f"{side}_dtypes"], strict=False)
        )
        for side in ("input", "output")
    ]
    return IssuedCollective(
        group=entry["process_group"][0],
        number=entry["collective_seq_id"],
        operation=entry["profiling_name"].partition(":")[2],
        size_bytes=max(sizes),
        since=entry["time_created_ns"] / 1e9,
    )


def _ranks(listed: str | list[int]) -> list[int]:
    """Parses the ranks of a group; torch writes the list as a string within JSON."""
    return json.loads(listed) if isinstance(listed, str) else listed
