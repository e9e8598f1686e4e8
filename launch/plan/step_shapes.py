"""Step shapes of a run: one for each sequence length, batch and layout that its phases train with.

The cost of a step depends on these, not on mixture or learning rate: phases that differ only in the latter
share a step shape.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.phases import microbatch_sequences, phases_of, training_in
from train.recipe.schema import Recipe, Recompute


@dataclass(frozen=True)
class StepShape:
    """A group of steps that cost the same."""

    recipe: Recipe
    """The recipe as if the whole run had this length, batch, microbatch and context parallelism."""
    batches: int
    """Optimizer steps of this shape in the run."""
    tokens: int
    phases: tuple[int, ...]
    """Indices of the phases that train with this shape."""

    @property
    def flops(self) -> sizes.Flops:
        """Training FLOPs of all its tokens, with attention at this length."""
        token = sizes.flops_per_token_training(self.recipe.model, self.recipe.data.sequence_tokens)
        return sizes.Flops(token.weights * self.tokens, token.attention * self.tokens)


def step_shapes(recipe: Recipe) -> list[StepShape]:
    """Returns every step shape of a valid recipe, the one with the most tokens first."""
    found: dict[_Shape, StepShape] = {}
    curriculum, phases = plan_stages(recipe), phases_of(recipe)
    for stage in curriculum.stages:
        length = stage.sequence_samples * curriculum.sample_tokens
        phase = phases[stage.phase]
        training = training_in(recipe, phase)
        grades = training.recompute, training.recompute_layers, training.recompute_rest
        shape = _Shape(length, stage.batch_sequences, microbatch_sequences(recipe, phase), *grades)
        shape = shape._replace(context=phase.context or 1)
        previous = found.get(shape) or StepShape(_in_shape(recipe, shape), 0, 0, ())
        found[shape] = replace(
            previous,
            batches=previous.batches + stage.end_batch - stage.first_batch,
            tokens=previous.tokens + (stage.end_sample - stage.first_sample) * curriculum.sample_tokens,
            phases=(*previous.phases, stage.phase),
        )
    return sorted(found.values(), key=lambda each: -each.tokens)


class _Shape(NamedTuple):
    sequence_tokens: int
    global_batch_sequences: int
    microbatch_sequences: int
    recompute: Recompute
    recompute_layers: int | None
    recompute_rest: Recompute
    context: int = 1


def _in_shape(recipe: Recipe, shape: _Shape) -> Recipe:
    of_training = shape._asdict()
    length = of_training.pop("sequence_tokens")
    layout = replace(recipe.parallelism, context=of_training.pop("context"))
    return replace(
        recipe,
        parallelism=replace(layout, interleave=layout.interleave and shape.microbatch_sequences % 2 == 0),
        data=replace(recipe.data, sequence_tokens=length, phases=[]),
        training=replace(recipe.training, **of_training),
    )
