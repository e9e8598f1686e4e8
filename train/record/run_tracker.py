"""The run's own record: each step's metrics as one line of ``metrics.jsonl``.

It needs no server and no library; MLflow and the report read it. Metrics are collected while a batch is
trained and written at its end; those of an evaluation are added to the line of the preceding batch.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from composer.core import State
from composer.loggers import Logger, LoggerDestination

from train.record import metrics
from train.record.log import get_logger
from train.record.run_folder import METRICS_FILE
from train.record.start_times import START_CLOCK
from train.record.step_log import TIMESTAMP, TOKENS, StepLog

logger = get_logger(__name__)


class RunTracker(LoggerDestination):
    """Appends to ``metrics.jsonl``; for rank 0 only.

    A line contains ``step`` (batches trained, from 1), ``tokens`` (trained so far), ``time`` (seconds since
    1970) and every logged metric of :mod:`train.record.metrics`. A resumed run first drops the lines after
    its checkpoint, so no step appears twice.

    Args:
        run_dir: folder of the run.
        bytes_per_token: mean bytes per validation token by domain; if given, bits per byte are recorded
            next to the validation loss.
        train_bytes_per_token: the same for training tokens and the domains' training losses.
    """

    def __init__(
        self,
        run_dir: Path,
        bytes_per_token: Mapping[str, float] | None = None,
        train_bytes_per_token: Mapping[str, float] | None = None,
    ) -> None:
        self.log = StepLog(run_dir / METRICS_FILE)
        self.bytes_per_token = {
            metrics.LOSS_VALIDATION: (metrics.BITS_PER_BYTE, dict(bytes_per_token or {})),
            metrics.LOSS_DOMAIN: (metrics.BITS_PER_BYTE_DOMAIN, dict(train_bytes_per_token or {})),
        }
        """For each loss in nats per token, its key in bits per byte and the bytes per token by domain."""
        self.latest: dict[str, float] = {}
        """The newest value of every key."""
        self._pending: dict[str, float] = {}
        self._is_failing = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps our metrics until the batch or the evaluation ends; Composer calls this."""
        for key, value in metrics.items():
            self._keep(key, float(value))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops lines of batches that will be trained again."""
        self.log.drop_after(state.timestamp.batch.value)
        self._pending.clear()

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """Finds the line to which an evaluation without training belongs."""
        self.log.drop_after(state.timestamp.batch.value)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Writes the batch's line, after every callback has logged, and after the first the start's times."""
        self._write(state)
        START_CLOCK.write(self.log.path.parent, state.timestamp.batch.value - 1)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Adds an evaluation to the line of the preceding batch."""
        self._write(state)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Adds an evaluation without training to the last line."""
        self._write(state)

    def close(self, state: State, logger: Logger) -> None:
        """Closes the file."""
        self.log.close()

    def _keep(self, key: str, value: float) -> None:
        ours = metrics.translate(key)
        if ours is None:
            return
        self._pending[ours] = self.latest[ours] = value
        for loss_key, (bits_key, bytes_per_token) in self.bytes_per_token.items():
            for domain in metrics.match_names(loss_key, [ours]):
                if domain in bytes_per_token:
                    bits = metrics.in_bits_per_byte(value, bytes_per_token[domain])
                    self._keep(metrics.of_domain(bits_key, domain), bits)

    def _write(self, state: State) -> None:
        if not self._pending:
            return
        stamp = state.timestamp
        fields = {TOKENS: stamp.token.value, TIMESTAMP: round(time.time(), 3), **self._pending}
        self._pending = {}
        try:
            self.log.write(stamp.batch.value, fields)
        except OSError as error:
            if not self._is_failing:
                logger.error(f"{self.log.path} NOT written: {error}; training continues")
            self._is_failing = True
        else:
            self._is_failing = False
