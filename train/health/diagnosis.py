"""Diagnosis of a hang: finds the ranks that others wait for and that themselves wait for no one.

A rank in collective n of a group waits for the group's ranks that have not issued their n-th. Followed from
rank to rank, this ends at ranks that wait for no one: they are stopped, dead, or busy with something else.
PyTorch's flight-recorder analyzer reads NCCL's records in the same way.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from train.health.heartbeat import Finding, Heartbeat, Stuck, Suspect, ranges, ranks_of

MOST_NAMED = 8
"""Groups that a finding describes, and ranks that it names of each."""


def diagnose(
    stuck: Mapping[int, Stuck], beats: Mapping[int, Heartbeat], silent: set[int], now: float, seconds: float
) -> Finding:
    """Names the ranks that hold up the others.

    Args:
        stuck: the record of each rank that noticed the hang, by rank.
        beats: the last heartbeat of each rank.
        silent: ranks without a new heartbeat.
        now: seconds since 1970.
        seconds: how long nothing has progressed.
    """
    batch = max((record.batch for record in stuck.values()), default=0)
    waiting = sorted(rank for rank, record in stuck.items() if record.waiting)
    collective = _oldest(stuck)
    suspects = _mismatched(stuck) or _blockers(stuck, beats, silent)
    if not waiting and not suspects:
        suspects = [_suspect(rank, stuck, beats, silent) for rank in sorted(stuck)]
    return Finding(now, batch, seconds, collective, waiting, suspects, _recorded(stuck))


def _blockers(stuck: Mapping[int, Stuck], beats: Mapping[int, Heartbeat], silent: set[int]) -> list[Suspect]:
    """Ranks that others wait for and that wait for no one."""
    late: dict[tuple[Any, ...], set[int]] = {}
    needs = {rank: _waits_for(record, stuck, late) for rank, record in stuck.items()}
    wanted = set().union(*needs.values()) if needs else set()
    return [_suspect(rank, stuck, beats, silent) for rank in sorted(wanted) if not needs.get(rank)]


def _waits_for(record: Stuck, stuck: Mapping[int, Stuck], late: dict[tuple[Any, ...], set[int]]) -> set[int]:
    """Ranks that have not issued a collective that a rank waits in, of each group the oldest.

    A GPU runs a group's collectives one after the other. Its host is ahead, each by another number of them: a
    rank that has not issued a later one yet is not what the GPUs wait for.

    Args:
        record: the rank that waits.
        stuck: all records.
        late: what was found for collectives so far; all of a group's ranks wait for the same ones.
    """
    found: set[int] = set()
    for collective in _oldest_by_group(record):
        group, number = collective["group"], collective["number"]
        key = (group, number, *map(tuple, record.groups[group]))
        if key not in late:
            others = {rank: stuck.get(rank) for rank in ranks_of(record.groups[group])}
            late[key] = {
                rank for rank, other in others.items() if other is None or other.issued.get(group, 0) < number
            }
        found |= late[key]
    return found


def _mismatched(stuck: Mapping[int, Stuck]) -> list[Suspect]:
    """Ranks that issued another collective than the others under the same number."""
    calls: dict[tuple[str, int], dict[int, Any]] = {}
    for rank, record in stuck.items():
        for each in record.waiting:
            calls.setdefault((each["group"], each["number"]), {})[rank] = each["operation"]
    for (group, number), operations in sorted(calls.items()):
        usual = statistics.mode(operations.values())
        odd = [rank for rank, operation in operations.items() if operation != usual]
        if odd:
            return [
                Suspect(
                    rank,
                    stuck[rank].host,
                    f"calls {operations[rank]} where others call {usual} (number {number} of group {group})",
                    stuck[rank].stacks,
                )
                for rank in odd
            ]
    return []


def _suspect(
    rank: int, stuck: Mapping[int, Stuck], beats: Mapping[int, Heartbeat], silent: set[int]
) -> Suspect:
    if rank in stuck:
        record = stuck[rank]
        what = "is in no collective"
        if record.waiting:
            what = "waits in collectives that all their ranks have issued"
        return Suspect(rank, record.host, f"{what} (last seen in: {record.where})", record.stacks)
    beat = beats.get(rank)
    if beat is None:
        return Suspect(rank, "an unknown host", "has never sent a heartbeat")
    if rank in silent:
        return Suspect(rank, beat.host, f"has stopped sending heartbeats (last seen in: {beat.where})")
    return Suspect(rank, beat.host, f"continues without the others (in: {beat.where})")


def _oldest_by_group(record: Stuck) -> list[dict[str, Any]]:
    """Of each group, the oldest collective that a rank waits in."""
    found: dict[str, dict[str, Any]] = {}
    for each in record.waiting:
        group = each["group"]
        if group not in found or each["number"] < found[group]["number"]:
            found[group] = each
    return list(found.values())


def _recorded(stuck: Mapping[int, Stuck]) -> list[str]:
    """The ranks' collectives: a line for each group that is waited in, the longest wait first."""
    waits: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for rank, record in sorted(stuck.items()):
        for each in _oldest_by_group(record):
            key = (each["group"], *map(tuple, record.groups[each["group"]]))
            waits.setdefault(key, {})[rank] = each
    longest_first = sorted(waits.items(), key=lambda item: min(each["since"] for each in item[1].values()))
    return [_line(key, found, stuck) for key, found in longest_first[:MOST_NAMED]]


def _line(key: tuple[Any, ...], waits: dict[int, dict[str, Any]], stuck: Mapping[int, Stuck]) -> str:
    """Describes what a group waits in.

    Args:
        key: the group's name and its ranks as runs.
        waits: the oldest collective of each rank that waits in the group.
        stuck: all records.
    """
    group, *written = key
    members = ranks_of(written)
    first = min(waits.values(), key=lambda each: each["number"])
    late = {rank: stuck[rank].issued.get(group, 0) if rank in stuck else None for rank in members}
    late = {rank: last for rank, last in late.items() if last is None or last < first["number"]}
    named = [f"{rank} (last: {'unknown' if last is None else last})" for rank, last in late.items()]
    return (
        f"group {group} of ranks {ranges(members)}: {first['operation']} of {first['size_bytes']:,} bytes, "
        f"number {first['number']}: ranks {ranges(sorted(waits))} wait; "
        + (f"not issued by {', '.join(named[:MOST_NAMED])}" if named else "issued by all")
    )


def _oldest(stuck: Mapping[int, Stuck]) -> str:
    """The collective that has been pending for the longest time."""
    waits = [each for record in stuck.values() for each in record.waiting]
    if not waits:
        return ""
    first = min(waits, key=lambda each: each["since"])
    return (
        f"{first['operation']} of {first['size_bytes']:,} bytes "
        f"(number {first['number']} of group {first['group']})"
    )
