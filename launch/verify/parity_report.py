"""The parity gate's results as a text table, HTML and JSON."""

from pathlib import Path
from typing import Any

from launch.verify.bounds import QUANTITIES, bounds_of
from launch.verify.case_run import CaseOutcome
from launch.verify.cases import INPUTS
from train.recipe.schema import Precision
from train.record.page.rendering import render


def header() -> str:
    """The table's first line."""
    return f"{'layout':<11} {'input':<12}{'':<5}" + "".join(f"{q:>11}" for q in QUANTITIES) + "   verdict"


def line(outcome: CaseOutcome) -> str:
    """One case as a line: the largest relative error of each quantity, marked `!` if it exceeds its bound."""
    cells = "".join(
        f"{_figure(outcome, quantity):>10}{'!' if _is_over(outcome, quantity) else ' '}"
        for quantity in QUANTITIES
    )
    verdict = "pass" if outcome.has_passed else "FAIL"
    return (
        f"{outcome.case.layout!s:<11} {outcome.case.input.name:<12}{outcome.case.precision.value:<5}{cells}"
        f"   {verdict} {outcome.seconds:.1f} s"
    )


def first_difference(outcomes: list[CaseOutcome]) -> str:
    """The first value above its bound in the first failed case; empty if all passed."""
    for outcome in outcomes:
        case = outcome.case
        where = f"layout {case.layout}, input {case.input.name}, {case.precision.value}"
        if outcome.error:
            return f"{where}: did not run: {outcome.error.strip().splitlines()[-1]}"
        for quantity in ("read", "settings", "gradients", "weights", *QUANTITIES):
            deviation = outcome.deviations[quantity]
            if deviation.first:
                return f"{where}: {quantity} first differ at {deviation.first}; worst {deviation.worst:.1e}"
    return ""


def as_figures(summary: dict[str, Any], outcomes: list[CaseOutcome]) -> dict[str, Any]:
    """Everything for ``--json``."""
    return {
        **summary,
        "passed": all(outcome.has_passed for outcome in outcomes),
        "bounds": {precision.value: bounds for precision, bounds in _bounds(outcomes).items()},
        "first_difference": first_difference(outcomes),
        "cases": [
            {
                "layout": str(outcome.case.layout),
                "input": outcome.case.input.name,
                "precision": outcome.case.precision.value,
                "passed": outcome.has_passed,
                "seconds": round(outcome.seconds, 2),
                "error": outcome.error,
                "largest_relative_error": {q: d.worst for q, d in outcome.deviations.items()},
                "worst_at": {q: d.at for q, d in outcome.deviations.items()},
                "first_over_bound": {q: d.first for q, d in outcome.deviations.items() if d.first},
            }
            for outcome in outcomes
        ],
    }


def _bounds(outcomes: list[CaseOutcome]) -> dict[Precision, dict[str, float]]:
    """Returns the widest bounds of each precision: some layouts round more often than others."""
    widest: dict[Precision, dict[str, float]] = {}
    for case in (outcome.case for outcome in outcomes):
        bounds = bounds_of(case.precision, case.recipe)
        known = widest.setdefault(case.precision, bounds)
        widest[case.precision] = {quantity: max(bound, known[quantity]) for quantity, bound in bounds.items()}
    return widest


def write_html(file: Path, summary: dict[str, Any], outcomes: list[CaseOutcome]) -> None:
    """Writes a self-contained page: what was run, the table, and the first difference if there is one."""
    file.write_text(
        render(
            "launch/verify/parity.html.j2",
            title=f"Parity of {summary['recipe']}",
            summary=summary,
            passed=sum(outcome.has_passed for outcome in outcomes),
            difference=first_difference(outcomes),
            inputs={each.name: each.what for each in INPUTS},
            quantities=QUANTITIES,
            bounds=_bounds(outcomes),
            cases=[_page_row(outcome) for outcome in outcomes],
        )
    )


def write_certificate(
    file: Path,
    summary: dict[str, Any],
    rows: list[tuple[str, str, str, list[str]]],
    title: str,
    text: str,
) -> None:
    """Writes a certificate as a page: actions, layouts, measurements and violations.

    Args:
        file: the page.
        summary: holds the recipe's name.
        rows: action, layout, measurement, and violations.
        title: precedes the recipe's name.
        text: explains the rows.
    """
    file.write_text(
        render(
            "launch/verify/certificate.html.j2",
            title=f"{title} {summary['recipe']}",
            text=text,
            rows=rows,
            passed=sum(not violations for *_, violations in rows),
        )
    )


def _page_row(outcome: CaseOutcome) -> dict[str, Any]:
    cells = [
        {
            "figure": _figure(outcome, quantity),
            "is_over": _is_over(outcome, quantity),
            "place": _place(outcome, quantity),
        }
        for quantity in QUANTITIES
    ]
    return {
        "layout": str(outcome.case.layout),
        "input": outcome.case.input.name,
        "precision": outcome.case.precision.value,
        "cells": cells,
        "has_passed": outcome.has_passed,
        "error": outcome.error,
    }


def _figure(outcome: CaseOutcome, quantity: str) -> str:
    deviation = outcome.deviations.get(quantity)
    return "-" if deviation is None else f"{deviation.worst:.1e}"


def _place(outcome: CaseOutcome, quantity: str) -> str:
    deviation = outcome.deviations.get(quantity)
    return "" if deviation is None else deviation.at


def _is_over(outcome: CaseOutcome, quantity: str) -> bool:
    return quantity in outcome.deviations and bool(outcome.deviations[quantity].first)
