"""A finding of the bring-up check, and the table of them."""

from dataclasses import dataclass

from train.record.tables import markdown_table


@dataclass(frozen=True)
class CheckRow:
    """One thing that was checked."""

    part: str
    """kernels, numerics, memory or speed."""
    what: str
    found: str
    wanted: str
    """The bound, or what was expected; empty where a figure is only reported."""
    passed: bool = True


def table(rows: list[CheckRow]) -> str:
    """The findings as a Markdown table."""
    cells = [(row.part, row.what, row.found, row.wanted, "ok" if row.passed else "**FAIL**") for row in rows]
    return markdown_table(("part", "what", "found", "wanted", ""), cells, "<<>><")


def deviation_row(part: str, what: str, deviation: float, bound: float) -> CheckRow:
    """A relative error against its bound; not-a-number fails."""
    return CheckRow(part, what, f"{deviation:.1e}", f"<= {bound:.0e}", deviation <= bound)
