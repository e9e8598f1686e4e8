"""Copies of a run's state in host memory: where they are, and their removal. No torch, as supervisors use it.

They are files of ``/dev/shm``, which live in memory and outlive the processes that wrote them, but not their
host. A run's folder holds a token, without which its files are not found: a run that begins again under the
same name never takes them for its own.
"""

import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path

from train.record.files import write_whole
from train.record.process import host_name

MEMORY = Path("/dev/shm")
TOKEN_FILE = "memory.token"
COPY = re.compile(r"rank-(\d+)-batch-(\d+)")
"""Name of a copy: of which rank's state, after which batch."""


def take_token(run: Path) -> str:
    """Returns the token of a run's copies, made on first use; what an earlier run left here is removed."""
    file = run / TOKEN_FILE
    if not file.is_file():
        forget(run)
        write_whole(file, secrets.token_hex(8))
    return file.read_text()


def memory_folder(run: Path, token: str) -> Path:
    """Returns the folder of a run's copies on this host.

    The host's name is part of it, since containers may share their memory.
    """
    return MEMORY / f"{_mark(run)}-{token}" / host_name()


def forget(run: Path) -> None:
    """Removes all copies of a run, and of earlier runs in its folder, from this host's memory."""
    for folder in MEMORY.glob(f"{_mark(run)}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def copies_in(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns the files of a folder of copies by rank and batch."""
    names = {file: COPY.fullmatch(file.name) for file in folder.glob("rank-*")}
    return {(int(name[1]), int(name[2])): file for file, name in names.items() if name}


def copy_name(rank: int, batch: int) -> str:
    """Returns the name of a copy."""
    return f"rank-{rank:05d}-batch-{batch:08d}"


def newest_batch(run: Path) -> int:
    """Returns the newest batch of which this host holds any copy; 0 if there is none."""
    folders = MEMORY.glob(f"{_mark(run)}-*/*")
    return max((batch for folder in folders for _, batch in copies_in(folder)), default=0)


def _mark(run: Path) -> str:
    """Returns the beginning of the names of a run's folders: user and place."""
    return f"finegrain-{os.getuid()}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]}"
