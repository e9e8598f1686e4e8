"""The harness of all checks: prepares what they share, runs them in turn and reports their results."""

import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from launch.verify.case_run import import_for_ranks
from launch.verify.cases import Layout, layouts
from launch.verify.forked_ranks import RankError
from launch.verify.parity_report import write_certificate
from launch.verify.tiny_runs import STEPS, prepare, uninterrupted
from train.recipe.schema import Recipe
from train.record.command import Figures
from train.record.log import quiet_libraries

ONE = Layout(1, 1, 1)


class Workspace:
    """State shared by checks: the recipe, a temporary folder, and undisturbed runs of the tiny recipe.

    Args:
        recipe: the full recipe.
        folder: an empty one, for shards and runs.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        import_for_ranks()
        self._uninterrupted: dict[Layout, Path] = {}

    @cached_property
    def small(self) -> Recipe:
        """The tiny recipe in fp32, saving every second batch. Its first run makes the shards."""
        return prepare(self.recipe, self.folder)

    @cached_property
    def pair(self) -> Layout:
        """A layout of two ranks: expert parallel, or sharded if the recipe has no experts."""
        possible = layouts(self.small, worlds=(2,))
        return next(layout for layout in (Layout(1, 1, 2), Layout(1, 2, 1)) if layout in possible)

    def uninterrupted(self, layout: Layout) -> Path:
        """The folder of the undisturbed run under a layout; trained on first use.

        Raises:
            RankError: if it does not complete.
        """
        if layout not in self._uninterrupted:
            self._uninterrupted[layout] = uninterrupted(self.small, layout)
        return self._uninterrupted[layout]


class HasVerdict(Protocol):
    """A row of any check."""

    @property
    def has_passed(self) -> bool:
        """True if nothing is wrong."""


RowT = TypeVar("RowT", bound=HasVerdict)


@dataclass
class Row:
    """One line of a check's table."""

    what: str
    layout: str
    figures: str
    """Measurements."""
    violations: list[str] = field(default_factory=list)
    """Violations; empty if the row passes."""

    @property
    def has_passed(self) -> bool:
        """True if nothing is wrong."""
        return not self.violations


class Check(ABC, Generic[RowT]):
    """One check: yields rows as it finds them, and formats them."""

    name: str
    """Name of the option, without dashes."""
    page: str
    """The page is `PAGE-RECIPE.html` by default."""
    unit = "rows"

    def __init__(self) -> None:
        self.rows: list[RowT] = []
        self.seconds = 0.0
        self.error = ""
        """Reason why it did not complete, if it did not."""
        self.total = 0
        """Expected number of rows; 0 if unknown."""

    @abstractmethod
    def run(self, workspace: Workspace) -> Iterator[RowT]:
        """The rows, one by one.

        Raises:
            RankError: if it cannot continue.
        """

    @abstractmethod
    def header(self) -> str:
        """The table's first line."""

    @abstractmethod
    def line(self, row: RowT) -> str:
        """A row of the table, with its verdict."""

    @abstractmethod
    def failures(self) -> Iterator[str]:
        """Yields the violations, one line each."""

    @abstractmethod
    def figures(self, recipe: Recipe) -> dict[str, Any]:
        """Everything for ``--json``."""

    @abstractmethod
    def write_page(self, file: Path, recipe: Recipe) -> None:
        """Writes the HTML page."""

    @property
    def passed(self) -> int:
        """Rows that have passed."""
        return sum(row.has_passed for row in self.rows)

    @property
    def has_passed(self) -> bool:
        """True if it completed with at least one row, and every row passed."""
        return not self.error and self.passed == len(self.rows) > 0


class TableCheck(Check[Row]):
    """A check whose rows name an action, its layout, and what was measured."""

    title: str
    """Title of its page, before the recipe's name."""
    text: str
    """Explains the rows on its page."""
    steps = STEPS
    """Length of its runs."""

    def header(self) -> str:
        """The table's first line."""
        return f"{'what':<15} {'layout':<9} verdict  measured"

    def line(self, row: Row) -> str:
        """A row of the table, with its verdict."""
        return f"{row.what:<15} {row.layout:<9} {'pass' if row.has_passed else 'FAIL':<7}  {row.figures}"

    def failures(self) -> Iterator[str]:
        """Yields the violations, one line each."""
        yield from (f"{row.what} {row.layout}: {each}" for row in self.rows for each in row.violations)

    def figures(self, recipe: Recipe) -> dict[str, Any]:
        """Everything for ``--json``."""
        rows = [asdict(row) for row in self.rows]
        return self._summary(recipe) | {"passed": self.has_passed, "rows": rows}

    def write_page(self, file: Path, recipe: Recipe) -> None:
        """Writes the HTML page."""
        rows = [(row.what, row.layout, row.figures, row.violations) for row in self.rows]
        write_certificate(file, self._summary(recipe), rows, self.title, self.text)

    def _summary(self, recipe: Recipe) -> dict[str, Any]:
        return {"recipe": recipe.name, "steps": self.steps, "seconds": round(self.seconds)}


def run_checks(recipe: Recipe, checks: Sequence[Check[Any]], html_file: str | None) -> Figures:
    """Runs checks, prints a table for each and a summary line.

    Args:
        recipe: the full recipe.
        checks: to run, in this order.
        html_file: for the page; with several checks, each one's name goes before the suffix.

    Returns:
        The figures of the check, or of several under `checks` by name; status 1 if a check failed.
    """
    quiet_libraries()
    files = [_page_file(check, recipe, html_file, len(checks) > 1) for check in checks]
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        workspace = Workspace(recipe, Path(folder))
        for check, file in zip(checks, files, strict=True):
            _run_check(check, workspace)
            check.write_page(file, recipe)
    seconds = round(sum(check.seconds for check in checks))
    figures = {check.name: _figures(check, recipe) for check in checks}
    has_passed = all(check.has_passed for check in checks)
    for check in checks:
        for failure in [*check.failures(), *([check.error] if check.error else [])]:
            print(f"FAIL: {check.name}: {failure}", file=sys.stderr)
    passed = ", ".join(
        f"{each.name}: {each.passed} of {len(each.rows)} {each.unit} passed" for each in checks
    )
    verdict = "pass" if has_passed else "FAIL"
    print(f"{verdict}: {passed} in {seconds} s; {', '.join(map(str, files))}")
    status = 0 if has_passed else 1
    if len(checks) == 1:
        return Figures(figures[checks[0].name], status)
    return Figures(
        {"recipe": recipe.name, "seconds": seconds, "passed": has_passed, "checks": figures}, status
    )


def _run_check(check: Check[Any], workspace: Workspace) -> None:
    begun = time.monotonic()
    print(f"{check.name:<9} {check.header()}", flush=True)
    try:
        for row in check.run(workspace):
            check.rows.append(row)
            done = f"{len(check.rows)}/{check.total}" if check.total else len(check.rows)
            print(f"{done:>9} {check.line(row)}", flush=True)
    except RankError as error:
        # The other checks may still be informative.
        check.error = f"did not complete: {str(error).strip().splitlines()[-1]}"
    check.seconds = time.monotonic() - begun


def _figures(check: Check[Any], recipe: Recipe) -> dict[str, Any]:
    return check.figures(recipe) | ({"error": check.error} if check.error else {})


def _page_file(check: Check[Any], recipe: Recipe, html_file: str | None, is_one_of_several: bool) -> Path:
    if html_file is None:
        return Path(f"{check.page}-{recipe.name}.html")
    file = Path(html_file)
    return file.with_stem(f"{file.stem}-{check.name}") if is_one_of_several else file
