"""The part of a recipe's schema that says what becomes of faults: preflight, guard of updates, watchdog."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.keys import key


class OnNonfinite(str, Enum):
    """What becomes of a step whose loss or gradient is not finite."""

    replay = "replay"
    rollback = "rollback"
    skip = "skip"
    stop = "stop"


class OnSpike(str, Enum):
    """What becomes of a step whose loss or gradient norm is a spike."""

    alarm = "alarm"
    rollback = "rollback"
    skip = "skip"


class OnCollapse(str, Enum):
    """What becomes of a run whose routers have collapsed."""

    alarm = "alarm"
    rollback = "rollback"
    stop = "stop"


class PreflightWhen(str, Enum):
    """Which runs check their machines before they start."""

    multi_node = "multi_node"
    always = "always"
    never = "never"


@dataclass(frozen=True)
class Preflight:
    """The check of nodes and links before a run; also `python -m launch.preflight`; docs/faults.md."""

    when: PreflightWhen = PreflightWhen.multi_node
    """`multi_node`: runs over several nodes begin with it; `always` or `never`."""
    least_disk_bytes: int = key(10_000_000_000, at_least=0)
    """Room that the folder of runs must have."""
    least_disk_speed: float = key(0.0, at_least=0)
    """Bytes per second that it must take; 0: only told."""
    most_skew_seconds: float = key(2.0, at_least=0)
    """Largest difference of a rank's clock from the median rank's."""
    slow_factor: float = key(3.0, above=1, remedy="must be above 1; 3 is usual")
    """A rank or pair is slow from this many times the median of the others."""
    expected_gigabits: Optional[float] = key(None, above=0)
    """Bus bandwidth of collectives in Gbit/s; slow is less than this over slow_factor. null: only told."""
    stop_on_slow: bool = False
    """Do not start where a rank or pair is slow; otherwise it is only named."""


@dataclass(frozen=True)
class Guard:
    """Which updates are applied; docs/faults.md. Alarms go to the screen and to `alarms.jsonl`."""

    nonfinite: OnNonfinite = OnNonfinite.replay
    """Of a step that is not finite no update is ever applied. `replay` ends the run with status 77, to be
    resumed from the newest checkpoint: a passing fault of a machine does not come back. `rollback` as below;
    `skip` goes on with the next batch; `stop` ends the run."""
    on_spike: OnSpike = OnSpike.alarm
    """`alarm` says so and applies the update; `skip` leaves it out; `rollback` ends the run with status 77,
    to be resumed from a checkpoint before the spike with the data around it left out (Chowdhery et al. 2022,
    PaLM, arXiv 2204.02311, section 5.1)."""
    rollback_before_batches: int = key(100, at_least=0)
    """Batches before the one of the alarm that a rollback leaves out with it, as far as checkpoints reach
    (checkpoint.keep_last). PaLM went back roughly 100 steps ..."""
    rollback_after_batches: int = key(100, at_least=0)
    """... and behind it. PaLM left out roughly 200 to 500 batches in all."""
    most_rollbacks: int = key(10, above=0)
    """Of a run; one more ends it."""
    window_batches: int = key(128, above=0)
    """Applied steps whose median and median absolute deviation a step is compared with."""
    loss_deviations: Optional[float] = key(8.0, above=0)
    """A loss this many deviations above the median is a spike; null: never."""
    norm_deviations: Optional[float] = key(20.0, above=0)
    """The same of the gradient norm, which has a longer tail; null: never."""
    most_skips: int = key(10, at_least=0)
    """Updates that may be skipped in a row; one more ends the run."""
    least_entropy: float = key(0.3, at_least=0, at_most=1)
    """A layer's router has collapsed below this entropy of its experts' shares over that of equal ones."""
    most_dead_share: float = key(0.5, at_least=0, at_most=1)
    """... or when more than this share of its experts gets no token of a batch."""
    most_busiest_over_mean: float = key(8.0, above=0)
    """... or when an expert takes more than this many times the mean load."""
    collapse_batches: int = key(20, above=0)
    """Batches in a row after which a collapse raises an alarm."""
    on_collapse: OnCollapse = OnCollapse.alarm
    """At that alarm: `alarm` goes on, `stop` ends the run, `rollback` goes back to before it began."""


@dataclass(frozen=True)
class Watch:
    """Hangs and stragglers; docs/faults.md."""

    hang_seconds: Optional[float] = key(600.0, above=0)
    """Seconds without any movement after which a rank is taken to hang: longer than the longest pause
    between two microbatches, two evaluation batches, or a save that is waited for. The job then names the
    rank and ends with status 76, to be restarted. null: nothing is watched."""
    start_seconds: float = key(1800.0, above=0)
    """The same before the first batch is trained, while weights are made or loaded."""
    straggler_interval_batches: Optional[int] = key(50, above=0)
    """Batches between comparisons of the ranks' own time per step, on gloo under a watchdog; null: none."""
    straggler_factor: float = key(1.3, above=1, remedy="must be above 1; 1.3 names what is 30% slow")
    """A rank is named slow from this many times the median rank's own time per step."""
