"""Events of a run, which its charts mark: phases, changes of the recipe, restarts, alarms."""

from collections.abc import Iterator

from train.recipe.curriculum import plan_stages
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.units import short_number
from train.record.page.svg import COLOURS, Mark
from train.record.run_folder import RECIPE_FILE
from train.record.step_log import STEP, TOKENS
from train.report.goodput import tries_of
from train.report.run_record import RunRecord

PHASE, CHANGE, RESTART, ALARM = "phase", "change of the recipe", "restart", "alarm"
KINDS = {PHASE: "#94a3b8", CHANGE: COLOURS[3], RESTART: COLOURS[5], ALARM: COLOURS[4]}
SHORT = 0.07
"""Height of an alarm's mark, as a share of the chart's: there may be many."""
SHOWN_KEYS = 4


def marks_of(run: RunRecord) -> list[Mark]:
    """Returns the events of a run in order of their place, without those before its first step."""
    if not run.steps:
        return []
    last = run.steps[-1][TOKENS]
    found = [*_phases(run), *_changes(run), *_restarts(run), *_alarms(run)]
    return sorted(
        (
            Mark(tokens / 1e6, text, KINDS[kind], SHORT if kind == ALARM else 1.0)
            for kind, tokens, text in found
            if 0 < tokens <= last
        ),
        key=lambda mark: mark.tokens,
    )


def kinds_of(marks: list[Mark]) -> list[tuple[str, str, str]]:
    """Returns the kinds among some marks as entries of a legend."""
    colours = {mark.colour for mark in marks}
    return [(kind, colour, "") for kind, colour in KINDS.items() if colour in colours]


def step_places(run: RunRecord) -> list[tuple[float, int]]:
    """Returns million tokens and number of the steps between which tokens grow evenly with steps."""
    places: list[tuple[float, int]] = []
    lines = run.steps
    for n, line in enumerate(lines):
        inside = 0 < n < len(lines) - 1
        if not inside or _tokens_per_step(lines[n - 1], line) != _tokens_per_step(line, lines[n + 1]):
            places.append((line[TOKENS] / 1e6, line[STEP]))
    return places


def _tokens_per_step(before: dict[str, float], after: dict[str, float]) -> float:
    return (after[TOKENS] - before[TOKENS]) / ((after[STEP] - before[STEP]) or 1)


def _phases(run: RunRecord) -> Iterator[tuple[str, float, str]]:
    """Yields the stages after the first, as the recipe has them now."""
    try:
        curriculum = plan_stages(load_recipe(run.run_dir / RECIPE_FILE))
    except UserError:  # of another version
        return
    for stage in curriculum.stages[1:]:
        weights = ", ".join(f"{domain} {weight:.3g}" for domain, weight in stage.weights.items())
        tokens = stage.first_sample * curriculum.sample_tokens
        yield PHASE, tokens, f"phase {stage.phase + 1}: {weights}"


def _changes(run: RunRecord) -> Iterator[tuple[str, float, str]]:
    for change in run.changes:
        what = f"fork of {change.fork_of}" if change.fork_of else "resumed"
        keys = [f"{each.key} {_plain(each.before)} to {_plain(each.now)}" for each in change.keys]
        more = [f"{len(keys) - SHOWN_KEYS} more"] if len(keys) > SHOWN_KEYS else []
        yield CHANGE, change.tokens, f"{what}: {', '.join([*keys[:SHOWN_KEYS], *more]) or 'nothing changed'}"


def _restarts(run: RunRecord) -> Iterator[tuple[str, float, str]]:
    """Yields the supervisor's tries after the first, before the first step that ended after they began."""
    for number, begun in enumerate(tries_of(run.run_dir)[1:], start=2):
        before = [line for line in run.steps if line.get("time", 0) < begun]
        if before and len(before) < len(run.steps):
            tokens = before[-1][TOKENS]
            yield RESTART, tokens, f"try {number} of the supervisor, after {short_number(tokens)} tokens"


def _alarms(run: RunRecord) -> Iterator[tuple[str, float, str]]:
    places = {line[STEP]: line[TOKENS] for line in run.steps}
    for alarm in run.alarms:
        if alarm.step in places:
            yield ALARM, places[alarm.step], f"alarm: {'; '.join(alarm.reasons)} ({alarm.action})"


def _plain(value: object) -> str:
    return "null" if value is None else str(value)
