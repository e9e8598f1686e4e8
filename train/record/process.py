"""Processes: this host's name, the space of their ids, the start of one, and its end with its parent."""

import ctypes
import os
import signal
import socket
import time
from pathlib import Path

HOST_VARIABLE = "FINEGRAIN_HOST"
"""The node's name in the job's list of hosts, set by the launcher; a pod's own hostname differs."""

WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2): the signal that a process gets when the thread that forked it ends."""


def end_with_parent() -> None:
    """Lets the system kill this process when the one that forked it has ended, however that ended.

    A pool's processes would otherwise wait for tasks for ever, as each holds an end of their queue open.
    """
    ctypes.CDLL(None).prctl(WITH_PARENT, signal.SIGKILL)


def host_name() -> str:
    """This machine's name in the job's list of hosts, from the launcher or SLURM, else its hostname."""
    return os.environ.get(HOST_VARIABLE) or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def pid_space() -> str:
    """Identifies the space in which process ids are unique: this boot of this machine, and the container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [boot.read_text().strip() if boot.is_file() else socket.gethostname()]
    return " ".join([*parts, str(namespace.readlink())] if namespace.is_symlink() else parts)


def process_start(pid: int) -> int | None:
    """Returns when a process started, in the system's ticks since boot; None if it has ended.

    A process that has ended but that its parent has not collected counts as ended. 0: unknown, on a system
    without ``/proc``.
    """
    if not Path("/proc/self/stat").is_file():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    try:
        # The name of the program, in parentheses, may itself hold blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def process_seconds() -> float:
    """Returns how long ago this process began, in seconds; 0 on a system without ``/proc``."""
    begun = process_start(os.getpid())
    if not begun:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK"))
