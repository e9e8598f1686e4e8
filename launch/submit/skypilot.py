"""A job as a SkyPilot task (sky jobs launch FILE), recovered by SkyPilot's managed jobs."""

import shlex
from typing import Any

import yaml

from launch.submit.environment import environment, look_back_environment
from launch.submit.job import Device, Job
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, REPLAY_STATUS, UNFIT_STATUS

MASTER_PORT = 29500


def render(job: Job) -> str:
    """Returns the task as YAML."""
    return yaml.safe_dump(task(job), sort_keys=False, width=110)


def task(job: Job) -> dict[str, Any]:
    """Returns the task; keys are those of SkyPilot's task schema."""
    resources: dict[str, Any] = {
        "job_recovery": {
            "max_restarts_on_errors": job.restarts,
            "recover_on_exit_codes": [PREEMPTED_STATUS, HANG_STATUS, REPLAY_STATUS, UNFIT_STATUS],
        },
    }
    if job.device is Device.cuda:
        # `best` requests the provider's InfiniBand or equivalent.
        resources |= {"accelerators": f"{job.gpu_type}:{job.gpus_per_node}", "network_tier": "best"}
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    setup = {} if job.image else {"setup": f"cd {shlex.quote(job.workdir)} && make install\n"}
    return {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "envs": environment(job) | look_back_environment(job),
        **setup,
        "run": (
            f"cd {shlex.quote(job.workdir)}\n"
            f'export NODES="$SKYPILOT_NUM_NODES" NODE_RANK="$SKYPILOT_NODE_RANK" MASTER_PORT={MASTER_PORT}\n'
            'MASTER_ADDR=$(head -n1 <<<"$SKYPILOT_NODE_IPS")\n'
            f"export MASTER_ADDR RANKS_PER_NODE={job.gpus_per_node}\n"
            f"exec bash launch/submit/node.sh {shlex.join(job.arguments)}\n"
        ),
    }
