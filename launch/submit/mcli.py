"""A job as a run configuration for Databricks' mcli (mcli run -f FILE).

The platform sets NODE_RANK, MASTER_ADDR and MASTER_PORT on each node.
"""

import shlex
from typing import Any

import yaml

from launch.submit.environment import environment, look_back_environment
from launch.submit.job import Device, Job

GPU_TYPES = {"A100": "a100_80gb", "H100": "h100_80gb", "H200": "h200_141gb"}
"""The platform's names, with memory (H200's by analogy, not yet tried); any other name is passed on in
lower case, as `mcli get clusters` lists it."""


def render(job: Job) -> str:
    """Returns the run configuration as YAML."""
    return yaml.safe_dump(configuration(job), sort_keys=False, width=110)


def configuration(job: Job) -> dict[str, Any]:
    """Returns the run configuration; keys are those of mcli's RunConfig."""
    compute: dict[str, Any] = {"nodes": job.nodes}
    if job.cluster:
        compute["cluster"] = job.cluster
    if job.device is Device.cuda:
        compute |= {"gpus": job.world_size, "gpu_type": GPU_TYPES.get(job.gpu_type, job.gpu_type.lower())}
    variables = {"NODES": str(job.nodes), "RANKS_PER_NODE": str(job.gpus_per_node)}
    return {
        "name": job.name,
        "image": job.image,
        "compute": compute,
        "scheduling": {
            "preemptible": True,
            "retry_on_system_failure": True,
            "max_retries": job.restarts,
            "max_duration": job.hours,
        },
        "env_variables": environment(job) | look_back_environment(job) | variables,
        "command": command(job),
    }


def command(job: Job) -> str:
    """Returns the command that each node runs."""
    return f"cd {shlex.quote(job.workdir)} && exec bash launch/submit/node.sh {shlex.join(job.arguments)}\n"
