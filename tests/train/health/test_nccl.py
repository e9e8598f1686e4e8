"""NCCL's flight recorder is read into the same snapshot as the record of gloo's collectives."""

import json
from typing import Any

import pytest

from train.health import nccl
from train.health.diagnosis import diagnose
from train.health.heartbeat import Stuck, runs
from train.health.nccl import NcclRecorder, nccl_trace, read_trace
from train.health.snapshot import IssuedCollective


def entry(number: int, state: str, group: str = "0", **other: Any) -> dict[str, Any]:
    """A collective in torch 2.7's format."""
    return {
        "record_id": number,
        "pg_id": 0,
        "process_group": [group, "default_pg"],
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": "nccl:all_reduce",
        "time_created_ns": 1_500_000_000,
        "input_sizes": [[4, 2]],
        "input_dtypes": ["BFloat16"],
        "output_sizes": [[4, 2], [3]],
        "output_dtypes": ["BFloat16", "Float"],
        "state": state,
        "retired": state == "completed",
        "timeout_ms": 600_000,
        "is_p2p": False,
    } | other


def trace(*entries: dict[str, Any], number: type = int) -> str:
    return json.dumps(
        {
            "version": "2.4",
            "nccl_comm_state": {},
            "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}},
            "pg_status": {
                "0": {
                    "last_enqueued_collective": number(7),
                    "last_started_collective": number(-1),
                    "last_completed_collective": number(5),
                }
            },
            "entries": entries,
        }
    )


def test_a_trace_tells_what_is_issued_and_what_is_waited_in() -> None:
    text = trace(
        entry(5, "completed"),
        entry(6, "started", profiling_name="nccl:_all_gather_base"),
        entry(7, "scheduled", profiling_name="nccl2:all_reduce"),
        entry(2, "completed", group="3"),
        entry(0, "scheduled", is_p2p=True, profiling_name="nccl:send 0->1"),
    )
    found = read_trace(text)
    assert found.issued == {"0": 7, "3": 2}
    assert found.ranks == {"0": [0, 1]}
    assert found.waiting == [
        IssuedCollective("0", 6, "_all_gather_base", 28, 1.5),
        IssuedCollective("0", 7, "all_reduce", 28, 1.5),
    ]
    assert found.trace == text


def test_a_rank_that_did_not_issue_what_others_wait_in_is_named() -> None:
    stuck = {}
    for rank, entries in enumerate(([entry(6, "completed"), entry(7, "started")], [entry(6, "completed")])):
        known = read_trace(trace(*entries))
        waiting = [vars(each) for each in known.waiting]
        groups = {name: runs(ranks) for name, ranks in known.ranks.items()}
        stuck[rank] = Stuck(rank, f"host{rank}", 3, "update", known.issued, groups, waiting, "")
    finding = diagnose(stuck, {}, set(), 0.0, 10.0)
    assert [suspect.rank for suspect in finding.suspects] == [1] and finding.waiting == [0]
    assert finding.collective == "all_reduce of 28 bytes (number 7 of group 0)"


@pytest.mark.parametrize("number", [int, str])
def test_progress_is_the_groups_counts(number: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """As numbers in torch 2.7, in strings in 2.15."""
    monkeypatch.setattr(nccl, "nccl_trace", lambda entries=True: trace(number=number))
    assert NcclRecorder().progress() == 7 - 1 + 5


def test_a_group_that_is_waited_in_has_ranks_even_where_the_trace_has_lost_them() -> None:
    assert read_trace(trace(entry(1, "started", group="9"))).ranks["9"] == []


def test_torchs_own_record_can_be_read_where_nothing_was_sent() -> None:
    """The pinned torch is built with NCCL, so the call and its format are real; on a CPU it is empty."""
    assert {"pg_config", "pg_status"} <= json.loads(nccl_trace()).keys()
    assert NcclRecorder().progress() == 0
    assert NcclRecorder().snapshot().waiting == []
