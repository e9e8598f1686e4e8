"""Findings of the bring-up check and their table."""

from dataclasses import dataclass

from train.record.tables import markdown_table


@dataclass(frozen=True)
class CheckRow:
    """A finding of the bring-up check."""

    part: str
    """compiler, kernels, attention, numerics, memory or speed."""
    what: str
    found: str
    wanted: str
    """The bound or the expected value; empty if a figure is only reported."""
    passed: bool = True


def table(rows: list[CheckRow]) -> str:
    """Formats the findings as a Markdown table."""
    cells = [(row.part, row.what, row.found, row.wanted, "ok" if row.passed else "**FAIL**") for row in rows]
    return markdown_table(("part", "what", "found", "wanted", ""), cells, "<<>><")


def deviation_row(part: str, what: str, deviation: float, bound: float) -> CheckRow:
    """Returns the finding on a relative error and its bound; NaN fails."""
    return CheckRow(part, what, f"{deviation:.1e}", f"<= {bound:.0e}", deviation <= bound)
