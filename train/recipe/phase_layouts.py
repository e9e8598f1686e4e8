"""Layouts of a run over its phases, of which each may have a context parallelism of its own.

A run builds one layout. Where the next batch has another, it saves and ends (:mod:`train.step.checkpointing`)
and resumes in that one: checkpoints know nothing of context parallelism.
"""

from train.recipe.curriculum import Curriculum
from train.recipe.phases import in_phase, phases_of
from train.recipe.schema import Recipe


def laid_out(recipe: Recipe, curriculum: Curriculum, batch: int) -> Recipe:
    """Returns the recipe in the layout that a run trains in from a batch on, see :func:`in_phase`.

    Args:
        recipe: the run's recipe.
        curriculum: its stages.
        batch: batches before it; at the run's end, the last phase's layout.
    """
    stage = curriculum.stage_of(curriculum.trained_from(batch))
    return in_phase(recipe, phases_of(recipe)[stage.phase])


def next_layout(recipe: Recipe, curriculum: Curriculum, batch: int) -> str:
    """Returns the change of layout after so many batches, in words; empty if there is none.

    Args:
        recipe: the run's, in the layout that it was built in.
        curriculum: its stages.
        batch: batches before.
    """
    if batch >= curriculum.batches:
        return ""
    now, then = recipe.parallelism.context, laid_out(recipe, curriculum, batch).parallelism.context
    number = curriculum.stage_of(curriculum.trained_from(batch)).phase
    return "" if now == then else f"data.phases[{number}].context is {then}, up to here it was {now}"
