"""The place of a run's folder, in `place.json`: tells a run from a copy of its folder.

No path is kept, only its digest. A folder that is renamed or moved on its file system stays the same, by its
number there; so does one that comes back under its path, whatever its number is then.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from train.record.files import write_json
from train.record.process import host_name

PLACE_FILE = "place.json"


@dataclass(frozen=True)
class Place:
    """Where a folder is."""

    host: str
    path: str
    """Digest of the resolved path."""
    device: int
    inode: int

    def is_same(self, other: "Place") -> bool:
        """Returns whether two places are of the same folder; hosts may share paths and a folder's number."""
        is_moved = (self.device, self.inode) == (other.device, other.inode)
        if self.host == other.host:
            return is_moved or self.path == other.path
        return self.path == other.path and self.inode == other.inode


def note_place(folder: Path) -> None:
    """Notes where a run's folder is."""
    write_json(folder / PLACE_FILE, asdict(_place_of(folder)), sync=False)


def is_elsewhere(folder: Path) -> bool:
    """Returns whether a run's folder is at another place than was noted; False if none was."""
    try:
        noted = Place(**json.loads((folder / PLACE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return False
    return not noted.is_same(_place_of(folder))


def _place_of(folder: Path) -> Place:
    found, path = folder.stat(), str(folder.resolve())
    return Place(host_name(), hashlib.sha256(path.encode()).hexdigest()[:16], found.st_dev, found.st_ino)
