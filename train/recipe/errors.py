"""User errors, which every command turns into one line and exit status 2."""

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(ValueError):
    """An error in a recipe, a file or an option: one line with file, key, what is wrong and the remedy."""

    def __init__(self, what: str, *, key: str = "", remedy: str = "", file: str = "") -> None:
        self.what, self.key, self.remedy, self.file = what, key, remedy, file
        super().__init__(str(self))

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        line = f"{where}: {self.what}" if where else self.what
        return " ".join((line + (f"; {self.remedy}" if self.remedy else "")).split())

    def at(self, file: str) -> "UserError":
        """Returns the same error with the file that it came from."""
        return self if self.file else UserError(self.what, key=self.key, remedy=self.remedy, file=file)


class JoinedUserError(UserError):
    """Several errors, which a command prints one a line; as text it is the first one."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors, first = tuple(errors), errors[0]
        super().__init__(first.what, key=first.key, remedy=first.remedy, file=first.file)

    def at(self, file: str) -> "JoinedUserError":
        """Returns the same errors with the file that they came from."""
        return JoinedUserError([error.at(file) for error in self.errors])


class RecordedError(RuntimeError):
    """An error that every rank raises and whose cause is in the records already, with whom to blame."""


def raise_all(errors: Sequence[UserError]) -> None:
    """Raises all errors at once, each only once; returns if there are none.

    Raises:
        UserError: if there is one; :class:`JoinedUserError` if there are several.
    """
    different: dict[str, UserError] = {}
    for error in errors:
        for each in error.errors if isinstance(error, JoinedUserError) else (error,):
            different.setdefault(str(each), each)
    if different:
        found = list(different.values())
        raise found[0] if len(found) == 1 else JoinedUserError(found)


@dataclass(frozen=True)
class Violation:
    """A violated rule of recipes: the key to change, what is wrong, and the remedy."""

    key: str
    what: str
    remedy: str
