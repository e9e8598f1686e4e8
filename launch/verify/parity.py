"""The parity gate: the tiny recipe under every layout, compared step by step with one unsharded process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from launch.verify import parity_report
from launch.verify.case_run import CaseOutcome, CaseRanks, make_reference, run_case
from launch.verify.cases import INPUTS, SEQUENCES, Case, cases, find_case, reference_of
from launch.verify.faults import FAULTS
from launch.verify.forked_ranks import RankError
from launch.verify.harness import Check, Workspace
from train.recipe.errors import UserError
from train.recipe.schema import Precision, Recipe
from train.recipe.sizes import total_parameters
from train.record.provenance import git_commit

WORLDS = (1, 2, 4)


class ParityCheck(Check[CaseOutcome]):
    """Every input under every layout.

    Args:
        recipe: the full recipe.
        worlds: numbers of ranks.
        inputs: names of inputs; all if empty.
        precisions: fp32, bf16 or both; if empty, those of :func:`precisions_of`.
        inject: a fault of :mod:`launch.verify.faults`; only its layout and input are run.

    Raises:
        UserError: if a name is unknown, or there is nothing to run.
    """

    name, page, unit = "layouts", "parity", "cases"

    def __init__(
        self,
        recipe: Recipe,
        worlds: Sequence[int] = WORLDS,
        inputs: Sequence[str] = (),
        precisions: Sequence[Precision] = (),
        inject: str | None = None,
    ) -> None:
        super().__init__()
        self.fault: Callable[[], AbstractContextManager[Any]] | None = None
        if inject is None:
            self.todo = self._cases(recipe, worlds, inputs, precisions or precisions_of(recipe))
        else:
            self.todo = [self._case_of_fault(recipe, inject)]
        self.total = len(self.todo)

    def _cases(
        self,
        recipe: Recipe,
        worlds: Sequence[int],
        inputs: Sequence[str],
        precisions: Sequence[Precision],
    ) -> list[Case]:
        _require_known("--inputs", inputs, [each.name for each in INPUTS])
        if odd := [world for world in worlds if world < 1 or SEQUENCES % world]:
            what = f"{odd[0]} ranks cannot share the global batch of {SEQUENCES} sequences"
            raise UserError(what, key="--worlds", remedy="give numbers that divide it")
        found = [
            case
            for precision in precisions
            for case in cases(recipe, tuple(worlds), tuple(inputs), precision)
        ]
        if not found:
            what = "select no case: bf16 needs more than one rank, crowded needs experts"
            raise UserError(what, key="--worlds, --inputs, --precision", remedy="drop one of them")
        return found

    def _case_of_fault(self, recipe: Recipe, name: str) -> Case:
        _require_known("--inject", [name], list(FAULTS))
        if recipe.model.moe is None:
            raise UserError(
                "a dense model has no experts to inject a fault into", key="--inject", remedy="leave it out"
            )
        fault = FAULTS[name]
        self.fault = fault.inject
        return find_case(fault.recipe_of(recipe), fault.layout, fault.input, fault.precision)

    def run(self, workspace: Workspace) -> Iterator[CaseOutcome]:
        """Yields every case's outcome; a case that cannot be run counts as failed."""
        file = workspace.folder / "reference.pt"
        seen: tuple[object, ...] = ()
        seed = 0
        with CaseRanks() as ranks:
            for case in self.todo:
                begun = time.monotonic()
                outcome = CaseOutcome(case)
                try:
                    if reference_of(case) != seen:
                        seed, seen = make_reference(case, file), reference_of(case)
                    if self.fault is None:
                        outcome.deviations = ranks.run(case, seed, file)
                    else:
                        outcome.deviations = run_case(case, seed, file, self.fault)
                except RankError as error:
                    outcome.error = str(error)
                outcome.seconds = time.monotonic() - begun
                yield outcome

    def header(self) -> str:
        """The table's first line."""
        return parity_report.header()

    def line(self, row: CaseOutcome) -> str:
        """A row of the table, with its verdict."""
        return parity_report.line(row)

    def failures(self) -> Iterator[str]:
        """Yields only the first difference, since later ones follow from it."""
        if difference := parity_report.first_difference(self.rows):
            yield difference

    def figures(self, recipe: Recipe) -> dict[str, Any]:
        """Everything for ``--json``."""
        return parity_report.as_figures(describe(recipe, self.rows, self.seconds), self.rows)

    def write_page(self, file: Path, recipe: Recipe) -> None:
        """Writes the HTML page."""
        parity_report.write_html(file, describe(recipe, self.rows, self.seconds), self.rows)


def precisions_of(recipe: Recipe) -> tuple[Precision, ...]:
    """Returns fp32, in which rounding hides nothing, and bf16 unless the recipe uses fp32."""
    fp32 = recipe.training.precision is Precision.fp32
    return (Precision.fp32,) if fp32 else (Precision.fp32, Precision.bf16)


def describe(recipe: Recipe, outcomes: list[CaseOutcome], seconds: float) -> dict[str, Any]:
    """The recipe, the tiny recipe and the gate's duration, for the report."""
    small = outcomes[0].case.recipe
    model, whole = small.model, recipe.model
    phases = [str(phase.sequence_tokens) for phase in small.data.phases]
    lengths = f" (phases of {' and '.join(phases)})" if phases else ""
    return {
        "recipe": recipe.name,
        "commit": git_commit(),
        "tiny recipe": f"{total_parameters(whole):,} parameters to {total_parameters(model):,}: width "
        f"{whole.d_model} to {model.d_model}, layers {whole.n_layers} to {model.n_layers}, vocabulary "
        f"{whole.vocab_size} to {model.vocab_size}, sequence {recipe.data.sequence_tokens} to "
        f"{small.data.sequence_tokens}{lengths}; features, losses, optimizer and schedule as in the recipe",
        "steps": "3, clipped to a norm that every gradient exceeds",
        "seconds": round(seconds),
    }


def _require_known(key: str, names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is unknown", key=key, remedy=f"one of {', '.join(known)}")
