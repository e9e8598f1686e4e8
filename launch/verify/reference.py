"""The single-process reference of the parity gate: how it groups tokens and where it rounds."""

from dataclasses import replace

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger

from launch.verify.cases import Case, with_microbatch
from train.hf.initial_weights import freeze
from train.layout.mesh import build_mesh, build_sharded
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.model.moe import by_sequence
from train.recipe.schema import BalanceScope, Compile, Parallelism, Precision, Recipe, Recompute
from train.step.balance import microbatches_of
from train.step.language_model import LanguageModel


def reference_recipe(case: Case) -> Recipe:
    """The case's recipe on one process, uncompiled, kept in memory, its balance loss per microbatch or
    sequence.

    If the balance loss spans several microbatches, :class:`CountTogether` sums their counts. So the reference
    does not use the code of any balance scope that it checks.
    """
    recipe = with_microbatch(case.recipe, case.reference_microbatch)
    recipe = replace(recipe, parallelism=replace(recipe.parallelism, context=1, tensor=1))
    training = replace(recipe.training, compile=Compile.off, recompute=Recompute.nothing)
    recipe = replace(
        recipe, training=replace(training, recompute_layers=None, recompute_rest=Recompute.nothing)
    )
    if recipe.model.moe is None or by_sequence(recipe.model.moe):
        return recipe
    moe = replace(recipe.model.moe, balance_scope=BalanceScope.microbatch)
    return replace(recipe, model=replace(recipe.model, moe=moe))


class CountTogether(Callback):
    """Computes the reference's balance loss over several consecutive microbatches."""

    def __init__(self, model: LanguageModel, microbatches: int) -> None:
        self.model, self.microbatches = model, microbatches

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Counts all microbatches, and gives each the sum over its group."""
        counts_NLE = torch.stack([self.model.count_choices(part) for part in microbatches_of(state)])
        turns = iter([part.sum(dim=0) for part in counts_NLE.split(self.microbatches) for _ in part])
        self.model.reduce_counts = lambda _: next(turns)


def build_rounding_reference(recipe: Recipe) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """Builds the model and optimizer of one process that rounds where FSDP2 does, without recomputation."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    decoder = Decoder(recipe.model, device="meta", loss_chunk_tokens=recipe.training.loss_chunk_tokens)
    build_sharded(decoder, build_mesh(Parallelism(), 1, "cpu"), Precision.bf16, recipe.seed)
    freeze(decoder, recipe.training.frozen)
    model = LanguageModel(decoder, recipe, Precision.bf16)
    return model, build_optimizer(model, recipe.optimizer, recipe.seed)
