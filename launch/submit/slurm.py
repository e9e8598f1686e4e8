"""A job as a SLURM batch script: restarted on spare nodes, saved before its time limit, requeued."""

import shlex

from launch.submit.environment import environment
from launch.submit.job import Device, Job

SCRIPT = """#!/bin/bash
{directives}
# Submit: sbatch FILE. The job is requeued if a node fails or its time is up, and resumes by itself.
set -u
cd {workdir} || exit 2
{exports}
{setup}# Below the ports that the kernel hands out by itself (32768 and up).
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# The supervisor restarts, backs off, diagnoses and excludes bad nodes; SLURM requeues.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
.venv/bin/python -m launch.restart --hosts "$hosts" --nodes {nodes} -- \\
    bash launch/submit/srun_step.sh '{{hosts}}' {arguments} &
supervisor=$!
# SLURM sends SIGTERM {save_seconds} s before the time limit, only to this shell (--signal=B:).
trap 'kill -TERM "$supervisor"' TERM
wait "$supervisor"
# A trapped signal ends `wait` but not the process.
while kill -0 "$supervisor" 2>/dev/null; do wait "$supervisor"; done
wait "$supervisor"
status=$?
# 75: everything is saved; the same job resumes from there.
if [ "$status" -eq 75 ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "requeued {restarts} times: submit again to continue" >&2
    fi
fi
exit "$status"
"""


def render(job: Job) -> str:
    """Returns the batch script."""
    minutes = round(job.hours * 60)
    directives = {
        "job-name": job.name,
        "nodes": job.nodes + job.spare_nodes,
        "ntasks-per-node": job.gpus_per_node,
        "time": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        "signal": f"B:TERM@{job.save_seconds}",
        "requeue": None,
        "open-mode": "append",
        "output": f"{job.name}-%j.log",
        "partition": job.partition or False,
        "account": job.account or False,
        "gpus-per-node": job.gpus_per_node if job.device is Device.cuda else False,
        "exclusive": None if job.device is Device.cuda else False,
        # Keep the allocation when a node fails if a spare one can replace it.
        "no-kill": None if job.spare_nodes else False,
        # Secrets come from the environment of sbatch, whatever SBATCH_EXPORT says.
        "export": "ALL" if job.secrets else False,
    }
    if "gres" in job.directives:
        del directives["gpus-per-node"]
    directives |= {key: value or None for key, value in job.directives.items()}
    lines = [
        f"#SBATCH --{key}" + ("" if value is None else f"={value}")
        for key, value in directives.items()
        if value is not False
    ]
    variables = environment(job) | {"RANKS_PER_NODE": str(job.gpus_per_node)}
    if job.image:
        variables["CONTAINER_ARGUMENTS"] = container_arguments(job)
    return SCRIPT.format(
        directives="\n".join(lines),
        workdir=shlex.quote(job.workdir),
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        setup=f"set +u\n. {shlex.quote(job.setup)} || exit 2\nset -u\n" if job.setup else "",
        nodes=job.nodes,
        arguments=shlex.join(job.arguments),
        restarts=job.restarts,
        save_seconds=job.save_seconds,
    )


def container_arguments(job: Job) -> str:
    """Returns srun's options for pyxis, which starts enroot containers on the nodes."""
    mounts = ",".join(f"{mount}:{mount}" for mount in (job.workdir, *job.mounts))
    return f"--container-image={job.image} --container-mounts={mounts} --container-workdir={job.workdir}"
