"""Evaluation of a task suite during training, after a validation."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from train.evaluate.run_suite import run_suite
from train.evaluate.scorer import Scorer
from train.evaluate.suite import Suite, as_dict, as_metrics
from train.recipe.schema import Evaluation
from train.record.evaluations import SUITE, add_result, drop_results_after


class SuiteEvaluation(Callback):
    """Evaluates a suite at its interval and at the end of training; each rank evaluates its share.

    Args:
        scorer: the model in training.
        suite: the tasks.
        recipe: interval, tasks and number of questions.
        tokenizer: a Hugging Face tokenizer.
        folder: the run's folder, to which rank 0 writes the results.
        batches: batches of the whole run.
        moved: called for each batch of questions, as a heartbeat for the watchdog.
    """

    def __init__(
        self,
        scorer: Scorer,
        suite: Suite,
        recipe: Evaluation,
        tokenizer: Any,
        folder: Path,
        batches: int,
        moved: Callable[[str], None],
    ) -> None:
        self.scorer, self.suite, self.recipe, self.tokenizer = scorer, suite, recipe, tokenizer
        self.folder, self.batches, self.moved = folder, batches, moved

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops results of batches that will be trained again."""
        if self.scorer.topology.is_main:
            drop_results_after(self.folder, state.timestamp.batch.value)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Evaluates the suite if it is due at this validation."""
        batch, every = state.timestamp.batch.value, self.recipe.suite_interval_batches
        if batch < self.batches and (every is None or batch % every):
            return
        was_training = state.model.training
        state.model.eval()
        assert self.recipe.suite_data is not None
        result = run_suite(
            self.scorer,
            self.suite,
            self.recipe.suite_tasks or list(self.suite.tasks),
            Path(self.recipe.suite_data),
            self.tokenizer,
            most=self.recipe.suite_questions,
            progress=lambda task, *_: self.moved(f"evaluating {task}"),
        )
        state.model.train(was_training)
        logger.log_metrics(as_metrics(result.scores))
        if self.scorer.topology.is_main:
            tasks = {name: dataclasses.asdict(task) for name, task in result.results.items()}
            fields = {"tasks": tasks, "scores": as_dict(result.scores), "limit": self.recipe.suite_questions}
            add_result(self.folder, SUITE, self.suite.name, batch, fields)
