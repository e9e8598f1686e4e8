"""Time per part of a step, tokens per second, and utilisation of the measured peak."""

import time
from collections.abc import Callable
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from train.record import metrics


class StepClock:
    """Takes time marks within a step.

    On a CPU a mark is the time of day. On a GPU, where kernels run asynchronously, it is an event in the
    stream, read after the step's update is done (not yet run on a GPU).
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def now(self) -> Any:
        """Returns a mark of the current time."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Waits until every mark has been reached; costs little, as the step's loss has already been read."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Returns the seconds between two marks."""
        return start.elapsed_time(end) / 1e3 if self.on_gpu else end - start


class Throughput(Callback):
    """Logs ``time/...`` and ``throughput/...`` of every step.

    ``time/step`` runs from requesting the batch to its end; evaluation and checkpoints are between steps and
    have their own keys. An optimizer hook marks the end of the update.

    Args:
        flops_per_token: training FLOPs per token (:mod:`train.recipe.sizes`) of a batch, by its number from
            0: attention's depend on the phase's sequence length.
        peak_flops: measured peak of one device in FLOP/s (:mod:`train.layout.device`).
        devices: ranks of the run.
        on_gpu: whether the model runs on a GPU.
    """

    def __init__(
        self,
        flops_per_token: Callable[[int], float],
        peak_flops: float,
        devices: int,
        on_gpu: bool = False,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.run_peak_flops = peak_flops * devices
        self.clock = StepClock(on_gpu)
        self._parts: dict[str, list[tuple[Any, Any]]] = {}
        self._begun: Any = None
        self._phase: Any = None
        self._tokens_before = self._batch = 0
        self._rest_begun: float | None = None
        self._evaluation_begun = 0.0
        self._evaluation_seconds = 0.0
        self._hook: Any = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Registers the optimizer hook."""
        self._hook = state.optimizers[0].register_step_post_hook(lambda *_: self._update_done())

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Starts a step."""
        self._parts = {}
        self._begun = self._phase = self.clock.now()
        if self._rest_begun is not None:
            rest = time.perf_counter() - self._rest_begun
            logger.log_metrics(
                {
                    metrics.TIME_EVALUATION: self._evaluation_seconds,
                    metrics.TIME_CHECKPOINT: rest - self._evaluation_seconds,
                }
            )
        self._rest_begun, self._evaluation_seconds = None, 0.0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Ends the wait for the loader."""
        self._end(metrics.TIME_LOADER)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Reads the batch's position, which is known only now: batches before it may have been skipped."""
        self._tokens_before, self._batch = state.timestamp.token.value, state.timestamp.batch.value

    def before_forward(self, state: State, logger: Logger) -> None:
        """Starts a microbatch."""
        self._phase = self.clock.now()

    def before_backward(self, state: State, logger: Logger) -> None:
        """Ends forward pass and loss."""
        self._end(metrics.TIME_FORWARD)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Ends the backward pass; after the last one, clipping and update follow."""
        self._end(metrics.TIME_BACKWARD)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs the step."""
        if self._begun is None:
            return
        end = self.clock.now()
        self.clock.wait()
        step = self.clock.seconds(self._begun, end)
        figures = {metrics.TIME_STEP: step}
        for part in metrics.STEP_PARTS:
            figures[part] = sum(self.clock.seconds(*span) for span in self._parts.get(part, []))
        figures[metrics.TIME_OTHER] = max(0.0, step - sum(figures[part] for part in metrics.STEP_PARTS))
        tokens_per_second = (state.timestamp.token.value - self._tokens_before) / step
        figures[metrics.TOKENS_PER_SECOND] = tokens_per_second
        figures[metrics.TRAINED_TOKENS] = state.timestamp.token.value
        flops_per_second = tokens_per_second * self.flops_per_token(self._batch)
        figures[metrics.FLOP_UTILISATION] = flops_per_second / self.run_peak_flops
        logger.log_metrics(figures)
        self._rest_begun = time.perf_counter()

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Starts an evaluation."""
        self._evaluation_begun = time.perf_counter()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Ends an evaluation."""
        self._evaluation_seconds += time.perf_counter() - self._evaluation_begun

    def close(self, state: State, logger: Logger) -> None:
        """Removes the optimizer hook."""
        if self._hook is not None:
            self._hook.remove()

    def _update_done(self) -> None:
        self._end(metrics.TIME_OPTIMIZER)

    def _end(self, part: str) -> None:
        now = self.clock.now()
        self._parts.setdefault(part, []).append((self._phase, now))
        self._phase = now
