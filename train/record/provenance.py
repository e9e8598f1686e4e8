"""Provenance of a run: commit of the code, versions of the packages."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMMIT_VARIABLE = "FINEGRAIN_COMMIT"
PACKAGES = (
    "torch",
    "mosaicml",
    "llm-foundry",
    "mosaicml-streaming",
    "megablocks",
    "transformers",
    "tokenizers",
    "tiktoken",
    "numpy",
    "omegaconf",
    "mlflow",
)


def git_commit(checkout: Path | None = None) -> str:
    """Returns the commit of the code, with `-dirty` appended if tracked files differ.

    Outside a git checkout it is FINEGRAIN_COMMIT, which a container image sets at build time, or `unknown`.
    """
    folder = checkout or Path(__file__).resolve().parents[2]
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return os.environ.get(COMMIT_VARIABLE) or "unknown"
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def package_versions() -> dict[str, str]:
    """Returns the versions of the installed packages that a run's numbers depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
