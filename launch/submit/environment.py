"""Environment of every rank: NCCL, InfiniBand, memory, and why each variable is set; the one place for it.

Meanings are those of NCCL's user guide (Environment Variables) and of torch 2.7.0's documentation of
ProcessGroupNCCL and of the caching allocator. What is not here is left at its default.
"""

from dataclasses import dataclass

from launch.submit.job import Device, Job
from train.health.heartbeat import RECORDS_VARIABLE


@dataclass(frozen=True)
class Variable:
    """A variable that every rank gets."""

    name: str
    value: str
    reason: str
    device: Device | None = Device.cuda
    """Set where ranks compute on it; None: on any."""


TABLE = (
    Variable("NCCL_DEBUG", "WARN", "NCCL says which peer and which card failed; silent while nothing does"),
    Variable(
        "NCCL_IB_TIMEOUT",
        "22",
        "4.1 us x 2^22 = 17 s per try: a link that comes up again does not end a job of thousands",
    ),
    Variable("NCCL_IB_RETRY_CNT", "7", "tries before a link counts as lost: with the time-out, two minutes"),
    Variable(
        "NCCL_CROSS_NIC",
        "0",
        "a ring stays on one rail: GPU i talks to GPU i of other nodes through the same leaf switch",
    ),
    Variable(
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "2000",
        "flight recorder: the last collectives of each rank, which the watchdog reads when a rank hangs",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "dropless experts get another number of rows each step, which splinters fixed segments",
    ),
    Variable(
        "OMP_NUM_THREADS", "8", "8 ranks x 8 threads on a node of 96 cores or more leaves room for loaders"
    ),
    Variable("OMP_NUM_THREADS", "1", "ranks on CPUs share the cores", Device.cpu),
    Variable("PYTHONUNBUFFERED", "1", "the last line before a crash is in the log", None),
    Variable("PYTHONFAULTHANDLER", "1", "a crash in C prints the Python stack of each thread", None),
    Variable("HF_HUB_OFFLINE", "1", "thousands of ranks never ask a hub at once; all files are local", None),
)


def environment(job: Job) -> dict[str, str]:
    """Every variable of a job's ranks; what the user gave wins."""
    found = {v.name: v.value for v in TABLE if v.device in (None, job.device)}
    if job.interface:
        # Rendezvous and gloo: a host name that resolves to 127.0.1.1 would keep nodes from meeting.
        found |= {"NCCL_SOCKET_IFNAME": job.interface, "GLOO_SOCKET_IFNAME": job.interface}
    return found | job.environment


def look_back_environment(job: Job) -> dict[str, str]:
    """What launch/submit/node.sh reads under systems that restart jobs by themselves."""
    return {"LOOK_BACK": "yes", RECORDS_VARIABLE: job.records} if job.records else {}


def describe() -> str:
    """The table, for `--environment` and for the docs."""
    rows = [(v.name, v.value, v.reason) for v in TABLE]
    return "\n".join(
        ["| variable | value | reason |", "|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows)]
    )
