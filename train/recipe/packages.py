"""Packages that an installation may leave out (`launch/install.sh --core`), and which keys need them."""

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

from train.recipe.errors import UserError
from train.recipe.schema import Compile, Recipe

LEFT_OUT = {
    "alembic": "MLflow",
    "boto3": "boto3",
    "datasets": "Hugging Face's datasets",
    "lm_eval": "lm-eval",
    "matplotlib": "Matplotlib",
    "mlflow": "MLflow",
    "pyarrow": "PyArrow",
    "scipy": "SciPy",
    "sklearn": "scikit-learn",
    "transformers": "transformers",
}
"""Module to import, and the package's name."""
ADDED = {"tensorboard": "TensorBoard", "wandb": "W&B's client"}
"""Likewise, packages that no installation has: few want them, and the locks are long enough."""
REMEDY = "install without --core"
GROUPED_PRODUCT = (2, 10)
"""The torch that first has a grouped product; without one, the experts' row counts break a compiled graph."""


def check_packages(recipe: Recipe) -> None:
    """Checks that what the recipe's keys need is installed; imports nothing.

    Raises:
        UserError: for the first key that needs a package which is not there, or a newer torch.
    """
    if recipe.training.compile is not Compile.off and recipe.model.moe is not None:
        found = version("torch")
        if tuple(int(part) for part in found.split(".")[:2]) < GROUPED_PRODUCT:
            what = f"needs torch {'.'.join(map(str, GROUPED_PRODUCT))} with experts, and this is {found}"
            raise UserError(what, key="training.compile", remedy="set it to off")
    for key, module, instead in _needs(recipe):
        if find_spec(module) is None:
            if module in ADDED:
                what = f"needs {ADDED[module]}, which is not installed"
                raise UserError(what, key=key, remedy=f"`pip install {module}`, or {instead}")
            what = f"needs {LEFT_OUT[module]}, which this installation leaves out"
            raise UserError(what, key=key, remedy=f"{instead} or {REMEDY}")


def _needs(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yields key, module, and what to set instead."""
    if recipe.tracking.mlflow:
        yield "tracking.mlflow", "mlflow", "set tracking.mlflow=false"
    if recipe.tracking.tensorboard:
        yield "tracking.tensorboard", "tensorboard", "set tracking.tensorboard=false"
    if recipe.tracking.wandb_project is not None:
        yield "tracking.wandb_project", "wandb", "remove it"
    if (recipe.data.remote or "").startswith("s3://"):
        yield "data.remote", "boto3", "use a folder that all nodes see, collect wheels with --stores,"
    if recipe.evaluation.suite is not None:
        yield "evaluation.suite", "transformers", "remove it"


def left_out(error: ModuleNotFoundError) -> str | None:
    """Returns what to tell a user whose command needs a package that was left out; None for other modules."""
    name = LEFT_OUT.get((error.name or "").partition(".")[0])
    return name and f"needs {name}, which this installation leaves out; {REMEDY}"
