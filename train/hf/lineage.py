"""Lineage of weights, as flat text for folders, MLflow tags and model cards."""

import json
from pathlib import Path

from train.checkpoint.files import PROGRESS_FILE
from train.hf.folders import recipe_file_of
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.record.provenance import git_commit
from train.record.run_folder import MLFLOW_FILE

PROVENANCE_FILE = "provenance.json"
"""The lineage file of an exported folder."""
PARENT = "parent."


def lineage(weights: Path) -> dict[str, str]:
    """Returns the lineage of weights: folder and, for a run, name, checkpoint, tokens, MLflow run, parent.

    Args:
        weights: a run, one of its checkpoints, or any other folder of weights.
    """
    tags = {"weights": str(weights)}
    recipe_file = recipe_file_of(weights)
    if recipe_file is None or not recipe_file.is_file():
        return tags
    recipe, run = load_recipe(recipe_file), recipe_file.parent
    tags |= {"run": recipe.name, "run_folder": str(run)}
    if weights != run:
        progress = _read(weights / PROGRESS_FILE)
        tags |= {"checkpoint": weights.name, "tokens": str(progress.get("tokens", "unknown"))}
    run_id = _read(run / MLFLOW_FILE).get("run_id")
    if run_id:
        tags["mlflow_run_id"] = str(run_id)
    return tags | parent_tags(recipe)


def parent_tags(recipe: Recipe) -> dict[str, str]:
    """Returns the tags of a run that starts from weights: their lineage, each key under `parent.`."""
    if recipe.start.weights is None:
        return {}
    parent = lineage(Path(recipe.start.weights))
    # One generation is enough: each parent's own record names its parent.
    return {PARENT + key: value for key, value in parent.items() if not key.startswith(PARENT)}


def write_provenance(folder: Path, weights: Path, files: dict[str, str], average: str = "") -> None:
    """Writes the lineage of an exported folder's weights, with the SHA-256 of its files.

    Args:
        folder: the exported folder.
        weights: as of :func:`lineage`.
        files: SHA-256 by name.
        average: the average that was exported; empty: the weights.
    """
    tags = lineage(weights) | ({"average": average} if average else {})
    tree = {"lineage": tags | {"exported_at_commit": git_commit()}, "sha256": files}
    (folder / PROVENANCE_FILE).write_text(json.dumps(tree, indent=1) + "\n")


def _read(path: Path) -> dict[str, object]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
