"""Builds Composer's Trainer from a recipe; the only place that does."""

from dataclasses import dataclass
from pathlib import Path

from composer import Evaluator, Time, Trainer
from composer.core import Callback, DataSpec, State
from composer.loggers import LoggerDestination
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from train import sizing
from train.composer_model import Batch, LanguageModel
from train.optim import learning_rate_share
from train.schema import Recipe
from train.topology import Topology


@dataclass(frozen=True)
class Loaders:
    """Batches of one rank."""

    train: DataLoader[Batch]
    validation: dict[str, DataLoader[Batch]]


def build_trainer(
    recipe: Recipe,
    topology: Topology,
    model: LanguageModel,
    optimizer: Optimizer,
    loaders: Loaders,
    callbacks: list[Callback],
    loggers: list[LoggerDestination],
) -> Trainer:
    """Composer's Trainer for this recipe. The model is sharded already, and placed on its device."""
    batches = sizing.batches(recipe)
    interval = recipe.evaluation.interval_batches
    return Trainer(
        model=model,
        optimizers=optimizer,
        schedulers=_schedule(recipe),
        step_schedulers_every_batch=True,
        max_duration=Time.from_batch(batches),
        train_dataloader=_data_spec(loaders.train, recipe),
        # The loader begins at the resumed batch by itself.
        spin_dataloaders=False,
        eval_dataloader=[
            Evaluator(
                label=f"validation/{domain}",
                dataloader=_data_spec(loader, recipe),
                metric_names=["token_loss"],
                eval_interval=Time.from_batch(min(interval or batches, batches)),
                device_eval_microbatch_size=recipe.training.microbatch_sequences,
            )
            for domain, loader in loaders.validation.items()
        ],
        callbacks=callbacks,
        loggers=loggers,
        progress_bar=False,
        # bf16 is autocast's, inside the model, where CPU and GPU take the same path.
        precision="fp32",
        device_train_microbatch_size=recipe.training.microbatch_sequences,
        seed=recipe.seed,
        run_name=recipe.name,
        save_folder=None,
    )


def _schedule(recipe: Recipe):  # noqa: ANN202
    duration = sizing.batches(recipe) * sizing.tokens_per_batch(recipe)

    def share(state: State, ssr: float = 1.0) -> float:
        # The rate of the batch to come is that at its end, so that the first is not spent at rate 0.
        seen = state.timestamp.batch.value * sizing.tokens_per_batch(recipe)
        return learning_rate_share(seen + sizing.tokens_per_batch(recipe), duration, recipe.schedule)

    return share


def _data_spec(loader: DataLoader[Batch], recipe: Recipe) -> DataSpec:
    """Tells Composer how to count and to split a batch."""
    return DataSpec(
        loader,
        get_num_samples_in_batch=lambda batch: batch["input_ids"].shape[0],
        get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel(),
        split_batch=_split,
    )


def _split(batch: Batch, microbatch: int | float) -> list[Batch]:
    size = int(microbatch)
    count = batch["input_ids"].shape[0]
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, count, size)]


def run_folder_files(folder: Path) -> list[Path]:
    """The files that a finished run leaves, for the tracker."""
    return sorted(p for p in folder.iterdir() if p.is_file())
