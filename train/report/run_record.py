"""Reads what a run left in its folder, as columns; needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.recipe.errors import UserError
from train.record.run_folder import METRICS_FILE, RECIPE_FILE, SAMPLE_FILE
from train.record.step_log import EXPERT_LOAD_FILE, SHARES, STEP, TOKENS, read_steps
from train.record.summary import Summary, read_summary

# Shapes: N recorded steps, L layers, E experts.


@dataclass(frozen=True)
class Series:
    """One figure over the run."""

    tokens: np.ndarray
    """Tokens trained so far, where the figure was recorded."""
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class RunRecord:
    """A run, complete or not."""

    run_dir: Path
    steps: list[dict[str, Any]]
    recipe: str
    """The resolved recipe as YAML."""
    summary: Summary | None
    """None while the run is not complete."""
    load_tokens: np.ndarray
    """Tokens trained so far at each record of the experts' load; [N]."""
    load_shares: np.ndarray
    """Shares of each layer's token assignments per expert; [N, L, E], empty for a dense model."""
    sample: str
    """Text that the model wrote, if it was asked to."""

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.run_dir.resolve().name

    @property
    def keys(self) -> list[str]:
        """Every key that was recorded, in the order of its first appearance."""
        return list(dict.fromkeys(key for line in self.steps for key in line))

    def series(self, key: str) -> Series:
        """A figure over the run; not-a-number where it was not finite."""
        lines = [line for line in self.steps if key in line]
        values = [np.nan if line[key] is None else line[key] for line in lines]
        return Series(
            np.array([line[TOKENS] for line in lines], dtype=np.float64), np.array(values, dtype=np.float64)
        )

    def median(self, key: str, skip: int = 2) -> float:
        """Median over the steps but the first ones, which warm up; not-a-number if there is none."""
        values = self.series(key).values
        values = values[min(skip, max(0, len(values) - 1)) :]
        return float(np.nanmedian(values)) if len(values) and not np.isnan(values).all() else float("nan")


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run's folder.

    Raises:
        UserError: if it is not the folder of a run.
    """
    recipe = run_dir / RECIPE_FILE
    if not recipe.is_file():
        raise UserError(
            f"has no {RECIPE_FILE}", remedy="give the folder of a run, runs/NAME", file=str(run_dir)
        )
    steps = read_steps(run_dir / METRICS_FILE)
    tokens_at = {line[STEP]: line[TOKENS] for line in steps}
    loads = [line for line in read_steps(run_dir / EXPERT_LOAD_FILE) if line[STEP] in tokens_at]
    sample = run_dir / SAMPLE_FILE
    return RunRecord(
        run_dir=run_dir,
        steps=steps,
        recipe=recipe.read_text(),
        summary=read_summary(run_dir),
        load_tokens=np.array([tokens_at[line[STEP]] for line in loads], dtype=np.float64),
        load_shares=np.array([line[SHARES] for line in loads], dtype=np.float64),
        sample=sample.read_text() if sample.is_file() else "",
    )
