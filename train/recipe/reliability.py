"""The schema's part for reliability: preflight, update guard, watchdog."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.keys import key


class OnNonfinite(str, Enum):
    """Response to a step whose loss or gradient is not finite."""

    replay = "replay"
    rollback = "rollback"
    skip = "skip"
    stop = "stop"


class OnSpike(str, Enum):
    """Response to a spike of the loss or the gradient norm."""

    alarm = "alarm"
    rollback = "rollback"
    skip = "skip"


class OnCollapse(str, Enum):
    """Response to a router collapse."""

    alarm = "alarm"
    rollback = "rollback"
    stop = "stop"


class PreflightWhen(str, Enum):
    """The runs that check their machines before they start."""

    multi_node = "multi_node"
    always = "always"
    never = "never"


@dataclass(frozen=True)
class Preflight:
    """Check of nodes and links before a run, also as `python -m launch.preflight`; see docs/faults.md."""

    when: PreflightWhen = PreflightWhen.multi_node
    """`multi_node` (only runs over several nodes), `always` or `never`."""
    least_disk_bytes: int = key(10_000_000_000, at_least=0)
    """Minimum free space in runs_dir."""
    least_disk_speed: float = key(0.0, at_least=0)
    """Minimum write speed of runs_dir in bytes per second; 0: reported, not enforced."""
    most_skew_seconds: float = key(2.0, at_least=0)
    """Maximum difference of a rank's clock from the median rank's."""
    slow_factor: float = key(3.0, above=1, remedy="must be above 1; 3 is usual")
    """A rank or pair of ranks is slow if it takes at least this many times the median of the others."""
    expected_gigabits: Optional[float] = key(None, above=0)
    """Expected bus bandwidth of collectives in Gbit/s; less than this over slow_factor is slow. null:
    reported, not enforced."""
    stop_on_slow: bool = False
    """Refuse to start if a rank or pair is slow; otherwise it is only reported."""


@dataclass(frozen=True)
class Guard:
    """Guard of the optimizer updates; see docs/faults.md. Alarms are printed and kept in `alarms.jsonl`."""

    nonfinite: OnNonfinite = OnNonfinite.replay
    """Response to a non-finite step, whose update is never applied. `replay` ends the run with status 77, to
    be resumed from the newest checkpoint: a transient hardware error will not recur. `rollback`: see
    on_spike; `skip` continues with the next batch; `stop` ends the run."""
    on_spike: OnSpike = OnSpike.alarm
    """`alarm` raises an alarm and applies the update; `skip` discards the update; `rollback` ends the run
    with status 77, to be resumed from a checkpoint before the spike, skipping the batches around it
    (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 5.1)."""
    rollback_before_batches: int = key(100, at_least=0)
    """Batches that a rollback skips before the one that raised the alarm, as far back as checkpoints reach
    (checkpoint.keep_last). PaLM went back roughly 100 steps."""
    rollback_after_batches: int = key(100, at_least=0)
    """Batches that a rollback skips after it. PaLM skipped roughly 200 to 500 batches in all."""
    most_rollbacks: int = key(10, above=0)
    """Maximum number of rollbacks in a run; one more ends it."""
    window_batches: int = key(128, above=0)
    """Number of applied steps whose median and median absolute deviation a step is compared with."""
    loss_deviations: Optional[float] = key(8.0, above=0)
    """A loss this many deviations above the median is a spike; null: never."""
    norm_deviations: Optional[float] = key(100.0, above=0)
    """The same for the gradient norm; null: never. One sequence can lift the norm of a batch of 8 to 5 times
    the median, 30 deviations, in sound runs: its first tokens, early in training. Clipping takes care of it.
    With 256 sequences or more, 20 is enough."""
    most_skips: int = key(10, at_least=0)
    """Maximum number of consecutive skipped updates; one more ends the run."""
    least_entropy: float = key(0.3, at_least=0, at_most=1)
    """A router has collapsed if the entropy of its experts' shares, relative to equal shares, is below
    this."""
    most_dead_share: float = key(0.5, at_least=0, at_most=1)
    """A router has collapsed if more than this share of its experts gets no token of a batch."""
    most_busiest_over_mean: float = key(8.0, above=0)
    """A router has collapsed if an expert takes more than this many times the mean load."""
    collapse_batches: int = key(20, above=0)
    """Consecutive batches after which a collapse raises an alarm."""
    recheck_interval_batches: Optional[int] = key(None, above=0)
    """Batches between steps that are computed again from the same data and compared bit for bit, in place
    and on other ranks, to find machines that compute wrongly in silence; also where the guard would raise an
    alarm. Costs two forward and backward passes each time, one if all ranks share experts; null: never."""
    on_collapse: OnCollapse = OnCollapse.alarm
    """Response to that alarm: `alarm` continues, `stop` ends the run, `rollback` goes back to before the
    collapse."""


@dataclass(frozen=True)
class Watch:
    """Watchdog for hangs and stragglers; see docs/faults.md."""

    hang_seconds: Optional[float] = key(600.0, above=0)
    """Seconds without a heartbeat after which a rank counts as hung. Must exceed the longest pause: between
    two microbatches, between two evaluation batches, or for a blocking save. The job then names the rank and
    ends with status 76, to be restarted. null: no watchdog."""
    start_seconds: float = key(1800.0, above=0)
    """The same until the first batch is trained, while weights are initialised or loaded."""
    straggler_interval_batches: Optional[int] = key(50, above=0)
    """Batches between comparisons of the ranks' own time per step, on gloo with a watchdog; null: none."""
    straggler_factor: float = key(1.3, above=1, remedy="must be above 1; 1.3 reports ranks 30% slower")
    """A rank is a straggler if it takes at least this many times the median rank's own time per step."""
