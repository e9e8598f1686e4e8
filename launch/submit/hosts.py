"""A job as a shell script that starts `composer` or `torchrun` on hosts, by ssh or another remote shell."""

import shlex

from launch.submit.environment import environment
from launch.submit.job import Job

MASTER_PORT = 29500
SCRIPT = """#!/usr/bin/env bash
# Run: bash FILE, in the checkout, on a machine that can reach every host without a password.
set -u
cd {workdir} || exit 2
export RANKS_PER_NODE={ranks} MASTER_PORT={port} LAUNCHER={launcher} SAVE_SECONDS={save_seconds} WORKDIR=$PWD
export VARIABLES={variables} REMOTE_SHELL={remote_shell}
exec .venv/bin/python -m launch.restart --hosts {hosts} --nodes {nodes} -- \\
    bash launch/submit/ssh_step.sh '{{hosts}}' {arguments}
"""


def render(job: Job, launcher: str) -> str:
    """Returns the script; `launcher` is composer or torchrun."""
    setup = {"SETUP": job.setup} if job.setup else {}
    words = [f"{name}={shlex.quote(value)}" for name, value in (environment(job) | setup).items()]
    return SCRIPT.format(
        workdir=shlex.quote(job.workdir),
        ranks=job.gpus_per_node,
        port=MASTER_PORT,
        launcher=launcher,
        save_seconds=job.save_seconds,
        remote_shell=shlex.quote(job.remote_shell),
        variables=shlex.quote(" ".join(words)),
        hosts=shlex.quote(",".join(job.hosts)),
        nodes=job.nodes,
        arguments=shlex.join(job.arguments),
    )
