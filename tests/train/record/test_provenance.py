import subprocess
from pathlib import Path

from train.record.provenance import git_commit, package_versions


def test_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first", "--no-verify")
    head = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == head
    (tmp_path / "other").write_text("not tracked")
    assert git_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{head}-dirty"


def test_versions_are_the_installed_ones() -> None:
    import torch

    versions = package_versions()
    assert torch.__version__.startswith(versions["torch"].partition("+")[0])
    assert {"mosaicml", "megablocks", "mlflow"} <= versions.keys()
