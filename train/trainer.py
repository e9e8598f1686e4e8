"""Builds Composer's Trainer from a recipe; the only place that does."""

import datetime

import torch
from composer import Evaluator, Time, Timestamp, Trainer
from composer.core import Callback, DataSpec
from composer.devices import Device, DeviceCPU, DeviceGPU
from composer.loggers import LoggerDestination
from composer.utils import collect_env
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from train.checkpoint.files import Progress
from train.layout.device import cpu_name
from train.recipe.curriculum import Curriculum
from train.recipe.schema import Recipe
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch, split


def composer_device() -> Device:
    """Returns this rank's device for Composer.

    By default Composer turns TF32 on, here and again where it makes a device of its own: 10 bits of mantissa
    would decide near-ties of the fp32 router.
    """
    return DeviceGPU(allow_tf32=False) if torch.cuda.is_available() else DeviceCPU()


def build_trainer(
    recipe: Recipe,
    model: LanguageModel,
    optimizer: Optimizer,
    train_loader: DataLoader[Batch],
    validation_loaders: dict[str, DataLoader[Batch]],
    callbacks: list[Callback],
    loggers: list[LoggerDestination],
    progress: Progress,
    curriculum: Curriculum,
) -> Trainer:
    """Builds Composer's Trainer for a run at ``progress``.

    Model and optimizer are on their device, sharded and loaded; the training loader begins at the next
    batch. The whole run is one Composer epoch. A sample is a sequence of the shards' length; in a phase of
    longer sequences, several samples make up one sequence.
    """
    # Composer's Trainer asks py-cpuinfo, which starts an interpreter of its own, in every rank.
    collect_env.get_cpu_model = cpu_name
    batches, sample_tokens = curriculum.batches, curriculum.sample_tokens
    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        max_duration=Time.from_batch(batches),
        train_dataloader=_data_spec(
            train_loader,
            sample_tokens,
            recipe.parallelism.on_each_sequence,
            # A pipeline takes a batch's microbatches through its stages itself.
            is_whole=recipe.parallelism.pipeline > 1,
        ),
        spin_dataloaders=False,
        eval_dataloader=_evaluators(recipe, validation_loaders, curriculum),
        callbacks=callbacks,
        loggers=loggers,
        progress_bar=False,
        device=composer_device(),
        # The model itself applies bf16 autocast, on the same path for CPU and GPU.
        precision="fp32",
        device_train_microbatch_size=recipe.training.microbatch_sequences,
        seed=recipe.seed,
        run_name=recipe.name,
    )
    seconds = datetime.timedelta(seconds=progress.seconds)
    trainer.state.timestamp = Timestamp(
        batch=progress.batch,
        sample=progress.samples,
        token=progress.tokens,
        batch_in_epoch=progress.batch,
        sample_in_epoch=progress.samples,
        token_in_epoch=progress.tokens,
        total_wct=seconds,
        epoch_wct=seconds,
        iteration_wct=seconds,
    )
    return trainer


def _evaluators(
    recipe: Recipe, loaders: dict[str, DataLoader[Batch]], curriculum: Curriculum
) -> list[Evaluator]:
    interval = min(recipe.evaluation.interval_batches or curriculum.batches, curriculum.batches)
    microbatch = max(1, recipe.training.microbatch_sequences // recipe.parallelism.sharing)
    return [
        Evaluator(
            label=f"validation/{domain}",
            dataloader=_data_spec(loader, curriculum.sample_tokens),
            metric_names=["token_loss"],
            eval_interval=Time.from_batch(interval),
            device_eval_microbatch_size=microbatch,
        )
        for domain, loader in loaders.items()
    ]


def _data_spec(
    loader: DataLoader[Batch], sample_tokens: int, sharing: int = 1, *, is_whole: bool = False
) -> DataSpec:
    """Wraps a loader so that Composer can count and split its batches, or, ``is_whole``, leaves them.

    Composer sums over ranks, so of batches that ``sharing`` ranks have in common each counts its share. That
    may be a fraction of a sample, which Composer adds up in fp32 and rounds: exactly, below 2^24 tokens a
    batch or where those of a rank are a multiple of a power of two.
    """

    def samples(batch: Batch) -> int | float:
        whole, left = divmod(batch["input_ids"].numel() // sample_tokens, sharing)
        return whole + left / sharing if left else whole

    return DataSpec(
        loader,
        get_num_samples_in_batch=samples,
        get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel() // sharing,
        split_batch=(lambda batch, _: [batch]) if is_whole else _split,
    )


def _split(batch: Batch, microbatch: int | float) -> list[Batch]:
    return split(batch, int(microbatch))
