"""The progress of a run and the time that is left, from its records."""

import time
from dataclasses import dataclass

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.units import duration
from train.record import metrics
from train.record.lease import seen_holder
from train.record.run_folder import RECIPE_FILE
from train.record.step_log import TIMESTAMP, TOKENS
from train.report.run_record import RunRecord

PACE_STEPS = 200
"""The newest steps, whose pace is taken for the rest."""


@dataclass(frozen=True)
class Outlook:
    """The progress of a run that is not complete."""

    share: float
    """Share of its tokens that are trained."""
    seconds_left: float
    """At the pace of the newest steps, evaluations and saves included; NaN before a step was timed."""
    is_training: bool
    """Whether a process trains in its folder now."""
    as_of: float
    """Time of its last record, in seconds since 1970."""

    def __str__(self) -> str:
        known = self.seconds_left == self.seconds_left
        rest = f"{duration(self.seconds_left)} left" if known else "no step timed yet"
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.as_of))
        state = rest if self.is_training else f"stopped, {rest} once resumed"
        return f"{self.share:.1%} done, {state}, as of {when}"


def progress_of(run: RunRecord) -> Outlook | None:
    """Returns the progress of a run; None if it is complete, has no step yet, or its recipe can't be read."""
    if run.summary is not None or not run.steps:
        return None
    try:
        total = load_recipe(run.run_dir / RECIPE_FILE).training.duration_tokens
    except UserError:
        return None
    last = run.steps[-1]
    newest = run.steps[-PACE_STEPS - 1 :]
    parts = (metrics.TIME_STEP, metrics.TIME_EVALUATION, metrics.TIME_CHECKPOINT)
    seconds = sum(line.get(part) or 0.0 for line in newest[1:] for part in parts)
    tokens = last[TOKENS] - newest[0][TOKENS]
    left = max(0.0, total - last[TOKENS]) * seconds / tokens if tokens > 0 and seconds > 0 else float("nan")
    return Outlook(
        min(1.0, last[TOKENS] / total),
        left,
        seen_holder(run.run_dir) is not None,
        float(last.get(TIMESTAMP) or 0.0),
    )
