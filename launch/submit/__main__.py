"""Submits a recipe to a cluster: `python -m launch.submit yamls/X.yaml --on slurm --nodes 384 [--render]`.

Not yet run on a GPU. The SLURM script has run on a real SLURM with CPU ranks (docs/cluster.md).
"""

import logging
import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from launch.submit import hosts, kubernetes, mcli, skypilot, slurm
from launch.submit.environment import describe
from launch.submit.job import Device, Job, check_job
from launch.submit.placement import check_memory, check_placement
from launch.submit.site import check_mounts, check_site, require_secrets
from train.recipe.errors import UserError
from train.record import log
from train.record.command import add_recipe_arguments, command

IMAGE_WORKDIR = "/finegrain"
HOSTS = ("composer", "torchrun")

logger = log.get_logger("launch.submit")


@dataclass(frozen=True)
class System:
    """A system that runs jobs: a scheduler, or a launcher on given hosts."""

    render: Callable[[Job], str]
    suffix: str
    submit: tuple[str, ...]
    """The command to submit with; the file is appended as its last argument."""
    needs_image: bool = False
    needs_hosts: bool = False


SYSTEMS = {
    "slurm": System(slurm.render, ".sbatch", ("sbatch",)),
    "kubernetes": System(kubernetes.render, ".yaml", ("kubectl", "apply", "-f"), needs_image=True),
    "mcli": System(mcli.render, ".yaml", ("mcli", "run", "-f"), needs_image=True),
    "skypilot": System(skypilot.render, ".yaml", ("sky", "jobs", "launch", "--yes")),
    "composer": System(partial(hosts.render, launcher="composer"), ".sh", ("bash",), needs_hosts=True),
    "torchrun": System(partial(hosts.render, launcher="torchrun"), ".sh", ("bash",), needs_hosts=True),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    job = Job("")
    add_recipe_arguments(parser, needed=False)
    add = parser.add_argument
    add("--on", choices=SYSTEMS, default="slurm", help="the system (default slurm)")
    add("--render", action="store_true", help="print the file without submitting it")
    add("--nodes", type=int, default=job.nodes, help="nodes to train on (default %(default)s)")
    add(
        "--spare-nodes",
        type=int,
        default=0,
        help="extra nodes to replace failed ones (slurm, composer, torchrun)",
    )
    add("--gpus-per-node", type=int, default=job.gpus_per_node, help="ranks per node (default %(default)s)")
    add("--device", choices=[d.value for d in Device], default="cuda", help="cpu: for trying out a scheduler")
    add("--gpu-type", default=job.gpu_type, help="GPU to request (mcli, skypilot; default %(default)s)")
    add("--hours", type=float, default=job.hours, help="time limit (default %(default)s)")
    add("--name", default="", help="name of the job (default: the recipe's file name)")
    _add_environment_arguments(parser, job)
    _add_system_arguments(parser)
    add("--restarts", type=int, default=job.restarts, help="restarts of the whole job (default %(default)s)")
    add(
        "--environment-table",
        action="store_true",
        help="print every environment variable with its reason, then exit",
    )


def _add_environment_arguments(parser: ArgumentParser, job: Job) -> None:
    """Adds what the job's processes find around them, and where they run."""
    add = parser.add_argument
    add("--image", default="", help="container image (default: none, the checkout's .venv)")
    add("--mount", action="append", default=[], metavar="DIR", help="folder to mount into containers")
    add(
        "--claim",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="persistent volume claim and its mount point, for shards and runs (kubernetes)",
    )
    add(
        "--resource",
        action="append",
        default=[],
        metavar="NAME=COUNT",
        help="extra resource that each pod requests, for example rdma/ib=8 (kubernetes)",
    )
    add(
        "--workdir",
        default="",
        help=f"checkout on the nodes (default: this one; {IMAGE_WORKDIR} in an image)",
    )
    add(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable for every rank"
    )
    add("--interface", default="", help="network interface for the rendezvous, for example eth0")
    add("--hosts", default="", metavar="A,B,...", help="hosts, including spare ones (composer, torchrun)")
    add(
        "--remote-shell",
        default=job.remote_shell,
        metavar="COMMAND",
        help="command that takes a host and a shell line to run on it (default %(default)s; `bash "
        "launch/submit/here.sh`: every host is this machine)",
    )


def _add_system_arguments(parser: ArgumentParser) -> None:
    """Adds what only one of the systems has."""
    add = parser.add_argument
    add("--partition", default="", help="SLURM partition")
    add("--account", default="", help="SLURM account")
    add("--cluster", default="", help="mcli cluster")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="more directives, for example qos=high, constraint=h100, gres=gpu:h100:8, reservation=r1, "
        "mail-user=me@example.org, dependency=afterok:123 (slurm)",
    )
    add(
        "--setup",
        default="",
        metavar="FILE",
        help="file that a shell reads before the ranks start: modules, variables (slurm, composer, torchrun)",
    )
    add(
        "--secret",
        action="append",
        default=[],
        metavar="NAME[=SECRET/KEY]",
        help="variable whose value no file holds: from this command's environment (slurm), or from a secret "
        "(kubernetes)",
    )
    add("--namespace", default="", help="Kubernetes namespace")
    add("--queue", default="", help="queue of Kueue (kubernetes)")
    add(
        "--toleration",
        action="append",
        default=[],
        metavar="KEY[=VALUE][:EFFECT]",
        help="taint of nodes that pods tolerate (kubernetes)",
    )


@command(
    "python -m launch.submit",
    "Checks a recipe against a cluster, writes a job file for its system, and submits it.",
    add_arguments,
    file="recipe",
    mistakes=(OSError,),
    intermixed=True,
)
def main(options: Namespace) -> int:
    """Renders the job and submits it; returns the status of the system's command."""
    if options.environment_table:
        print(describe())
        return 0
    system, job = SYSTEMS[options.on], job_from(options)
    _check_system(options.on, system, job)
    recipe = check_job(job)
    check_site(job, options.on)
    check_mounts(job, recipe, options.on)
    lines = [*check_placement(job, recipe), *check_memory(job, recipe)]
    text = system.render(replace(job, records=f"{recipe.runs_dir}/{recipe.name}.restarts"))
    for line in lines:
        logger.log(logging.WARNING if line.startswith("warning:") else logging.INFO, line)
    if options.render:
        print(text, end="")
        return 0
    if options.on == "slurm":
        require_secrets(job, os.environ)
    return submit(system, job, text)


def submit(system: System, job: Job, text: str) -> int:
    """Saves the file and submits it; returns the status of the system's command.

    Raises:
        UserError: if the system's command is not installed.
    """
    program = system.submit[0]
    if shutil.which(program) is None:
        raise UserError(
            "not found on this machine", file=program, remedy="install it, or print the file with --render"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    file = Path("runs/submitted") / f"{job.name}-{stamp}{system.suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    # The values of --env may be for nobody else.
    with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        stream.write(text)
    print(f"{' '.join(system.submit)} {file}", flush=True)
    return subprocess.run([*system.submit, str(file)], check=False).returncode


def job_from(options: Namespace) -> Job:
    """Builds the job that the command line describes.

    Raises:
        UserError: if something is missing or malformed.
    """
    if not options.recipe:
        raise UserError("is missing", key="RECIPE", remedy="give a YAML file, for example yamls/dbrx.yaml")
    in_image = options.image and options.on != "slurm"
    return Job(
        recipe_file=options.recipe,
        overrides=tuple(options.overrides),
        name=options.name or Path(options.recipe).stem.lower().replace("_", "-"),
        nodes=options.nodes,
        spare_nodes=options.spare_nodes,
        gpus_per_node=options.gpus_per_node,
        device=Device(options.device),
        hours=options.hours,
        image=options.image,
        mounts=tuple(options.mount),
        resources=_pairs(options.resource, "--resource", "count", "NAME=COUNT"),
        claims=_pairs(options.claim, "--claim", "folder", "NAME=/folder"),
        environment=_pairs(options.env, "--env", "value", "NAME=value"),
        secrets=dict(text.partition("=")[::2] for text in options.secret),
        directives=dict(text.partition("=")[::2] for text in options.sbatch),
        setup=options.setup and str(Path(options.setup).absolute()),
        namespace=options.namespace,
        queue=options.queue,
        tolerations=tuple(options.toleration),
        interface=options.interface,
        workdir=options.workdir or (IMAGE_WORKDIR if in_image else str(Path.cwd())),
        hosts=tuple(filter(None, options.hosts.split(","))),
        remote_shell=options.remote_shell,
        partition=options.partition,
        account=options.account,
        cluster=options.cluster,
        gpu_type=options.gpu_type,
        restarts=options.restarts,
    )


def _pairs(texts: list[str], option: str, what: str, form: str) -> dict[str, str]:
    found = dict[str, str]()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} has no {what}", key=option, remedy=f"write {form}")
        found[name] = value
    return found


def _check_system(name: str, system: System, job: Job) -> None:
    if system.needs_image and not job.image:
        raise UserError(f"{name} runs containers", key="--image", remedy="give the image's name")
    if system.needs_hosts and not job.hosts:
        raise UserError(f"{name} needs hosts", key="--hosts", remedy="give --hosts A,B,...")
    for option, value, readers in (
        ("--hosts", job.hosts, HOSTS),
        ("--spare-nodes", job.spare_nodes, ("slurm", *HOSTS)),
        ("--image", job.image, ("slurm", "kubernetes", "mcli", "skypilot")),
        ("--mount", job.mounts, ("slurm", "kubernetes")),
        ("--claim", job.claims, ("kubernetes",)),
        ("--resource", job.resources, ("kubernetes",)),
        ("--partition", job.partition, ("slurm",)),
        ("--account", job.account, ("slurm",)),
        ("--cluster", job.cluster, ("mcli",)),
        ("--sbatch", job.directives, ("slurm",)),
        ("--setup", job.setup, ("slurm", *HOSTS)),
        ("--secret", job.secrets, ("slurm", "kubernetes")),
        ("--namespace", job.namespace, ("kubernetes",)),
        ("--queue", job.queue, ("kubernetes",)),
        ("--toleration", job.tolerations, ("kubernetes",)),
    ):
        if value and name not in readers:
            what = f"{name} does not use it; it is for {', '.join(readers)}"
            raise UserError(what, key=option, remedy="remove the option")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
