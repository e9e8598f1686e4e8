"""Registration of an exported model in the MLflow Model Registry: `python -m train.tracking.registry OUT`.

The model is logged under the MLflow run that trained it, with the signature of OpenAI's completions API,
which MLflow's and Databricks' serving support, and registered with its lineage: run, checkpoint, tokens,
data, parent. With `tracking.registry: unity_catalog` in the recipe it is registered in Unity Catalog.

MLflow 3 keeps a logged model next to its run, under an id of its own and with the lineage as tags; MLflow 2
keeps it among the run's artifacts.
"""

import inspect
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.hf.folders import read_json
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe, Registry
from train.record import log
from train.record.command import Figures, command

UNITY_CATALOG_URI = "databricks-uc"
TASK = "llm/v1/completions"
MODEL_NAME = "model"
TAG_CHARACTERS = 5000
DECODING = {"do_sample": False}
"""Greedy: transformers 5 samples where nothing is said, and then refuses the temperature 0 by which clients
of OpenAI's API ask for greedy decoding."""

logger = log.get_logger("train.tracking.registry")


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: str
    run_id: str
    model_id: str
    """MLflow 3's id of the logged model; empty where MLflow has none."""
    tracking_uri: str
    registry_uri: str


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("folder", type=Path, help="folder that `train.hf export` wrote")
    parser.add_argument("--run", type=Path, help="runs/NAME (default: the run that it was exported from)")
    parser.add_argument(
        "--name", help="name in the registry (default: tracking.registered_model, or the run's name)"
    )


@command(
    "python -m train.tracking.registry",
    "Registers an exported model with its lineage.",
    add_arguments,
    json="also write name and version as JSON",
    name="registry",
)
def main(options: Namespace) -> int | Figures:
    """Registers an exported folder; exit status 1 if MLflow refuses."""
    logger.info("registry: importing MLflow and transformers")
    # The model is a local folder; the Hub is not needed.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from mlflow.exceptions import MlflowException

    from train.tracking.mlflow_upload import UploadError

    try:
        registered = register(options.folder, options.run, options.name)
    except UploadError as error:
        raise UserError(str(error)) from None
    except (MlflowException, OSError) as error:
        logger.error(f"registry: MLflow does not accept it: {str(error).splitlines()[0][:300]}")
        return 1
    print(
        f"{registered.name} version {registered.version} in {registered.registry_uri}, logged under MLflow "
        f"run {registered.run_id}"
    )
    return Figures(registered.__dict__)


def register(folder: Path, run: Path | None = None, name: str | None = None) -> Registered:
    """Logs and registers an exported folder.

    Args:
        folder: written by `python -m train.hf export`.
        run: the run whose recipe names the registry; None: the one that the folder was exported from.
        name: name in the registry; None: the recipe's `tracking.registered_model`, or the run's name.

    Raises:
        UserError: if the folder was not exported from a run, or that run no longer exists.
        MlflowException: if the server refuses.
    """
    from train.hf.lineage import PROVENANCE_FILE

    provenance = read_json(folder / PROVENANCE_FILE)
    tags = {str(key): str(value) for key, value in provenance.get("lineage", {}).items()}
    if run is None:
        if "run_folder" not in tags:
            raise UserError(f"{folder}: was not exported from a run; name one with --run")
        run = Path(tags["run_folder"])
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: is not a run; name one with --run")
    recipe = load_recipe(run / "recipe.yaml")
    # MLflow 3 takes no colon in a registered model's name.
    name = name or recipe.tracking.registered_model or recipe.name.replace(":", "-")
    return _log_and_register(folder, run, recipe, name, tags | _data_tags(run))


def _log_and_register(folder: Path, run: Path, recipe: Recipe, name: str, tags: dict[str, str]) -> Registered:
    import mlflow
    from huggingface_hub import ModelCard

    from train.tracking.facts import RunFacts
    from train.tracking.mlflow_upload import Upload, public_uri, store_uri

    tracking_uri = store_uri(run, RunFacts.read(run).uri)
    registry_uri = tracking_uri
    if recipe.tracking.registry is Registry.unity_catalog:
        if name.count(".") != 2:
            raise UserError(f"{name}: Unity Catalog needs a name catalog.schema.model")
        registry_uri = UNITY_CATALOG_URI
    # The run may have been trained without a server, or be only partly uploaded.
    upload = Upload(run)
    upload.sync()
    run_id = upload.state.run_id
    labels = {key: value[:TAG_CHARACTERS] for key, value in tags.items()}
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(registry_uri)
    status = mlflow.get_run(run_id).info.status
    with mlflow.start_run(run_id=run_id):
        logged: Any = mlflow.transformers.log_model(
            transformers_model=str(folder),
            task=TASK,
            model_config=DECODING,
            model_card=ModelCard.load(folder / "README.md"),
            pip_requirements=_requirements(),
            metadata=tags,
            **_identity(labels),
        )
    mlflow.MlflowClient().set_terminated(run_id, status=status)
    version = mlflow.register_model(logged.model_uri, name, tags=labels)
    return Registered(
        name=name,
        version=str(version.version),
        run_id=run_id,
        model_id=getattr(logged, "model_id", None) or "",
        tracking_uri=public_uri(tracking_uri),
        registry_uri=public_uri(registry_uri),
    )


def _identity(labels: dict[str, str]) -> dict[str, Any]:
    """Returns a model's name and tags as this MLflow takes them: version 2 knows only a place in its run."""
    import mlflow

    if "name" in inspect.signature(mlflow.transformers.log_model).parameters:
        return {"name": MODEL_NAME, "tags": labels}
    return {"artifact_path": MODEL_NAME}


def _data_tags(run: Path) -> dict[str, str]:
    """Returns tags with the digests of the run's datasets."""
    from train.tracking.facts import RunFacts

    datasets = RunFacts.read(run).datasets
    return {f"data.{dataset.name}": f"sha256:{dataset.digest}" for dataset in datasets}


def _requirements() -> list[str]:
    """Returns the packages that serve the model, so that MLflow need not load it to infer them."""
    from importlib.metadata import version

    return [f"{package}=={version(package)}" for package in ("torch", "transformers", "accelerate")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
