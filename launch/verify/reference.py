"""The single-process reference of the parity gate: how it groups tokens and where it rounds."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional

from launch.verify.cases import Case, with_microbatch
from train.hf.initial_weights import freeze
from train.layout.mesh import build_mesh, build_sharded
from train.layout.optim import build_optimizer
from train.model import decoder as decoder_module
from train.model import shared_expert, tensor_parallel
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
    layout = replace(recipe.parallelism, replicate=1, context=1, tensor=1, pipeline=1, pipeline_chunks=1)
    recipe = replace(recipe, parallelism=layout)
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


@contextlib.contextmanager
def split_products(ranks: int) -> Iterator[None]:
    """Rounds partial sums before they are added up, as ranks that share dense weights do.

    Nothing of :mod:`train.model.tensor_parallel` takes part: products are plain ones, of parts of a weight.
    """

    def columns(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        copies = _Copies.apply(x, ranks)

        def product(layer: nn.Linear) -> Tensor:
            parts = zip(copies, layer.weight.chunk(ranks), strict=True)
            return torch.cat([functional.linear(copy, part) for copy, part in parts], dim=-1)

        return tuple(product(layer) for layer in layers)

    def rows(self: nn.Linear, x: Tensor) -> Tensor:
        parts = zip(x.chunk(ranks, dim=-1), self.weight.chunk(ranks, dim=1), strict=True)
        sums = torch.stack([functional.linear(of_x, of_weight) for of_x, of_weight in parts])
        return sums.float().sum(dim=0).to(sums.dtype)

    with contextlib.ExitStack() as patches:
        for module in (decoder_module, shared_expert, tensor_parallel):
            patches.enter_context(mock.patch.object(module, "column_products", columns))
        patches.enter_context(mock.patch.object(tensor_parallel.RowLinear, "forward", rows))
        yield


class _Copies(torch.autograd.Function):
    """Returns a tensor several times, whose gradients are added in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: int) -> tuple[Tensor, ...]:
        return tuple(x.clone() for _ in range(copies))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack(grads).float().sum(dim=0).to(grads[0].dtype), None
