"""Where a run came from: commit of the code, versions of the packages."""

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
    """The commit of the code, `-dirty` appended where tracked files differ.

    Outside of git, in an image, it is FINEGRAIN_COMMIT's, which the image was built with; else `unknown`.
    """
    folder = checkout or Path(__file__).resolve().parents[2]
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return os.environ.get(COMMIT_VARIABLE) or "unknown"
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def package_versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on; those not installed are left out."""
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
