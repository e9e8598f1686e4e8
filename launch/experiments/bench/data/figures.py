"""A figure of the data benchmark, and all of them as a table."""

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
    """A sign and a number, `<= 1`; empty: stands beside another."""

    @property
    def is_reached(self) -> bool:
        """Whether the goal is."""
        if not self.goal:
            return True
        sign, bound = self.goal.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)


def table(figures: list[Figure]) -> str:
    """The figures beside their goals."""
    rows = []
    for one in figures:
        number = f"{one.value:,.0f}" if abs(one.value) >= 100 else f"{one.value:.3g}"
        missed = "" if one.is_reached else ", **not reached**"
        rows.append((one.part, one.what, f"{number} {one.unit}", f"{one.goal}{missed}"))
    return markdown_table(("part", "what", "figure", "goal"), rows, "<<><")
