"""The guard: decides whether to apply a step's update, given spikes, non-finite numbers, collapsed routers.

A step is judged by its loss and gradient norm over all ranks, before the update. A spike is measured against
the median of the last applied steps, in median absolute deviations, which a few outliers do not widen (Hampel
1974). All ranks judge the same numbers, so they decide alike under every layout. The history is saved in the
checkpoint, so a resumed run decides alike too. No torch.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from train.recipe.reliability import Guard as GuardRecipe
from train.recipe.reliability import OnCollapse, OnSpike

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
LEAST_SHARE = 0.01
"""The least deviation, as a share of the median: on a flat loss curve, ripples are not spikes."""


class Action(str, Enum):
    """The action taken on a step."""

    apply = "apply"
    skip = "skip"
    rollback = "rollback"
    replay = "replay"
    stop = "stop"


@dataclass(frozen=True)
class Verdict:
    """The guard's verdict on a step."""

    action: Action
    alarms: list[str] = field(default_factory=list)
    """One line each; empty for an ordinary step."""
    batches: int = 1
    """Batches that caused the alarm, up to this one: more than 1 for a collapse, which must last first."""


@dataclass(frozen=True)
class RouterLoad:
    """The worst layer's router load in a batch."""

    entropy: float
    """Lowest entropy of any layer's shares, relative to uniform shares."""
    dead_share: float
    """Largest fraction of a layer's experts without a token."""
    busiest_over_mean: float
    """Largest load of an expert relative to its layer's mean."""


class UpdateGuard:
    """Judges step after step.

    Args:
        recipe: bounds and actions.
        recent: loss and gradient norm of the last applied steps, from a checkpoint.
        counts: consecutive skipped updates, and consecutive batches with collapsed routers, likewise.
    """

    def __init__(
        self,
        recipe: GuardRecipe,
        recent: Sequence[Sequence[float]] = (),
        counts: Sequence[int] = (0, 0),
    ) -> None:
        self.recipe = recipe
        self._recent = deque(((pair[0], pair[1]) for pair in recent), maxlen=recipe.window_batches)
        self._skips, self._collapsed = counts

    @property
    def recent(self) -> list[list[float]]:
        """Loss and gradient norm of the last applied steps, for a checkpoint."""
        return [list(pair) for pair in self._recent]

    @property
    def counts(self) -> list[int]:
        """Consecutive skipped updates, and consecutive batches with collapsed routers, for a checkpoint."""
        return [self._skips, self._collapsed]

    def judge(self, loss: float, norm: float, load: RouterLoad | None = None) -> Verdict:
        """Judges a step before its update.

        Args:
            loss: mean cross-entropy over all ranks, nats per token.
            norm: global gradient norm before clipping.
            load: router load; None for a dense model.
        """
        alarms = self._collapse(load)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            alarms.append(f"not finite: loss {loss}, gradient norm {norm}")
            return self._skipping(Action(self.recipe.nonfinite.value), alarms)
        spikes = [
            *_spike(
                "loss", loss, [pair[0] for pair in self._recent], self.recipe.loss_deviations, self._least
            ),
            *_spike(
                "gradient norm",
                norm,
                [pair[1] for pair in self._recent],
                self.recipe.norm_deviations,
                self._least,
            ),
        ]
        alarms += spikes
        if spikes and self.recipe.on_spike is not OnSpike.alarm:
            return self._skipping(Action(self.recipe.on_spike.value), alarms)
        self._skips = 0
        self._recent.append((loss, norm))
        has_lasted = self._collapsed >= self.recipe.collapse_batches
        if has_lasted and self.recipe.on_collapse is not OnCollapse.alarm:
            return Verdict(Action(self.recipe.on_collapse.value), alarms, self._collapsed)
        return Verdict(Action.apply, alarms)

    @property
    def _least(self) -> int:
        """Applied steps needed before anything counts as a spike."""
        return max(8, self.recipe.window_batches // 4)

    def _skipping(self, action: Action, alarms: list[str]) -> Verdict:
        self._skips += 1
        if action is Action.skip and self._skips > self.recipe.most_skips:
            alarms.append(f"{self._skips} updates in a row would be skipped; guard.most_skips allows fewer")
            action = Action.stop
        return Verdict(action, alarms)

    def _collapse(self, load: RouterLoad | None) -> list[str]:
        """Returns an alarm in the batch in which the routers have been collapsed for long enough."""
        recipe = self.recipe
        if load is None:
            return []
        reasons = []
        if load.entropy < recipe.least_entropy:
            reasons.append(f"entropy {load.entropy:.3f} below {recipe.least_entropy}")
        if load.dead_share > recipe.most_dead_share:
            reasons.append(f"{load.dead_share:.0%} of a layer's experts are dead")
        if load.busiest_over_mean > recipe.most_busiest_over_mean:
            reasons.append(f"an expert has {load.busiest_over_mean:.1f} times its layer's mean load")
        self._collapsed = self._collapsed + 1 if reasons else 0
        if self._collapsed != recipe.collapse_batches:
            return []
        return [f"routers collapsed, {self._collapsed} batches in a row: {', '.join(reasons)}"]


def _spike(name: str, value: float, before: list[float], bound: float | None, least: int) -> list[str]:
    """Returns an alarm if a value stands out above the previous ones."""
    if bound is None or len(before) < least:
        return []
    median = statistics.median(before)
    mad = statistics.median(abs(one - median) for one in before)
    deviation = max(DEVIATIONS_PER_MAD * mad, LEAST_SHARE * abs(median), 1e-12)
    if value <= median + bound * deviation:
        return []
    times = value / median if median > 0 else math.inf
    return [
        f"spike: {name} {value:.4g} is {times:.3g} x the median of the last {len(before)} steps "
        f"({(value - median) / deviation:.0f} deviations above it)"
    ]
