"""The shapes of a run's steps: one for each sequence length and batch that its phases train with.

What a step costs depends on the length of its sequences and on its batch; mixtures and learning rates cost
nothing. Phases that differ in these alone are one form.
"""

from dataclasses import dataclass, replace

from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.phases import microbatch_sequences, phases_of
from train.recipe.schema import Recipe


@dataclass(frozen=True)
class StepShape:
    """Steps that cost the same."""

    recipe: Recipe
    """The whole recipe as if all of it had this length, batch and microbatch."""
    batches: int
    """Optimizer steps of this form in the run."""
    tokens: int
    phases: tuple[int, ...]
    """Numbers of the phases that train in this form."""

    @property
    def flops(self) -> sizes.Flops:
        """Of all its tokens, attention at this length."""
        token = sizes.flops_per_token_training(self.recipe.model, self.recipe.data.sequence_tokens)
        return sizes.Flops(token.weights * self.tokens, token.attention * self.tokens)


def step_shapes(recipe: Recipe) -> list[StepShape]:
    """Every form of a valid recipe; first the one with the most tokens."""
    found: dict[tuple[int, int, int], StepShape] = {}
    curriculum, phases = plan_stages(recipe), phases_of(recipe)
    for stage in curriculum.stages:
        length = stage.sequence_samples * curriculum.sample_tokens
        shape = (length, stage.batch_sequences, microbatch_sequences(recipe, phases[stage.phase]))
        before = found.get(shape) or StepShape(_in_shape(recipe, *shape), 0, 0, ())
        found[shape] = replace(
            before,
            batches=before.batches + stage.end_batch - stage.first_batch,
            tokens=before.tokens + (stage.end_sample - stage.first_sample) * curriculum.sample_tokens,
            phases=(*before.phases, stage.phase),
        )
    return sorted(found.values(), key=lambda form: -form.tokens)


def _in_shape(recipe: Recipe, length: int, batch: int, microbatch: int) -> Recipe:
    return replace(
        recipe,
        data=replace(recipe.data, sequence_tokens=length, phases=[]),
        training=replace(recipe.training, global_batch_sequences=batch, microbatch_sequences=microbatch),
    )
