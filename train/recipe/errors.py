"""User errors, which every command turns into one line and exit status 2."""

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


@dataclass(frozen=True)
class Violation:
    """A violated rule of recipes: the key to change, what is wrong, and the remedy."""

    key: str
    what: str
    remedy: str
