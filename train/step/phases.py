"""Takes the model from one phase of the curriculum to the next, exactly at the boundary.

What a phase changes is a function of the batch, not a state: a resumed run has it before its first batch.
"""

from composer.core import Callback, State
from composer.loggers import Logger

from train.recipe.curriculum import Curriculum
from train.recipe.phases import microbatch_sequences, phases_of
from train.recipe.schema import Recipe
from train.record.metrics import PHASE
from train.step.language_model import LanguageModel


class Phases(Callback):
    """Sets RoPE's base and the microbatch before the batch is trained on, and records the phase."""

    def __init__(self, recipe: Recipe, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self.microbatches = [microbatch_sequences(recipe, phase) for phase in phases_of(recipe)]

    def batch_start(self, state: State, logger: Logger) -> None:
        """Sets what the batch's phase has."""
        assert isinstance(state.model, LanguageModel)
        stage = self.curriculum.stage_of(state.timestamp.batch.value)
        state.model.decoder.set_rope_theta(stage.rope_theta)
        state.device_train_microbatch_size = self.microbatches[stage.phase]
        logger.log_metrics({PHASE: stage.phase})
