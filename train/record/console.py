"""Progress on the console: a line every few batches, and a progress bar on a terminal."""

import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from tqdm import tqdm

from train.recipe.units import duration, short_number
from train.record import log, metrics


class Console(LoggerDestination):
    """Logs the run's progress as means over the batches since the previous line; for rank 0 only.

    Args:
        total_batches: length of the run.
        interval_batches: batches between lines; the first and the last batch have lines too.
        bar: stream of the progress bar, standard error by default; drawn only on a terminal.
    """

    def __init__(
        self,
        total_batches: int,
        interval_batches: int,
        bar: TextIO | None = None,
    ) -> None:
        self.total, self.interval = total_batches, interval_batches
        bar_stream = bar or sys.stderr
        self._bar_stream = bar_stream if bar_stream.isatty() and not log.is_quiet() else None
        self._bar: tqdm | None = None
        self._gathered: dict[str, list[float]] = defaultdict(list)
        self._validation: dict[str, float] = {}
        self._begun = 0.0
        self._first_batch = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Collects figures; Composer calls this."""
        for key, value in metrics.items():
            self._gather(key, float(value))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Starts the clock and the bar."""
        self._begun = time.monotonic()
        self._first_batch = state.timestamp.batch.value
        if self._bar_stream is not None:
            self._bar = tqdm(
                total=self.total,
                initial=self._first_batch,
                unit="batch",
                file=self._bar_stream,
                dynamic_ncols=True,
                leave=False,
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Updates the bar; prints a line when it is due."""
        batch = state.timestamp.batch.value
        if self._bar is not None:
            self._bar.update(batch - self._bar.n)
        if batch % self.interval and batch not in (self._first_batch + 1, self.total):
            return
        figures = {key: sum(values) / len(values) for key, values in self._gathered.items()}
        if peaks := self._gathered[metrics.GPU_MEMORY_PEAK]:
            figures[metrics.GPU_MEMORY_PEAK] = max(peaks)
        step_seconds = sum(self._gathered[metrics.TIME_STEP])
        if step_seconds > 0:
            rates = zip(
                self._gathered[metrics.TOKENS_PER_SECOND], self._gathered[metrics.TIME_STEP], strict=True
            )
            figures[metrics.TOKENS_PER_SECOND] = sum(rate * took for rate, took in rates) / step_seconds
        self._gathered.clear()
        pace = (time.monotonic() - self._begun) / (batch - self._first_batch)
        tokens = state.timestamp.token.value
        self._print(format_batch(batch, self.total, tokens, figures, pace * (self.total - batch)))

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Prints the validation losses."""
        self._print_validation(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Prints the validation losses of an evaluation without training."""
        self._print_validation(state)

    def close(self, state: State, logger: Logger) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _print_validation(self, state: State) -> None:
        if self._validation:
            self._print(format_validation(state.timestamp.batch.value, self.total, self._validation))
        self._validation = {}

    def _gather(self, key: str, value: float) -> None:
        ours = metrics.translate(key)
        if ours is None:
            return
        domains = metrics.match_names(metrics.LOSS_VALIDATION, [ours])
        for domain in domains:
            self._validation[domain] = value
        if not domains:
            self._gathered[ours].append(value)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.progress.info(line)
        if self._bar is not None:
            self._bar.refresh()


def format_batch(
    batch: int, total: int, tokens: int, figures: Mapping[str, float], seconds_left: float
) -> str:
    """Formats a line such as `batch  120/489  983k tokens  loss 4.123  ...  14.2k tokens/s  left 1 min 32 s`.

    Omits figures that were not logged; every figure keeps its column width.
    """
    width = len(str(total))
    parts = [f"batch {batch:{width}d}/{total}", f"{short_number(tokens):>5} tokens"]
    for key, label, form in (
        (metrics.LOSS, "loss", "{:6.3f}"),
        (metrics.LOSS_BALANCE, "balance", "{:5.3f}"),
        (metrics.LEARNING_RATE, "lr", "{:8.2e}"),
        (metrics.GRADIENT_NORM, "grad", "{:6.3f}"),
    ):
        if key in figures:
            parts.append(f"{label} {form.format(figures[key])}")
    if metrics.GPU_MEMORY_PEAK in figures:
        parts.append(f"gpu {figures[metrics.GPU_MEMORY_PEAK] / 1e9:5.1f} GB")
    if metrics.TOKENS_PER_SECOND in figures:
        parts.append(f"{short_number(figures[metrics.TOKENS_PER_SECOND]):>5} tokens/s")
    parts.append(f"left {duration(seconds_left)}" if batch < total else "done")
    return "  ".join(parts)


def format_validation(batch: int, total: int, losses: Mapping[str, float]) -> str:
    """Formats a line such as `batch  100/489  validation loss  code 4.312  prose 4.501`."""
    width = len(str(total))
    each = "  ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
    return f"batch {batch:{width}d}/{total}  validation loss  {each}"
