"""The epoch budget: how often a run reads each domain, checked against the recipe before it trains."""

from dataclasses import dataclass

from data.order.plan import OrderPlan
from train.recipe.curriculum import Curriculum
from train.recipe.errors import UserError
from train.recipe.schema import Recipe


@dataclass(frozen=True)
class EpochBudget:
    """Samples that a run reads of a domain, and samples that the domain has."""

    domain: str
    samples: int
    """Samples in the shards."""
    consumed: int
    """Samples that the run reads in total, repetitions included."""
    max_epochs: float
    exhausted_at: int | None
    """First position that would exceed ``max_epochs``; None: the budget suffices."""

    @property
    def epochs(self) -> float:
        """Number of times that the run reads the domain."""
        return self.consumed / self.samples


def epoch_budgets(recipe: Recipe, curriculum: Curriculum, plan: OrderPlan) -> list[EpochBudget]:
    """Computes every domain's epoch budget over the whole run.

    Args:
        recipe: sets how often each domain may be read.
        curriculum: the run's stages.
        plan: the sample order built from them.
    """
    consumed = plan.consumed(curriculum.samples)
    found = []
    for domain, samples in zip(plan.domains, plan.sizes, strict=True):
        most = recipe.data.domain_max_epochs.get(domain, recipe.data.max_epochs)
        exhausted_at = plan.exhausted_at(domain, most, curriculum.samples)
        found.append(EpochBudget(domain, samples, consumed[domain], most, exhausted_at))
    return found


def require_epoch_budget(recipe: Recipe, curriculum: Curriculum, plan: OrderPlan) -> None:
    """Raises an error if a domain would be read more often than the recipe allows.

    Args:
        recipe: sets how often each domain may be read.
        curriculum: the run's stages.
        plan: the sample order built from them.

    Raises:
        UserError: one line that names the domain that is exhausted first, and at which token.
    """
    budgets = epoch_budgets(recipe, curriculum, plan)
    exhausted = [budget for budget in budgets if budget.exhausted_at is not None]
    if not exhausted:
        return
    first = min(exhausted, key=lambda budget: budget.exhausted_at or 0)
    assert first.exhausted_at is not None
    tokens = curriculum.sample_tokens
    raise UserError(
        f"{first.domain} is exhausted at token {first.exhausted_at * tokens:,}: "
        f"the run takes {first.epochs:.3g} epochs of its {first.samples * tokens:,} tokens, "
        f"and {first.max_epochs:g} are allowed",
        key=f"data.domain_max_epochs.{first.domain}",
        remedy="allow more, give the domain less weight, or add text",
    )
