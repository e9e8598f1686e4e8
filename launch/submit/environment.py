"""Environment of a job's ranks, for every launcher."""

from launch.submit.job import Job
from train.health.environment import TABLE
from train.health.heartbeat import RECORDS_VARIABLE


def environment(job: Job) -> dict[str, str]:
    """Returns the environment of a job's ranks; the user's own variables take precedence."""
    found = {v.name: v.value for v in TABLE if v.device in (None, job.device.value)}
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
