"""Where shards are built, and how they take their place: whole or not at all.

Usually the folder is built next to its place and renamed. A mount point can't be renamed, and what lies next
to it is another disk; nor can anything be made next to a folder whose parent is read-only. There, shards are
built in a hidden folder inside and moved up, the manifest last, by which the folder counts as shards. Shards
that are replaced are kept until the new ones are in place, also if the process is killed in between.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.shards.manifest import MANIFEST_FILE
from data.text.job import OUT
from train.recipe.errors import UserError

KEY = "data.shards"
_OF_THE_DISK = "lost+found"
"""A folder that every ext4 file system has at its top."""
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Placement:
    """The place of a folder of shards, with links followed."""

    folder: Path
    is_inside: bool
    """Built inside the folder, which can't be renamed; otherwise next to it."""

    @property
    def work(self) -> Path:
        """The work folder, on the same disk as the shards."""
        return self._hidden("partial")

    def check(self) -> None:
        """Refuses a place that holds something else.

        Raises:
            UserError: one line that names the folder.
        """
        self._require_folder()
        if not (self.folder / MANIFEST_FILE).exists() and self.folder.is_dir() and self._children():
            what = f"{self.folder} exists and holds no shards"
            raise UserError(what, key=KEY, remedy="give another folder, or empty it")

    def _require_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder", key=KEY, remedy="give another path")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from building here, and puts back what a killed process was replacing.

        Raises:
            UserError: if nothing can be written here, or a file has the folder's name.
        """
        self._require_folder()
        lock = self._hidden("lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            what = f"{lock.parent} can't be written to ({error.strerror})"
            raise UserError(what, key=KEY, remedy="give a folder that can be") from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._recover()
            yield

    def take(self, new: Path) -> None:
        """Puts finished shards in place of what is there.

        Args:
            new: their folder, ``out`` in the work folder.

        Raises:
            OSError: if they can't be moved; what was there before is back in place.
        """
        try:
            if self.is_inside:
                self._move_in(new)
            else:
                if self.folder.exists():
                    self.folder.rename(self._old)
                new.rename(self.folder)
        except BaseException:
            self._recover()
            raise
        shutil.rmtree(self._old, ignore_errors=True)

    def _move_in(self, new: Path) -> None:
        leaving = self._hidden("leaving")
        leaving.mkdir()
        for child in sorted(self._children(), key=lambda child: child.name != MANIFEST_FILE):
            child.rename(leaving / child.name)
        # From here on everything in the folder is new.
        leaving.rename(self._old)
        for child in sorted(new.iterdir(), key=lambda child: child.name == MANIFEST_FILE):
            child.rename(self.folder / child.name)

    def _recover(self) -> None:
        """Goes back to before :meth:`take`, or completes it if all is in place."""
        leaving = self._hidden("leaving")
        if leaving.is_dir():
            _move_children(leaving, self.folder)
            leaving.rmdir()
        if not self._old.is_dir():
            return
        if (self.folder / MANIFEST_FILE).exists():
            shutil.rmtree(self._old)
        elif self.is_inside:
            for child in self._children():
                child.rename(self.work / OUT / child.name)
            _move_children(self._old, self.folder)
            self._old.rmdir()
        else:
            self._old.rename(self.folder)

    @property
    def _old(self) -> Path:
        return self._hidden("old")

    def _hidden(self, what: str) -> Path:
        holder = self.folder if self.is_inside else self.folder.parent
        return holder / f".{self.folder.name}.{what}"

    def _children(self) -> list[Path]:
        """The folder's contents, without those that belong to building or to the disk."""
        ours = {self._hidden(what).name for what in ("partial", "lock", "leaving", "old")} | {_OF_THE_DISK}
        return [child for child in self.folder.iterdir() if child.name not in ours]


def placement_of(root: Path) -> Placement:
    """Returns the place of the folder of shards that a recipe names.

    Raises:
        UserError: if it is a link that leads to itself.
    """
    try:
        folder = root.resolve()
    except (OSError, RuntimeError):  # From Python 3.13 on it is returned as it is.
        folder = root
    if folder.is_symlink():
        raise UserError(f"{root} is a link that leads to itself", key=KEY, remedy="give another path")
    if not folder.is_dir():
        return Placement(folder, is_inside=False)
    parent = folder.parent
    can_rename = os.access(parent, os.W_OK | os.X_OK) and folder.stat().st_dev == parent.stat().st_dev
    return Placement(folder, is_inside=not can_rename or _is_mount_point(folder))


def _is_mount_point(folder: Path) -> bool:
    """Returns whether something is mounted there, also a folder of the same disk, as containers do."""
    if folder.is_mount():
        return True
    try:
        points = {line.split()[4] for line in _MOUNTS.read_text().splitlines()}
    except OSError:
        return False
    # Blanks and backslashes are written in octal.
    return "".join(f"\\{ord(sign):03o}" if sign in " \t\n\\" else sign for sign in str(folder)) in points


def _move_children(source: Path, target: Path) -> None:
    for child in source.iterdir():
        child.rename(target / child.name)
