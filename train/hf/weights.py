"""Weights under our names from any source: a run, a checkpoint, an imported folder, a Hugging Face folder.

Consumers of weights (export, generation, continued training, upcycling) read rows of a tensor, so they do not
depend on the source and need no model in memory.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from train.checkpoint.files import newest_whole_checkpoint, read_progress
from train.hf.architectures import family_of
from train.hf.average_option import OPTION, Average
from train.hf.averaged_weights import MeanWeights, newest_checkpoints
from train.hf.checkpoint_weights import CheckpointWeights
from train.hf.folders import CONFIG_FILE, MODEL_FILE, STATE_FOLDER, model_at, read_json
from train.hf.mapping import Architecture, Link
from train.hf.safetensors_io import SafetensorsFolder, TensorInfo
from train.recipe import sizes
from train.recipe.curriculum import from_json
from train.recipe.errors import UserError
from train.recipe.schema import Model, Recipe
from train.record.log import get_logger
from train.record.run_folder import CHECKPOINTS_FOLDER

log = get_logger(__name__)

BALANCING_BIAS = "router.expert_bias"
"""A buffer that some models have besides their weights."""


class Weights(Protocol):
    """Tensors under our names, read by rows."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows ``first`` up to ``last`` (the end, if None) of a tensor."""


@dataclass(frozen=True)
class WeightSource:
    """Weights with their model, location and recipe."""

    path: Path
    """The checkpoint or folder that contains them."""
    model: Model
    weights: Weights
    recipe: Recipe | None = None
    """The recipe of the run that trained them; None for weights that are not from a run."""
    average: Average | None = None
    """The average that they are; None: weights as trained."""


class HuggingFaceWeights:
    """A Hugging Face folder under our names, assembled from its tensors as they are read.

    Raises:
        UserError: for a missing or unexpected tensor, or one of the wrong shape.
    """

    def __init__(self, folder: SafetensorsFolder, family: Architecture, model: Model) -> None:
        self.folder = folder
        self._links: dict[str, list[Link]] = {}
        self._copies: dict[str, list[Link]] = {}
        expected: set[str] = set()
        for link in family.links(model):
            expected.add(link.theirs)
            if link.is_copy and link.theirs not in folder.tensors:
                continue
            self._check(link)
            if link.ours is not None:
                (self._copies if link.is_copy else self._links).setdefault(link.ours, []).append(link)
        later = {name: family.later_layer(name, model) for name in folder.tensors}
        if layers := sorted({layer for layer in later.values() if layer is not None}):
            log.info("%s: leaves out layers %s, of multi-token prediction", folder.folder, layers)
        for name in (name for name, layer in later.items() if layer is None):
            if name not in expected and not name.endswith(family.ignored or ("\0",)):
                raise UserError(f"{folder.folder}: {name} is not a tensor of a {family.model_type} model")
        self.tensors = {}
        for weight in (*sizes.weights(model), *sizes.biases(model)):
            links = self._links[weight.name] + self._copies.get(weight.name, [])
            dtypes = {folder.tensors[link.theirs].dtype for link in links}
            if len(dtypes) > 1:
                raise UserError(f"{folder.folder}: parts of {weight.name} have different data types")
            self.tensors[weight.name] = TensorInfo(weight.name, dtypes.pop(), weight.shape)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows of one of our tensors."""
        last = self.tensors[name].shape[0] if last is None else last
        parts = []
        for link in self._links[name]:
            start, end = max(first - link.first, 0), min(last - link.first, link.rows)
            if start >= end:
                continue
            if link.transposed:
                parts.append(self.folder.read(link.theirs).t()[start:end])
            else:
                parts.append(self.folder.read(link.theirs, start, end))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        for copy in self._copies.get(name, []):
            if not torch.equal(rows, self.folder.read(copy.theirs, first, last)):
                raise UserError(
                    f"{self.folder.folder}: {copy.theirs} is not the copy of {self._links[name][0].theirs} "
                    "that model.mtp has; num_nextn_predict_layers of 0 in config.json leaves its layer out"
                )
        return rows

    def _check(self, link: Link) -> None:
        info = self.folder.tensors.get(link.theirs)
        if info is None:
            raise UserError(f"{self.folder.folder}: {link.theirs} is missing")
        if info.shape != link.shape:
            raise UserError(
                f"{self.folder.folder}: {link.theirs} has shape {info.shape} instead of {link.shape}"
            )


def open_weights(path: Path, checkpoint: str | None = None, average: Average | None = None) -> WeightSource:
    """Opens weights of any source; only headers and metadata are read.

    Args:
        path: a run's folder, one of its checkpoints, a folder that `train.hf import` or `train.hf upcycle`
            wrote, or a Hugging Face folder.
        checkpoint: folder name of a run's checkpoint; None: the newest complete one.
        average: an average of a run's weights instead of them.

    Raises:
        UserError: if there are no weights, or they are damaged.
    """
    model, recipe = model_at(path)
    if average is not None:
        _check_average(path, average, checkpoint, recipe)
    if recipe is None and checkpoint is not None:
        raise UserError(f"{path}: is not a run, so it has no checkpoint {checkpoint}")
    weights: Weights
    if recipe is not None and average is not None and average.last is not None:
        path, *others = newest_checkpoints(path, average.last)
        weights = MeanWeights([CheckpointWeights(each) for each in (path, *others)])
        model = replace(model, rope_theta=rope_theta_at(path, model))
    elif recipe is not None:
        if (path / CHECKPOINTS_FOLDER).is_dir():
            path = path / CHECKPOINTS_FOLDER / checkpoint if checkpoint else newest(path)
        if not (path / STATE_FOLDER).is_dir():
            raise UserError(f"{path}: is not a checkpoint")
        weights = CheckpointWeights(path, of_average=average is not None)
        model = replace(model, rope_theta=rope_theta_at(path, model))
    elif (path / MODEL_FILE).is_file():
        weights = SafetensorsFolder(path)
    else:
        family = family_of(read_json(path / CONFIG_FILE))
        weights = HuggingFaceWeights(SafetensorsFolder(path), family, model)
    source = WeightSource(path, model, weights, recipe, average)
    check_complete(source)
    return source


def _check_average(path: Path, average: Average, checkpoint: str | None, recipe: Recipe | None) -> None:
    """Raises if a folder of weights has nothing of which the average could be had."""
    if recipe is None:
        raise UserError(f"{path}: is not a run, so it has no average", key=OPTION, remedy="leave it out")
    if average.last is not None and (checkpoint or not (path / CHECKPOINTS_FOLDER).is_dir()):
        what = "averages a run's newest checkpoints, and one is named"
        raise UserError(what, key=OPTION, remedy=f"name only the run, or use {OPTION} ema")


def rope_theta_at(checkpoint: Path, model: Model) -> float:
    """Returns RoPE's base in the phase of a checkpoint; the model's, if there were no phases."""
    progress = read_progress(checkpoint)
    if progress.curriculum is None:
        return model.rope_theta
    return from_json(progress.curriculum).stage_of(max(0, progress.batch - 1)).rope_theta


def newest(run: Path) -> Path:
    """Returns the newest complete checkpoint of a run.

    Raises:
        UserError: if there is none.
    """
    found, complaints = newest_whole_checkpoint(run / CHECKPOINTS_FOLDER)
    if found is None:
        raise UserError(": ".join([f"{run}: has no complete checkpoint", *complaints[:1]]))
    return found


def check_complete(source: WeightSource) -> None:
    """Checks names and shapes against the model's.

    Raises:
        UserError: for the first missing or unexpected tensor, or one of the wrong shape.
    """
    expected = list(sizes.weights(source.model))
    surplus = source.weights.tensors.keys() - {weight.name for weight in expected}
    for name in sorted(surplus):
        if not name.endswith(BALANCING_BIAS):
            raise UserError(f"{source.path}: {name} is not a tensor of its model")
    for weight in expected:
        info = source.weights.tensors.get(weight.name)
        if info is None:
            raise UserError(f"{source.path}: {weight.name} is missing")
        if info.shape != weight.shape:
            raise UserError(f"{source.path}: {weight.name} has shape {info.shape} instead of {weight.shape}")
