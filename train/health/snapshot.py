"""A snapshot of a rank's collectives, whatever backend issued them. Needs no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class IssuedCollective:
    """One collective as a rank issued it."""

    group: str
    """The group's name, equal on its ranks."""
    number: int
    """Place among the group's collectives, from 1: ranks that are in step issue the same under it."""
    operation: str
    size_bytes: int
    """Of the tensors that this rank hands in or gets."""
    since: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Snapshot:
    """Collectives of one rank."""

    issued: dict[str, int] = field(default_factory=dict)
    """Number of the last collective issued, by group."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Global ranks by group; of each group that is waited in at least."""
    waiting: list[IssuedCollective] = field(default_factory=list)
    """Collectives that are issued and not complete."""
    trace: str = ""
    """The backend's own record, JSON; empty for gloo."""
