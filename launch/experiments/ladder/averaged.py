"""Evaluation of the mean of a finished run's last checkpoints, whose losses scatter less than the last's."""

from argparse import Namespace
from pathlib import Path

from train.evaluate.evaluation import evaluate_bits, open_model
from train.hf.average_option import Average
from train.recipe.schema import Recipe


def evaluate_average(recipe: Recipe, count: int) -> None:
    """Evaluates the mean of a run's last checkpoints on its held-out domains, and keeps the losses there.

    Args:
        recipe: the run's.
        count: number of checkpoints.
    """
    run = Path(recipe.runs_dir) / recipe.name
    how = Namespace(checkpoint=None, device="cpu", average=Average(count), dtype="fp32")
    evaluate_bits(open_model(run, how))
