"""Folders of weights: their kinds, and the model that each declares. Needs no torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.hugging_face_tokenizer import SENTENCE_PIECE
from train.hf.architectures import family_of
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.schema import Model, Recipe
from train.recipe.secrets import guarded_environment
from train.record.run_folder import CHECKPOINTS_FOLDER, RECIPE_FILE

MODEL_FILE = "model.yaml"
"""The model of a folder of weights under our names, for a recipe to extend."""
CONFIG_FILE = "config.json"
"""The architecture of a Hugging Face folder."""
INDEX_FILE = "model.safetensors.index.json"
"""Which tensor is in which file of a folder with several."""
SINGLE_FILE = "model.safetensors"
"""The weights of a folder with one file of them."""
STATE_FOLDER = "state"
"""Model and optimizer of a checkpoint."""
SOURCE_FOLDER = "source"
"""The contents of the Hugging Face folder besides the weights, in an imported folder."""
HEADERS_FILE = "headers.json"
"""The headers of the safetensors files, byte for byte, in the source folder."""
TOKENIZER_FILE = "tokenizer.json"
READ_TOKENIZERS = (TOKENIZER_FILE, *SENTENCE_PIECE)
"""Tokenizers that can be read, the first that is there."""
OTHER_TOKENIZERS = ("vocab.json", "vocab.txt", "tekken.json")
"""Tokenizers in other forms."""


def recipe_file_of(path: Path) -> Path | None:
    """Returns the recipe file of a run, or of a checkpoint's run; None for other folders."""
    if (path / CHECKPOINTS_FOLDER).is_dir():
        return path / RECIPE_FILE
    return path.parent.parent / RECIPE_FILE if (path / STATE_FOLDER).is_dir() else None


def model_at(path: Path) -> tuple[Model, Recipe | None]:
    """Returns the model of a folder of weights and the recipe of the run that trained them, if any.

    Raises:
        UserError: if the folder contains no model, or one that the decoder cannot express.
    """
    recipe_file = recipe_file_of(path)
    if recipe_file is not None:
        if not recipe_file.is_file():
            raise UserError(f"{path}: is outside its run's folder; {recipe_file} is missing")
        recipe = load_recipe(recipe_file)
        return recipe.model, recipe
    if (path / MODEL_FILE).is_file():
        return read_model(path / MODEL_FILE), None
    if (path / CONFIG_FILE).is_file():
        config = read_json(path / CONFIG_FILE)
        try:
            model = family_of(config).to_model(config)
        except UserError as error:
            raise UserError(f"{path / CONFIG_FILE}: {error}") from None
        # transformers leaves out the layer that it does not compute, and keeps its number in the config.
        return replace(model, mtp=model.mtp and _has_layer(path, model.n_layers)), None
    raise UserError(
        f"{path}: is not a run or checkpoint, and has neither {MODEL_FILE} (imported) nor {CONFIG_FILE} "
        "(Hugging Face)"
    )


def _has_layer(folder: Path, layer: int) -> bool:
    """Returns whether files of weights, which may be damaged, have a layer that is joined to the others."""
    try:
        if (folder / INDEX_FILE).is_file():
            names = read_json(folder / INDEX_FILE).get("weight_map", {})
        else:
            names = json.loads(read_header(folder / SINGLE_FILE))
    except (OSError, ValueError, UserError):
        return False  # Opening them raises.
    return f"model.layers.{layer}.eh_proj.weight" in names


def read_header(file: Path) -> str:
    """Reads the header of an intact safetensors file: JSON, as it was written."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(length).decode()


def tokenizer_folder_of(path: Path) -> Path:
    """Returns the folder of the weights' tokenizer: a run's shards, or what a Hugging Face folder has."""
    recipe_file = recipe_file_of(path)
    if recipe_file is not None:
        return Path(load_recipe(recipe_file).data.shards)
    return path / SOURCE_FOLDER if (path / SOURCE_FOLDER).is_dir() else path


def make_new_folder(folder: Path) -> None:
    """Makes a folder for weights to be written into; an empty one may be there.

    Raises:
        UserError: if there is something in it, or it can't be made.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: already exists; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{folder}: can't be made ({error.strerror})"
        raise UserError(what, remedy="name a folder on a disk with room that you may write to") from None


def write_model(path: Path, model: Model) -> None:
    """Writes a model as part of a recipe, for :func:`read_model` and for `extends:`."""
    whole = OmegaConf.create(to_yaml(replace(Recipe(), model=model)))
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"model": whole.model})))


@guarded_environment()
def read_model(path: Path) -> Model:
    """Reads the model that :func:`write_model` wrote.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        tree = OmegaConf.select(OmegaConf.load(path), "model")
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), tree))
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a recipe's model ({type(error).__name__})") from None
    assert isinstance(model, Model)
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: if the file is missing or contains something else.
    """
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a JSON object")
    return tree
