"""Figures of the data benchmark and their table."""

from dataclasses import dataclass

from train.record.tables import markdown_table


@dataclass(frozen=True)
class Figure:
    """One number."""

    part: str
    what: str
    value: float
    unit: str
    goal: str = ""
    """A sign and a number, `<= 1`; empty if it is only for comparison."""

    @property
    def is_reached(self) -> bool:
        """True if the goal is reached, or there is none."""
        if not self.goal:
            return True
        sign, bound = self.goal.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)


def table(figures: list[Figure]) -> str:
    """Formats the figures with their goals."""
    rows = []
    for one in figures:
        number = f"{one.value:,.0f}" if abs(one.value) >= 100 else f"{one.value:.3g}"
        missed = "" if one.is_reached else ", **not reached**"
        rows.append((one.part, one.what, f"{number} {one.unit}", f"{one.goal}{missed}"))
    return markdown_table(("part", "what", "figure", "goal"), rows, "<<><")
