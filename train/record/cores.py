"""How many processor cores there are to use."""

import os


def usable_cores() -> int:
    """Cores that this process may run on: those of its job or container, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
