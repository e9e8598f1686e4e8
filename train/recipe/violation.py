"""A rule of recipes that is broken, for the modules that know rules."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """The key to change, what is wrong, and the remedy."""

    key: str
    what: str
    remedy: str
