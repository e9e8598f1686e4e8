import dataclasses

import pytest

from data.order.epoch_budget import epoch_budgets, require_epoch_budget
from data.order.plan import OrderPlan
from train.recipe.curriculum import plan_stages
from train.recipe.errors import UserError
from train.recipe.schema import Data, Recipe, Training

# 320 samples of 32 tokens.
RECIPE = Recipe(
    data=Data(domains={"code": 0.75, "prose": 0.25}, sequence_tokens=32, max_epochs=4.0),
    training=Training(10_240, 8, 4),
)
CURRICULUM = plan_stages(RECIPE)


def plan_of(code: int, prose: int) -> OrderPlan:
    return OrderPlan(CURRICULUM.segments(), {"code": [code], "prose": [prose]}, seed=1, window_shards=4)


def test_the_budget_of_each_domain_is_what_the_plan_reads():
    code, prose = epoch_budgets(RECIPE, CURRICULUM, plan_of(60, 40))
    assert (code.domain, code.samples, code.consumed, code.epochs) == ("code", 60, 240, 4.0)
    assert (prose.domain, prose.consumed, prose.epochs) == ("prose", 80, 2.0)
    assert code.exhausted_at is prose.exhausted_at is None
    require_epoch_budget(RECIPE, CURRICULUM, plan_of(60, 40))


def test_the_domain_that_is_exhausted_first_is_named():
    with pytest.raises(UserError) as caught:
        require_epoch_budget(RECIPE, CURRICULUM, plan_of(50, 10))
    # 40 of prose are 4 epochs, up to sample 160 of the run; code lasts for 200 of its own.
    assert str(caught.value).startswith("data.domain_max_epochs.prose: prose is exhausted at token 5,1")
    assert "8 epochs of its 320 tokens, and 4 are allowed" in str(caught.value)
    data = dataclasses.replace(RECIPE.data, domain_max_epochs={"prose": 8.0, "code": 5.0})
    require_epoch_budget(dataclasses.replace(RECIPE, data=data), CURRICULUM, plan_of(50, 10))
