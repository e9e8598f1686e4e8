"""A run's data for the audit: recipe, stages, data log and shards, opened for reading."""

import json
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.fill_in_middle import FillInMiddleTransform, open_fill_in_middle
from data.opened import open_data
from data.order.plan import OrderPlan
from data.shards.packing import Sample
from data.shards.streams import ShardFolder
from train.recipe.curriculum import Curriculum, continue_stages, from_json, plan_stages
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.record.run_folder import CHECKPOINTS_FOLDER, DATA_LOG_FILE, RECIPE_FILE, data_log_of
from train.record.skips import declared_skips
from train.record.step_log import STEP, read_steps

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class DomainPart:
    """One domain's part of a step."""

    sequences: int
    targets: int
    """Tokens with a loss."""
    digest: int


@dataclass(frozen=True)
class LoggedStep:
    """One line of the data log."""

    step: int
    first: int | None
    """Position of the first sample; None if the positions are not contiguous."""
    samples: int
    """Samples of the shards' length."""
    stride: int
    """Samples per sequence."""
    domains: dict[str, DomainPart]


class RunData:
    """A run's data."""

    def __init__(self, folder: Path) -> None:
        """Reads recipe, data log and the newest checkpoint's progress.

        Raises:
            UserError: if the folder is not that of a run with a data log, or its shards are missing.
        """
        if not data_log_of(folder).is_file():
            raise UserError(f"{folder} has no {DATA_LOG_FILE}", remedy="give the folder of a run, runs/NAME")
        self.folder = folder
        self.recipe: Recipe = load_recipe(folder / RECIPE_FILE)
        self.data = open_data(self.recipe)
        self.sample_tokens = self.data.manifest.sequence_tokens
        lines = read_steps(data_log_of(folder))
        found = (_step(line, self.sample_tokens) for line in lines)
        self.steps = [step for step in found if step is not None]
        self.progress = _newest_progress(folder / CHECKPOINTS_FOLDER)
        """Progress at the newest checkpoint; empty if there is none."""

    @cached_property
    def curriculum(self) -> Curriculum:
        """The run's stages, past and future."""
        past = self.progress.get("curriculum")
        stages = plan_stages(self.recipe)
        if past:
            stages = continue_stages(from_json(past), self.recipe, self.progress["samples"])
        return replace(stages, skips=declared_skips(self.recipe, self.folder))

    @cached_property
    def plan(self) -> OrderPlan:
        """The order of the run's samples."""
        return self.data.plan(self.curriculum)

    @cached_property
    def shards(self) -> dict[str, ShardFolder]:
        """The training shards of each domain."""
        return {domain: self.data.shards(domain, "train") for domain in self.plan.domains}

    @cached_property
    def _fill_in_middle(self) -> FillInMiddleTransform | None:
        return open_fill_in_middle(self.data.tokenizer, self.recipe, self.curriculum)

    def read(self, step: LoggedStep, domain: str, numbers: NDArray[np.int64], position: int) -> list[Sample]:
        """Reads a sequence as the run has read it: documents rearranged, where its stage says so.

        Args:
            step: its step.
            domain: its domain.
            numbers: numbers of its samples in the domain's training shards.
            position: position of the first.

        Raises:
            UserError: one line that names a shard that is missing or altered.
        """
        samples = [self.shards[domain][int(number)] for number in numbers]
        if self._fill_in_middle is None:
            return samples
        stage = self.curriculum.stage_of(step.step - 1)
        return self._fill_in_middle.rearrange(samples, numbers, position=position, domain=domain, stage=stage)

    def documents_file(self, domain: str) -> Path:
        """The list of a domain's documents, fetched if it is in a store."""
        return self.data.documents_file(domain)

    def step_at(self, position: int) -> int | None:
        """The step that trained on a position; None if none did."""
        known = [step for step in self.steps if step.first is not None]
        place = bisect_right([step.first or 0 for step in known], position) - 1
        if place < 0 or position >= (known[place].first or 0) + known[place].samples:
            return None
        return known[place].step


def _step(line: dict[str, Any], sample_tokens: int) -> LoggedStep | None:
    """Returns a line of the data log; None if it is damaged, and so as good as missing."""
    try:
        domains = {
            name: DomainPart(int(n), int(targets), int(digest, 16))
            for name, (n, targets, digest) in line["domains"].items()
        }
        stride = line["length"] // sample_tokens
        first = None if line["first"] is None else int(line["first"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    samples = stride * sum(entry.sequences for entry in domains.values())
    return LoggedStep(line[STEP], first, samples, stride, domains)


def _newest_progress(checkpoints: Path) -> dict[str, Any]:
    """Returns the progress at the newest checkpoint that has a readable one; empty if there is none."""
    folders = [path for path in checkpoints.glob("batch-*") if path.name.removeprefix("batch-").isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("batch-")), reverse=True):
        try:
            found = json.loads((folder / PROGRESS_FILE).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("batch") == int(folder.name.removeprefix("batch-")):
            return found
    return {}
