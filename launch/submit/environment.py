"""Environment of every rank: NCCL, InfiniBand and memory variables, with the reason for each.

Meanings are those of NCCL's user guide (Environment Variables) and of torch 2.7.0's documentation of
ProcessGroupNCCL and of the caching allocator. Variables not listed here keep their defaults.
"""

from dataclasses import dataclass

from launch.submit.job import Device, Job
from train.health.heartbeat import RECORDS_VARIABLE


@dataclass(frozen=True)
class Variable:
    """An environment variable of every rank."""

    name: str
    value: str
    reason: str
    device: Device | None = Device.cuda
    """The device of the ranks that get it; None: any."""


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
    """Returns the environment of a job's ranks; the user's own variables take precedence."""
    found = {v.name: v.value for v in TABLE if v.device in (None, job.device)}
    if job.interface:
        # Rendezvous and gloo: nodes cannot connect to a host name that resolves to 127.0.1.1.
        found |= {"NCCL_SOCKET_IFNAME": job.interface, "GLOO_SOCKET_IFNAME": job.interface}
    return found | job.environment


def look_back_environment(job: Job) -> dict[str, str]:
    """Returns the variables of launch/submit/node.sh for systems that restart jobs by themselves."""
    return {"LOOK_BACK": "yes", RECORDS_VARIABLE: job.records} if job.records else {}


def describe() -> str:
    """Formats the table, for `--environment-table` and the docs."""
    rows = [(v.name, v.value, v.reason) for v in TABLE]
    return "\n".join(
        ["| variable | value | reason |", "|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows)]
    )
