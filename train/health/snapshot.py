"""A snapshot of a rank's collectives, whatever the backend. No torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class IssuedCollective:
    """One collective issued by a rank."""

    group: str
    """The group's name, equal on its ranks."""
    number: int
    """Number among the group's collectives, from 1; ranks in sync issue the same collective under it."""
    operation: str
    size_bytes: int
    """Bytes of this rank's input or output tensors, whichever are larger."""
    since: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Snapshot:
    """Collectives of one rank."""

    issued: dict[str, int] = field(default_factory=dict)
    """Number of the last collective issued, by group."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Global ranks by group, at least for every group with a pending collective."""
    waiting: list[IssuedCollective] = field(default_factory=list)
    """Collectives that are issued and not complete."""
    trace: str = ""
    """The backend's own record, JSON; empty for gloo."""
