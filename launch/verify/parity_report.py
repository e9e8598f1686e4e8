"""The parity gate's result as a table on the screen, as HTML and as JSON."""

import html
from pathlib import Path
from typing import Any

from launch.verify.bounds import BOUNDS, QUANTITIES
from launch.verify.case_run import CaseOutcome
from launch.verify.cases import INPUTS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .7em; text-align: right }
th { border-bottom: 2px solid #57606a } td { border-bottom: 1px solid #d0d7de }
td.text, th.text { text-align: left } .pass { color: #116329 } .fail { color: #fff; background: #a40e26 }
caption { text-align: left; padding-bottom: .5em }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } .pass { color: #56d364 }
 td { border-color: #30363d } }
"""


def header() -> str:
    """The table's first line."""
    return f"{'layout':<9} {'input':<12}{'':<5}" + "".join(f"{q:>11}" for q in QUANTITIES) + "   verdict"


def line(outcome: CaseOutcome) -> str:
    """One case as a line: the largest relative error of each quantity, `!` where it is over its bound."""
    cells = "".join(
        f"{_figure(outcome, quantity):>10}{'!' if _is_over(outcome, quantity) else ' '}"
        for quantity in QUANTITIES
    )
    verdict = "pass" if outcome.has_passed else "FAIL"
    return (
        f"{outcome.case.layout!s:<9} {outcome.case.input.name:<12}{outcome.case.precision.value:<5}{cells}"
        f"   {verdict} {outcome.seconds:.1f} s"
    )


def first_difference(outcomes: list[CaseOutcome]) -> str:
    """The first value of the first failed case that is over its bound; empty if all passed."""
    for outcome in outcomes:
        case = outcome.case
        where = f"layout {case.layout}, input {case.input.name}, {case.precision.value}"
        if outcome.error:
            return f"{where}: did not run: {outcome.error.strip().splitlines()[-1]}"
        for quantity in ("gradients", "weights", *QUANTITIES):
            deviation = outcome.deviations[quantity]
            if deviation.first:
                return f"{where}: {quantity} differ first at {deviation.first}; worst {deviation.worst:.1e}"
    return ""


def as_figures(summary: dict[str, Any], outcomes: list[CaseOutcome]) -> dict[str, Any]:
    """Everything for ``--json``."""
    return {
        **summary,
        "passed": all(outcome.has_passed for outcome in outcomes),
        "bounds": {precision.value: bounds for precision, bounds in BOUNDS.items()},
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


def write_html(file: Path, summary: dict[str, Any], outcomes: list[CaseOutcome]) -> None:
    """One page that stands alone: what was run, the table, and the first difference if there is one."""
    passed = sum(outcome.has_passed for outcome in outcomes)
    verdict = "pass" if passed == len(outcomes) else "fail"
    head = "".join(f"<th>{html.escape(q)}</th>" for q in QUANTITIES)
    bounds = "".join(
        f"<tr><td class=text colspan=2>bound</td><td class=text>{precision.value}</td>"
        + "".join(f"<td>{limits[q]:.1e}</td>" for q in QUANTITIES)
        + "<td></td></tr>"
        for precision, limits in BOUNDS.items()
    )
    facts = "".join(
        f"<tr><td class=text>{html.escape(key)}</td><td class=text>{html.escape(str(value))}</td></tr>"
        for key, value in summary.items()
    )
    inputs = "".join(f"<li><b>{i.name}</b>: {html.escape(i.what)}</li>" for i in INPUTS)
    difference = first_difference(outcomes)
    file.write_text(
        f"<!doctype html><meta charset=utf-8><title>Parity of {html.escape(str(summary['recipe']))}</title>"
        f"<style>{STYLE}</style><h1>Parity of {html.escape(str(summary['recipe']))}</h1>"
        f"<p><b class={verdict}>{passed} of {len(outcomes)} cases passed.</b> {html.escape(difference)}</p>"
        "<p>Largest relative error of each quantity against one process without sharding, over all steps, "
        "parameters, experts and ranks; a tensor's error is the Euclidean norm of its difference. In bf16 "
        "the process rounds where FSDP2 does, "
        "every step begins from its weights, and weights are measured against the change of a step.</p>"
        f"<table>{facts}</table><ul>{inputs}</ul>"
        "<table><caption>A layout is (replicate, shard, expert).</caption>"
        f"<tr><th class=text>layout</th><th class=text>input</th>{head}<th>verdict</th></tr>"
        f"<tr><td class=text colspan=2>bound</td>{bounds}<td></td></tr>"
        f"{''.join(_html_row(outcome) for outcome in outcomes)}</table>"
    )


def write_certificate(
    file: Path, summary: dict[str, Any], rows: list[tuple[str, str, str, list[str]]]
) -> None:
    """The resume certificate: what was done, under which layout, what was measured, what was wrong."""
    name = html.escape(str(summary["recipe"]))
    lines = ""
    for what, layout, figures, faults in rows:
        verdict = "fail" if faults else "pass"
        texts = "".join(f"<td class=text>{html.escape(text)}</td>" for text in (what, layout, figures))
        wrong = html.escape("; ".join(faults))
        lines += f"<tr>{texts}<td class={verdict}>{verdict}</td><td class=text>{wrong}</td></tr>"
    passed = sum(not faults for *_, faults in rows)
    verdict = "pass" if passed == len(rows) else "fail"
    file.write_text(
        f"<!doctype html><meta charset=utf-8><title>Resuming {name}</title><style>{STYLE}</style>"
        f"<h1>Resuming {name}</h1><p><b class={verdict}>{passed} of {len(rows)} rows passed.</b> "
        f"Runs of {summary['steps']} steps of the shrunken recipe, fp32. After kill -9 the same command goes "
        "on: losses, gradient norms, weights, optimizer and random-number states equal those of a run that "
        "was not killed, bit for bit. A run that is preempted goes on under another layout (replicate, "
        "shard, expert): every loaded tensor equals what was saved.</p>"
        "<table><tr><th class=text>what</th><th class=text>layout</th><th class=text>measured</th>"
        f"<th>verdict</th><th class=text>wrong</th></tr>{lines}</table>"
    )


def _html_row(outcome: CaseOutcome) -> str:
    cells = "".join(
        f'<td class={"fail" if _is_over(outcome, q) else "pass"} title="{html.escape(_place(outcome, q))}">'
        f"{_figure(outcome, q)}</td>"
        for q in QUANTITIES
    )
    verdict = "pass" if outcome.has_passed else "fail"
    return (
        f"<tr><td class=text>{outcome.case.layout}</td><td class=text>{outcome.case.input.name}</td>"
        f"<td class=text>{outcome.case.precision.value}</td>{cells}"
        f'<td class={verdict} title="{html.escape(outcome.error)}">{verdict}</td></tr>'
    )


def _figure(outcome: CaseOutcome, quantity: str) -> str:
    deviation = outcome.deviations.get(quantity)
    return "-" if deviation is None else f"{deviation.worst:.1e}"


def _place(outcome: CaseOutcome, quantity: str) -> str:
    deviation = outcome.deviations.get(quantity)
    return "" if deviation is None else deviation.at


def _is_over(outcome: CaseOutcome, quantity: str) -> bool:
    return quantity in outcome.deviations and bool(outcome.deviations[quantity].first)
