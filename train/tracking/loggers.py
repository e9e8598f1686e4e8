"""Loggers that a recipe asks for besides MLflow: TensorBoard and W&B, under our names of metrics."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.recipe.reading import to_dict
from train.recipe.schema import Recipe
from train.record import metrics
from train.tracking.facts import own_facts

if TYPE_CHECKING:
    from composer.loggers import LoggerDestination

TENSORBOARD_FOLDER = "tensorboard"
FLUSH_BATCHES = 10


def other_loggers(recipe: Recipe, folder: Path) -> "list[LoggerDestination]":
    """Returns Composer's loggers that the recipe asks for besides MLflow; for rank 0 only.

    A resumed run continues its W&B run, whose id is the run's own; a fork or a copy gets another.

    Args:
        recipe: the run's recipe; :mod:`train.recipe.packages` has checked that what they need is installed.
        folder: the run's folder, whose facts are written.
    """
    found: list[LoggerDestination] = []
    if recipe.tracking.tensorboard:
        from composer.loggers import TensorboardLogger

        found.append(
            with_our_names(TensorboardLogger)(
                log_dir=str(folder / TENSORBOARD_FOLDER), flush_interval=FLUSH_BATCHES
            )
        )
    if recipe.tracking.wandb_project is not None:
        from composer.loggers import WandBLogger

        found.append(
            with_our_names(WandBLogger)(
                project=recipe.tracking.wandb_project,
                name=recipe.name,
                init_kwargs={
                    "id": own_facts(folder).uid,
                    "resume": "allow",
                    "dir": str(folder),
                    "config": to_dict(recipe),
                },
            )
        )
    return found


def with_our_names(kind: "type[LoggerDestination]") -> Any:
    """Returns a logger class that records our metrics under our names, as metrics.jsonl has them.

    Args:
        kind: a class of Composer's.
    """

    class OurNames(kind):
        def log_metrics(self, figures: dict[str, float], step: int | None = None) -> None:
            named = {metrics.translate(key): float(value) for key, value in figures.items()}
            ours = {key: value for key, value in named.items() if key is not None}
            if ours:
                super().log_metrics(ours, step)

    OurNames.__name__ = kind.__name__
    return OurNames
