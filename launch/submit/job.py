"""One description of a job, whatever the system that runs it, and what can be wrong with it."""

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record.run_folder import require_resumption

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
LONGEST_NAME = 50
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Device(str, Enum):
    """What a rank computes on."""

    cuda = "cuda"
    cpu = "cpu"


@dataclass(frozen=True)
class Job:
    """A recipe, and what it is to run on."""

    recipe_file: str
    """Path of the recipe, relative to the checkout."""
    overrides: tuple[str, ...] = ()
    """key=value on top of it."""
    name: str = "finegrain"
    """Name of the job."""
    nodes: int = 1
    """Nodes that train."""
    spare_nodes: int = 0
    """Nodes more that are held, to replace one that fails (SLURM, hosts)."""
    gpus_per_node: int = 8
    """Ranks per node, one for each GPU."""
    device: Device = Device.cuda
    """`cpu`: ranks without GPUs, to try a scheduler."""
    hours: float = 24.0
    """Time limit."""
    image: str = ""
    """Container image; none: the checkout's .venv."""
    mounts: tuple[str, ...] = ()
    """Folders that containers see: shards, runs; the same path inside and outside."""
    claims: dict[str, str] = field(default_factory=dict)
    """Kubernetes' persistent volume claims, ReadWriteMany, for shards and runs: name to folder inside."""
    resources: dict[str, str] = field(default_factory=dict)
    """What a pod asks for beside GPUs: name to count."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables more, which win over the table's."""
    interface: str = ""
    """Network interface of the rendezvous, for example eth0."""
    workdir: str = "."
    """The checkout on the nodes, on a file system that all share; /finegrain in the image."""
    hosts: tuple[str, ...] = ()
    """Hosts that are reached by `remote_shell`."""
    remote_shell: str = "ssh -o BatchMode=yes -o ServerAliveInterval=30"
    """Command that gets a host and a line for a shell on it."""
    partition: str = ""
    """SLURM's partition."""
    account: str = ""
    """SLURM's account."""
    cluster: str = ""
    """mcli's cluster."""
    gpu_type: str = "H100"
    """Name of the GPU to ask for."""
    restarts: int = 20
    """Restarts of the whole job by the system that runs it."""
    records: str = ""
    """Folder of the ranks' records, where the system itself restarts jobs (launch/restart/look_back.py)."""
    save_seconds: int = 300
    """Warning before the time limit, in which ranks save."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.gpus_per_node

    @property
    def arguments(self) -> list[str]:
        """What train/main.py is called with."""
        return [self.recipe_file, *self.overrides]


def check_job(job: Job) -> Recipe:
    """Everything that can be wrong with a job, before a system sees it; returns the recipe.

    Raises:
        UserError: one line that names the option and the remedy.
    """
    recipe = load_recipe(job.recipe_file, list(job.overrides))
    for option, value in (("--nodes", job.nodes), ("--gpus-per-node", job.gpus_per_node)):
        if value < 1:
            raise UserError(f"is {value}", key=option, remedy="give at least 1")
    for option, least in (("--spare-nodes", job.spare_nodes), ("--restarts", job.restarts)):
        if least < 0:
            raise UserError(f"is {least}", key=option, remedy="give 0 or more")
    if not 0 < job.hours <= 24 * 365:
        raise UserError(f"is {job.hours} hours", key="--hours", remedy="give the time limit, for example 24")
    if not NAME.fullmatch(job.name) or len(job.name) > LONGEST_NAME:
        raise UserError(
            f"{job.name!r} is no name for a job",
            key="--name",
            remedy=f"at most {LONGEST_NAME} small letters, digits and hyphens, a letter first",
        )
    for variable in job.environment:
        if not VARIABLE.fullmatch(variable):
            raise UserError(f"{variable!r} is no variable", key="--env", remedy="write NAME=value")
    if job.hosts and len(job.hosts) < job.nodes + job.spare_nodes:
        raise UserError(
            f"{len(job.hosts)} hosts for {job.nodes} nodes and {job.spare_nodes} spare ones",
            key="--hosts",
            remedy="name more hosts, or take fewer nodes",
        )
    for option, folders in (("--mount", job.mounts), ("--claim", job.claims.values())):
        for folder in folders:
            if not Path(folder).is_absolute():
                raise UserError(f"{folder!r} is relative", key=option, remedy="give a whole path")
    for claim in job.claims:
        if not CLAIM.fullmatch(claim):
            raise UserError(f"{claim!r} is no name of a claim", key="--claim", remedy="write NAME=/folder")
    require_resumption(recipe)
    validate(recipe, Topology(0, job.world_size, 0, job.gpus_per_node), job.recipe_file)
    return recipe
