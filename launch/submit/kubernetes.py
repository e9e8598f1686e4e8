"""A job as a Kubernetes JobSet: one indexed Job with a pod per node, restarted as a whole.

Fields are those of JobSet's jobset.x-k8s.io/v1alpha2 and of batch/v1.
"""

import re
from typing import Any

import yaml

from launch.restart.history import STOPPED_STATUS
from launch.submit.environment import environment, look_back_environment
from launch.submit.job import Device, Job
from launch.submit.site import secret_variables, toleration
from train.recipe.exit_status import USAGE_STATUS
from train.record.process import HOST_VARIABLE

REPLICATED_JOB = "node"
MASTER_PORT = 29500
SHARED_MEMORY = "64Gi"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FINAL_STATUSES = [USAGE_STATUS, STOPPED_STATUS]
"""Exit statuses of a pod after which the job is not restarted."""


def render(job: Job) -> str:
    """Returns the JobSet as YAML for kubectl apply."""
    return yaml.safe_dump(manifest(job), sort_keys=False, width=110)


def manifest(job: Job) -> dict[str, Any]:
    """Returns the JobSet as nested values."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            **({"namespace": job.namespace} if job.namespace else {}),
            **({"labels": {QUEUE_LABEL: job.queue}} if job.queue else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": {
                "maxRestarts": job.restarts,
                # Ranks of the previous try may still be saving; they must end before the next try starts.
                "restartStrategy": "BlockingRecreate",
                # A mistake in the recipe would fail again.
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "targetReplicatedJobs": [REPLICATED_JOB],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": job_spec(job)}},
            ],
        },
    }


def job_spec(job: Job) -> dict[str, Any]:
    """Returns the indexed Job (batch/v1 JobSpec): a pod per node, never restarted individually."""
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,
        "activeDeadlineSeconds": round(job.hours * 3600),
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "ranks", "operator": "In", "values": FINAL_STATUSES},
                }
            ]
        },
        "template": {"spec": pod_spec(job)},
    }


def pod_spec(job: Job) -> dict[str, Any]:
    """Returns the pod of one node."""
    master = f"{job.name}-{REPLICATED_JOB}-0-0.{job.name}"
    variables: dict[str, str] = (
        environment(job)
        | look_back_environment(job)
        | {
            "NODES": str(job.nodes),
            "RANKS_PER_NODE": str(job.gpus_per_node),
            "MASTER_ADDR": master,
            "MASTER_PORT": str(MASTER_PORT),
        }
    )
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container: dict[str, Any] = {
        "name": "ranks",
        "image": job.image,
        "workingDir": job.workdir,
        "command": ["bash", "launch/submit/node.sh", *map(_verbatim, job.arguments)],
        "env": [
            {"name": "NODE_RANK", "valueFrom": index},
            # Ranks report the node's name, not the pod's.
            {"name": HOST_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            *({"name": name, "value": _verbatim(value)} for name, value in variables.items()),
            *secret_variables(job),
        ],
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": f"mount-{n}", "mountPath": mount} for n, mount in enumerate(job.mounts)),
            *({"name": f"claim-{n}", "mountPath": path} for n, path in enumerate(job.claims.values())),
        ],
        # RDMA pins memory.
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
    }
    gpus = {"nvidia.com/gpu": str(job.gpus_per_node)} if job.device is Device.cuda else {}
    if limits := gpus | job.resources:
        container["resources"] = {"limits": limits}
    return {
        "restartPolicy": "Never",
        # Time for ranks to save after SIGTERM.
        "terminationGracePeriodSeconds": job.save_seconds,
        "containers": [container],
        **({"tolerations": [toleration(text) for text in job.tolerations]} if job.tolerations else {}),
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
            *(
                {"name": f"mount-{n}", "hostPath": {"path": mount, "type": "Directory"}}
                for n, mount in enumerate(job.mounts)
            ),
            *(
                {"name": f"claim-{n}", "persistentVolumeClaim": {"claimName": claim}}
                for n, claim in enumerate(job.claims)
            ),
        ],
    }


def _verbatim(text: str) -> str:
    """Escapes what Kubernetes would expand in a command or a variable: `$(NAME)`, and `$$` to `$`."""
    return re.sub(r"\$(?=[$(])", "$$", text)
