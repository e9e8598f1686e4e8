"""The description of a job, independent of the system that runs it, and its checks."""

import re
from dataclasses import dataclass, field
from enum import Enum

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
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:+/-]*")
"""Names in a scheduler or a cluster."""
INTERFACE = re.compile(r"[^=]?[A-Za-z0-9_][A-Za-z0-9_.,:+-]*")
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*")
IMAGE = re.compile(r"[\w/.][\w.:/@+#-]*")
FOLDER = re.compile(r"/[\w./+@=%-]*")
"""Folders of containers, in whose lists commas and colons separate them."""
QUANTITY = re.compile(r"\d+(\.\d+)?[A-Za-z]{0,2}")


class Device(str, Enum):
    """The device that a rank computes on."""

    cuda = "cuda"
    cpu = "cpu"


@dataclass(frozen=True)
class Job:
    """A recipe and the resources to run it on."""

    recipe_file: str
    """Path of the recipe, relative to the checkout."""
    overrides: tuple[str, ...] = ()
    """key=value pairs that override it."""
    name: str = "finegrain"
    """Name of the job."""
    nodes: int = 1
    """Nodes to train on."""
    spare_nodes: int = 0
    """Extra nodes to replace failed ones (SLURM, hosts)."""
    gpus_per_node: int = 8
    """Ranks per node, one per GPU."""
    device: Device = Device.cuda
    """`cpu`: ranks without GPUs, for trying out a scheduler."""
    hours: float = 24.0
    """Time limit."""
    image: str = ""
    """Container image; if empty, the checkout's .venv."""
    mounts: tuple[str, ...] = ()
    """Folders mounted into containers under the same path, for shards and runs."""
    claims: dict[str, str] = field(default_factory=dict)
    """Kubernetes persistent volume claims (ReadWriteMany) for shards and runs: name to mount point."""
    resources: dict[str, str] = field(default_factory=dict)
    """Resources that a pod requests besides GPUs: name to count."""
    environment: dict[str, str] = field(default_factory=dict)
    """Extra variables, which override the table's."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Variables whose values no file holds: name to SECRET/KEY on Kubernetes, to nothing on SLURM."""
    directives: dict[str, str] = field(default_factory=dict)
    """More directives of SLURM: key to value, or to nothing."""
    setup: str = ""
    """File that a shell reads before the ranks start: modules, variables."""
    namespace: str = ""
    """Kubernetes namespace."""
    queue: str = ""
    """Queue of Kueue."""
    tolerations: tuple[str, ...] = ()
    """Taints of nodes that pods tolerate: KEY[=VALUE][:EFFECT]."""
    interface: str = ""
    """Network interface for the rendezvous, for example eth0."""
    workdir: str = "."
    """The checkout on the nodes, on a shared file system; /finegrain in the image."""
    hosts: tuple[str, ...] = ()
    """Hosts that `remote_shell` reaches."""
    remote_shell: str = "ssh -o BatchMode=yes -o ServerAliveInterval=30"
    """Command that takes a host and a shell line to run on it."""
    partition: str = ""
    """SLURM partition."""
    account: str = ""
    """SLURM account."""
    cluster: str = ""
    """mcli cluster."""
    gpu_type: str = "H100"
    """Name of the GPU to request."""
    restarts: int = 20
    """Restarts of the whole job by the system that runs it."""
    records: str = ""
    """Folder of the ranks' records, if the system itself restarts jobs (launch/restart/look_back.py)."""
    save_seconds: int = 300
    """Seconds between the warning and the time limit, for saving a checkpoint."""

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments of train/main.py."""
        return [self.recipe_file, *self.overrides]


def check_job(job: Job) -> Recipe:
    """Checks a job before it is submitted; returns the recipe.

    Raises:
        UserError: one line with the option and the remedy.
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
            f"{job.name!r} is not a valid job name",
            key="--name",
            remedy=f"use up to {LONGEST_NAME} lowercase letters, digits and hyphens, a letter first",
        )
    for variable in job.environment:
        if not VARIABLE.fullmatch(variable):
            raise UserError(f"{variable!r} is not a variable name", key="--env", remedy="write NAME=value")
    if job.hosts and len(job.hosts) < job.nodes + job.spare_nodes:
        raise UserError(
            f"{len(job.hosts)} hosts for {job.nodes} nodes and {job.spare_nodes} spare ones",
            key="--hosts",
            remedy="give more hosts or fewer nodes",
        )
    check_words(job)
    for claim in job.claims:
        if not CLAIM.fullmatch(claim):
            raise UserError(
                f"{claim!r} is not a valid claim name", key="--claim", remedy="write NAME=/folder"
            )
    require_resumption(recipe)
    validate(recipe, Topology(0, job.world_size, 0, job.gpus_per_node), job.recipe_file)
    return recipe


def check_words(job: Job) -> None:
    """Refuses values that a script, a scheduler or a remote shell would take for more than one word.

    Arguments and the values of variables may hold anything: every system gets them quoted.
    """
    in_container = [job.workdir] if job.image else []
    for option, form, values, remedy in (
        ("--partition", WORD, [job.partition], "use its name"),
        ("--account", WORD, [job.account], "use its name"),
        ("--cluster", WORD, [job.cluster], "use its name"),
        ("--gpu-type", WORD, [job.gpu_type], "use its name, for example H100"),
        ("--interface", INTERFACE, [job.interface], "use its name, for example eth0"),
        ("--hosts", HOST, job.hosts, "give names or addresses: A,B,..."),
        ("--image", IMAGE, [job.image], "give its name or the path of its file, without spaces"),
        ("--mount", FOLDER, job.mounts, "give an absolute path of letters, digits and _.-+@=%"),
        ("--claim", FOLDER, job.claims.values(), "give an absolute path of letters, digits and _.-+@=%"),
        ("--workdir", FOLDER, in_container, "give an absolute path of letters, digits and _.-+@=%"),
        ("--resource", WORD, job.resources, "write NAME=COUNT, for example rdma/ib=8"),
        ("--resource", QUANTITY, job.resources.values(), "write NAME=COUNT, for example rdma/ib=8"),
    ):
        for value in values:
            if value and not form.fullmatch(value):
                raise UserError(f"{value!r} is not valid", key=option, remedy=remedy)
    for option, texts in (("RECIPE", job.arguments), ("--remote-shell", [job.remote_shell])):
        for text in texts:
            if not text.isprintable():
                raise UserError(f"{text!r} has a line break or another control character", key=option)
