"""A rank's imports at its start: seconds, and files that thousands of ranks open at once.

For a process of its own, which has imported nothing yet.
"""

import sys
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Imports:
    """The imports of a run."""

    seconds: float
    """Of one core."""
    files: int
    """Files that Python opened; shared libraries are not among them."""


def count_imports() -> Imports:
    """Imports what a run imports, and counts."""
    files = 0

    def note(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal files
        files += event == "open"

    sys.addaudithook(note)
    begun = time.process_time()
    import train.run

    assert train.run
    return Imports(time.process_time() - begun, files)
