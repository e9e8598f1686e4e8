"""Which ranks a difference of digests names, and that a step run again changes nothing of a sound run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.verify.bit_flips import BitFlip
from tests.train.step.test_step import trained
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.step.digests import LocalGradients, digest, digest_all, state_digest
from train.step.recheck import (
    Corruption,
    Recheck,
    differing,
    differing_elsewhere,
    differing_replicas,
)
from train.step.step import TrainingStep

TinyRecipe = Callable[..., Recipe]


def table(*rows: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(rows)


SOUND = table((1, 5, 9, 0), (2, 6, 9, 0), (3, 7, 9, 0), (4, 8, 9, 0))


def changed(*places: tuple[int, int]) -> Tensor:
    """The table with other digests at these ranks and columns."""
    other = SOUND.clone()
    for rank, column in places:
        other[rank, column] += 100
    return other


@pytest.mark.parametrize(
    ("places", "ranks"),
    [
        ((), ()),
        (((2, 0),), (2,)),
        (((1, 1), (0, 2), (1, 2), (2, 2), (3, 2)), (1,)),
        (((3, 0), (0, 1), (1, 1), (2, 1), (3, 1)), (3,)),
        (((0, 2),), (0,)),
    ],
    ids=["none", "loss", "own gradients, which are in all sums", "loss, which is in all gradients", "sum"],
)
def test_the_first_column_that_differs_names_the_rank(
    places: tuple[tuple[int, int], ...], ranks: tuple[int, ...]
) -> None:
    assert differing(SOUND, changed(*places)) == ranks


def test_gradients_that_were_not_seen_are_not_compared() -> None:
    unseen = SOUND.clone()
    unseen[:, 1] = 0
    assert differing(unseen, SOUND) == () and differing(SOUND, unseen) == ()


def elsewhere(shift: int, wrong: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A run in place and one of the data ``shift`` ranks on, in both of which these ranks compute wrongly."""
    in_place, moved = SOUND.clone(), SOUND.roll(-shift, dims=0)
    for rank in wrong:
        in_place[rank, 1] += 100
        moved[rank, 1] += 1000
    return in_place, moved


@pytest.mark.parametrize(
    ("shift", "wrong", "ranks"),
    [(1, (), ()), (1, (2,), (2,)), (1, (0,), (0,)), (2, (0, 1), (0, 1, 2, 3))],
    ids=["none", "one", "the first", "one of two groups: both are suspects"],
)
def test_who_is_wrong_with_two_ranks_data_is_named(
    shift: int, wrong: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    assert differing_elsewhere(*elsewhere(shift, wrong), shift) == ranks


@pytest.mark.parametrize(
    ("states", "replicas", "ranks"),
    [([1, 2, 1, 2], 2, ()), ([1, 2, 1, 3], 2, (1, 3)), ([1, 2, 1, 2, 1, 3], 3, (5,)), ([1, 2, 3], 1, ())],
)
def test_the_replica_that_most_contradict_is_named(
    states: list[int], replicas: int, ranks: tuple[int, ...]
) -> None:
    rows = table(*((0, 0, 0, state) for state in states))
    assert differing_replicas(rows, replicas) == ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_any_changed_element_changes_a_digest(dtype: torch.dtype) -> None:
    whole = torch.arange(48).reshape(6, 8).to(dtype)
    for element in range(48):
        other = whole.clone()
        other.view(-1)[element] += 1
        assert digest(other) != digest(whole)
        assert digest_all([whole, other]) != digest_all([whole, whole]) != digest_all([other, whole])


def test_a_bit_that_flips_elsewhere_gives_another_digest() -> None:
    found = set[int]()
    for element in range(107):
        for bit in (0, 16, 31):
            bits = torch.zeros(107, dtype=torch.int64)
            bits[element] = 1 << bit
            found.add(int(digest(bits.to(torch.int32).view(torch.float32))))
    assert len(found) == 3 * 107
    last = torch.zeros(3, dtype=torch.int64)
    last[1] = torch.iinfo(torch.int64).min
    assert digest(last) != 0, "the highest bit of all counts too"


def test_own_gradients_are_seen_however_often_a_weight_is_used() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    x, own = torch.randn(3, 4), LocalGradients(model)

    def seen(scale: float) -> int:
        own.listen()
        for _ in range(2):
            (model(model(x)).square().sum() * scale).backward()
        return int(own.take())

    assert seen(1.0) == seen(1.0) != seen(1.001)
    model(x).sum().backward()
    assert own.take() == 0, "nothing is seen unless it listens"


class RecheckedModel:
    """A recheck whose model is computed wrongly in some runs."""

    def __init__(self, recipe: Recipe, wrong_runs: tuple[int, ...]) -> None:
        self.found: list[Corruption] = []
        self.told: list[str] = []
        """Receives the messages that the watchdog hears."""
        self.wrong_runs, self.runs = wrong_runs, 0
        self.step = self._trained(recipe)

    def _trained(self, recipe: Recipe) -> TrainingStep:
        step = trained(recipe, 4)
        told = self.told.append
        recheck = Recheck(recipe, step.model, Topology(), report=self.found.append, moved=told)
        parts = [{key: value[row : row + 4] for key, value in whole().items()} for row in (0, 4)]
        run = step.run_again

        def faulty(parts: Any) -> None:
            self.runs += 1
            run(parts)
            if self.runs in self.wrong_runs:
                gradient = next(p.grad for p in step.model.parameters() if p.grad is not None)
                BitFlip(self.runs, is_on=True)(gradient)

        faulty(parts)
        self.before = gradients(step)
        self.result = recheck.compare(0, parts, lambda: step.sums.losses, faulty)
        return step


def whole() -> dict[str, Tensor]:
    ids_BS = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(1))
    zeros_BS = torch.zeros_like(ids_BS)
    batch = {"input_ids": ids_BS, "targets": ids_BS.roll(-1, dims=1), "document_ids": zeros_BS}
    return batch | {"sample_positions": torch.arange(8)}


def gradients(step: TrainingStep) -> list[Tensor]:
    return [p.grad.clone() for p in step.model.parameters() if p.grad is not None]


@pytest.fixture(scope="module")
def recipe(tiny_recipe: TinyRecipe) -> Recipe:
    return tiny_recipe(Path("runs"), Path("shards"), "step", "guard.recheck_interval_batches=1")


@pytest.mark.parametrize(
    ("wrong_runs", "verdict"),
    [((), None), ((1,), False), ((2,), False), ((1, 2, 3), True)],
    ids=["sound", "the step itself, once", "the second run, once", "every run"],
)
def test_a_third_run_tells_transient_from_persistent(
    recipe: Recipe, wrong_runs: tuple[int, ...], verdict: bool | None
) -> None:
    sound, finding = RecheckedModel(recipe, ()), RecheckedModel(recipe, wrong_runs)
    found = None if finding.result is None else finding.result.is_persistent
    assert found is verdict and len(finding.found) == (verdict is not None)
    assert finding.runs == (2 if verdict is None else 3), (
        "the step, its second run, and a third only if needed"
    )
    assert finding.told == ["computing a step again"] * (finding.runs - 1)
    if not verdict:
        pairs = zip(gradients(finding.step), sound.before, strict=True)
        assert all(torch.equal(*pair) for pair in pairs), "a sound run's gradients are left"


def test_a_state_that_changes_between_steps_is_noticed(recipe: Recipe) -> None:
    step = trained(recipe, 4)
    recheck = Recheck(recipe, step.model, Topology())
    optimizer = torch.optim.AdamW(step.model.parameters())
    optimizer.step()
    recheck.begin(0, optimizer)
    assert not recheck.has_changed, "nothing is known of the first step"
    recheck.end(optimizer)
    recheck.begin(1, optimizer)
    assert not recheck.has_changed
    for tensor in (next(step.model.parameters()), next(iter(optimizer.state.values()))["exp_avg_sq"]):
        before = state_digest(step.model, optimizer)
        BitFlip(3, is_on=True)(tensor.detach())
        recheck.begin(1, optimizer)
        assert recheck.has_changed and state_digest(step.model, optimizer) != before
        recheck.end(optimizer)
    assert recheck.find_changed(1).is_persistent


def test_steps_are_rechecked_at_the_end_of_each_interval_also_after_a_resumption(recipe: Recipe) -> None:
    every = replace(recipe, guard=replace(recipe.guard, recheck_interval_batches=4))
    model = trained(recipe, 4).model
    rechecks = [Recheck(every, model, Topology(), first_batch=first) for first in (0, 10)]
    assert [batch for batch in range(12) if rechecks[0].is_due(batch)] == [3, 7, 11]
    assert [recheck.sound_until for recheck in rechecks] == [0, 8], "the last recheck was after batch 8"
