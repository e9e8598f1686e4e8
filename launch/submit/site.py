"""Options that differ by site: directives, set-up, secrets, queues, tolerations, shared folders."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from launch.submit.job import VARIABLE, Job
from train.recipe.errors import UserError
from train.recipe.schema import Recipe
from train.recipe.secrets import looks_secret

DIRECTIVE = re.compile(r"[a-z][a-z-]*")
VALUE = re.compile(r"[\w./:,;@%+=&|*()\[\]<>!-]+")
"""Values of directives: whatever SLURM has in them but blanks, quotes and line breaks."""
SECRET_KEY = re.compile(r"[a-z0-9][-.a-z0-9]*/[\w.-]+")
LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*/)?[A-Za-z0-9][-A-Za-z0-9_.]*")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
OWN_DIRECTIVES = {
    "job-name": "--name",
    "nodes": "--nodes",
    "ntasks-per-node": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "time": "--hours",
    "partition": "--partition",
    "account": "--account",
}
"""Directives with an option of their own."""
FIXED_DIRECTIVES = ("signal", "requeue", "no-requeue", "open-mode", "no-kill", "export")
"""Those on which saving, restarting and secrets rest."""


def check_site(job: Job, system: str) -> None:
    """Refuses what a script or a scheduler would not take for one value.

    Raises:
        UserError: one line with the option and the remedy.
    """
    for key, value in job.directives.items():
        if not DIRECTIVE.fullmatch(key) or (value and not VALUE.fullmatch(value)):
            raise UserError(f"{key}={value!r} is not valid", key="--sbatch", remedy="write qos=high")
        if key in OWN_DIRECTIVES:
            raise UserError(f"{key} has an option", key="--sbatch", remedy=f"use {OWN_DIRECTIVES[key]}")
        if key in FIXED_DIRECTIVES:
            raise UserError(
                f"{key} is fixed: saving and restarting rest on it", key="--sbatch", remedy="leave it out"
            )
    for name, place in job.secrets.items():
        if not VARIABLE.fullmatch(name):
            raise UserError(f"{name!r} is not a variable name", key="--secret", remedy="write NAME")
        if system == "kubernetes" and not SECRET_KEY.fullmatch(place):
            raise UserError(
                f"{name} names no key of a secret", key="--secret", remedy="write NAME=SECRET/KEY"
            )
        if system == "slurm" and place:
            raise UserError(
                f"{name} has a value, which would be in a file",
                key="--secret",
                remedy=f"set it in the environment and write --secret {name}",
            )
    for name in job.environment:
        if looks_secret(name):
            raise UserError(
                f"{name} looks like a secret, and would be in a file", key="--env", remedy="use --secret"
            )
    for option, value in (("--namespace", job.namespace), ("--queue", job.queue)):
        if value and not LABEL.fullmatch(value):
            raise UserError(f"{value!r} is not valid", key=option, remedy="use its name")
    for text in job.tolerations:
        toleration(text)


def require_secrets(job: Job, environment: Mapping[str, str]) -> None:
    """Refuses to submit a job whose secrets are not in the environment that the scheduler copies.

    Raises:
        UserError: for the first that is missing.
    """
    for name in job.secrets:
        if name not in environment:
            raise UserError(f"{name} is not set here", key="--secret", remedy=f"export {name} first")


def toleration(text: str) -> dict[str, str]:
    """Reads ``KEY[=VALUE][:EFFECT]`` as a toleration of a pod.

    Raises:
        UserError: if it is none.
    """
    rest, colon, effect = text.partition(":")
    key, equals, value = rest.partition("=")
    labels = [key, value] if equals else [key]
    if not all(map(LABEL.fullmatch, labels)) or (colon and effect not in EFFECTS):
        remedy = f"write KEY, KEY=VALUE or KEY=VALUE:EFFECT, one of {', '.join(EFFECTS)}"
        raise UserError(f"{text!r} is not valid", key="--toleration", remedy=remedy)
    found = {"key": key, "operator": "Equal" if equals else "Exists"}
    return found | ({"value": value} if equals else {}) | ({"effect": effect} if effect else {})


def secret_variables(job: Job) -> list[dict[str, Any]]:
    """Returns the variables of a container that Kubernetes fills in from its secrets."""
    found = []
    for name, place in job.secrets.items():
        secret, _, key = place.partition("/")
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def check_mounts(job: Job, recipe: Recipe, system: str) -> None:
    """Refuses folders that containers would write to on no disk that outlives them, or would not find.

    Raises:
        UserError: one line that names the recipe's key and the option.
    """
    if not job.image or system not in ("slurm", "kubernetes"):
        return
    # pyxis mounts the checkout; on Kubernetes it is part of the image.
    shared = [*job.mounts, *job.claims.values(), *([job.workdir] if system == "slurm" else [])]
    folders = {"runs_dir": recipe.runs_dir}
    if recipe.data.remote is None and recipe.data.corpus is None:
        folders["data.shards"] = recipe.data.shards
    for key, folder in folders.items():
        place = PurePosixPath(job.workdir) / folder
        if not any(place.is_relative_to(mount) for mount in shared):
            how = "--mount DIR" if system == "slurm" else "--claim NAME=DIR or --mount DIR"
            raise UserError(
                f"{place} is on no mount: it would be lost with the container",
                key=key,
                remedy=f"mount a shared folder ({how}) and name one below it",
            )
