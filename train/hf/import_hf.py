"""Import of a Hugging Face folder as weights that a recipe can start from.

Only safetensors files are read: no pickle, no remote code. Before anything is copied, all tensors are checked
(present, of the right shape and type, none unexpected), and each is checked for NaN before it is written. An
interrupted import is resumed by the same call.
"""

import json
from pathlib import Path

from train.hf.folders import CONFIG_FILE, HEADERS_FILE, MODEL_FILE, SOURCE_FOLDER, read_header, read_json
from train.hf.model_card import texts_of
from train.hf.weights import HuggingFaceWeights, open_weights
from train.hf.weights_folder import Written, write_weights_folder
from train.recipe.errors import UserError


def import_folder(source: Path, out: Path, shard_gb: float = 5.0) -> Written:
    """Checks a Hugging Face folder and streams it into a folder of weights under our names.

    Args:
        source: `config.json` and safetensors, of an architecture in :mod:`train.hf.architectures`.
        out: new, empty, or left unfinished by the same call.
        shard_gb: maximum gigabytes (1e9 bytes) per file.

    Raises:
        UserError: if the source cannot be expressed, is damaged or contains NaN.
    """
    if (out / MODEL_FILE).is_file():
        raise UserError(f"{out}: is already a complete import; name a new folder")
    opened = open_weights(source)
    if not isinstance(opened.weights, HuggingFaceWeights):
        raise UserError(f"{source}: is not a Hugging Face folder; needs {CONFIG_FILE}")
    files = [source / name for name in opened.weights.folder.files]
    headers = {file.name: read_header(file) for file in files}
    origin = {
        "folder": str(source),
        "config": read_json(source / CONFIG_FILE),
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
    }
    extra_files = {f"{SOURCE_FOLDER}/{file.name}": file.read_bytes() for file in texts_of(source)}
    extra_files[f"{SOURCE_FOLDER}/{HEADERS_FILE}"] = json.dumps(headers, indent=1).encode()
    return write_weights_folder(
        out, opened.model, opened.weights, origin, round(shard_gb * 1e9), extra_files=extra_files
    )
