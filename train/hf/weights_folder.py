"""Writes folders of weights under our names: safetensors files, index, manifest and, last, the model.

Writing can be interrupted and resumed any number of times: a partial manifest lists the complete files. The
model's description, without which the folder is not valid, is written when everything else is complete.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from train.hf.folders import MODEL_FILE, make_new_folder, read_json, write_model
from train.hf.safetensors_io import (
    DEFAULT_SHARD_BYTES,
    TensorInfo,
    check_finite,
    plan_files,
    write_files,
    write_index,
)
from train.hf.weights import Weights
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Model
from train.record.files import sha256

MANIFEST_FILE = "manifest.json"
UNFINISHED_FILE = "manifest.partial.json"


@dataclass(frozen=True)
class Written:
    """A folder that was written."""

    folder: str
    parameters: int
    bytes: int
    files: int
    resumed_files: int
    """Files that an earlier call had completed."""


def write_weights_folder(
    out: Path,
    model: Model,
    weights: Weights,
    origin: Mapping[str, object],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    extra_files: Mapping[str, bytes] | None = None,
) -> Written:
    """Streams weights into a folder that recipes can start from.

    Args:
        out: the folder; new, empty, or left unfinished by the same call.
        model: the weights' model.
        weights: their source.
        origin: identifies the source and is kept in the manifest; a folder that was started from another
            origin is not resumed.
        shard_bytes: maximum bytes per file.
        extra_files: additional files by their path in the folder.

    Raises:
        UserError: if the folder is in use, or a weight is not finite.
    """
    tensors = [weights.tensors[weight.name] for weight in sizes.weights(model)]
    # Weights from elsewhere have no biases, which then are 0.
    tensors += [weights.tensors[bias.name] for bias in sizes.biases(model) if bias.name in weights.tensors]
    files = plan_files(tensors, shard_bytes)
    identity = {
        "origin": dict(origin),
        "plan": {name: [info.name for info in plan.tensors] for name, plan in files.items()},
    }
    done = _begin(out, identity)
    resumed = len(done)
    left = {name: plan for name, plan in files.items() if name not in done}
    total = sum(info.bytes for plan in left.values() for info in plan.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc=out.name, mininterval=1.0) as bar:

        def read(info: TensorInfo) -> Tensor:
            tensor = weights.read(info.name)
            check_finite(info.name, tensor)
            bar.update(info.bytes)
            return tensor

        for name, digest in write_files(out, left, read):
            done[name] = {"bytes": (out / name).stat().st_size, "sha256": digest}
            _write_json(out / UNFINISHED_FILE, identity | {"files": done})
    for path, content in (extra_files or {}).items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_bytes(content)
    write_index(out, files)
    _write_json(out / MANIFEST_FILE, {"origin": dict(origin), "files": {name: done[name] for name in files}})
    write_model(out / MODEL_FILE, model)
    (out / UNFINISHED_FILE).unlink(missing_ok=True)
    size = sum((out / name).stat().st_size for name in files)
    return Written(str(out), sizes.total_parameters(model), size, len(files), resumed)


def verify_weights_folder(folder: Path) -> int:
    """Reads every file and compares it with the manifest; returns the bytes read.

    Raises:
        UserError: for the first file that is missing or was changed.
    """
    total = 0
    for name, entry in read_json(folder / MANIFEST_FILE)["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file}: is missing or not {entry['bytes']} bytes long")
        if sha256(file) != entry["sha256"]:
            raise UserError(f"{file}: was changed since it was written (SHA-256 differs)")
        total += entry["bytes"]
    return total


def _begin(out: Path, identity: dict[str, object]) -> dict[str, dict[str, object]]:
    """Creates the folder, or returns the files that an earlier call completed in it."""
    unfinished = out / UNFINISHED_FILE
    if unfinished.is_file():
        before = read_json(unfinished)
        done: dict[str, dict[str, object]] = before.pop("files")
        if before != identity:
            raise UserError(f"{out}: was started from another source or with other files; remove it")
        return {
            name: entry
            for name, entry in done.items()
            if (out / name).is_file() and (out / name).stat().st_size == entry["bytes"]
        }
    make_new_folder(out)
    _write_json(unfinished, identity | {"files": {}})
    return {}


def _write_json(path: Path, tree: Mapping[str, object]) -> None:
    partial = path.with_name(path.name + ".writing")
    partial.write_text(json.dumps(tree, indent=1) + "\n")
    partial.replace(path)
