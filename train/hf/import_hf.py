"""Import of a Hugging Face folder as weights that a recipe can start from.

Only safetensors are read: no pickle, no remote code. Every tensor is checked before the first is
copied (present, of the right shape and type, none too many) and for NaN before it is written. A call that
was cut off is continued by the same call.
"""

import json
from pathlib import Path

from train.hf.folders import CONFIG_FILE, HEADERS_FILE, MODEL_FILE, SOURCE_FOLDER, read_json
from train.hf.model_card import texts_of
from train.hf.safetensors_io import read_header
from train.hf.weights import HuggingFaceWeights, open_weights
from train.hf.weights_folder import Written, write_weights_folder
from train.recipe.errors import UserError


def import_folder(source: Path, out: Path, shard_gb: float = 5.0) -> Written:
    """Checks and streams a Hugging Face folder into a folder of weights under our names.

    Args:
        source: `config.json` and safetensors, of an architecture in :mod:`train.hf.mapping`.
        out: new, empty, or left unfinished by the same call.
        shard_gb: most gigabytes (1e9 bytes) per file.

    Raises:
        UserError: if the source cannot be expressed, is damaged or holds NaN.
    """
    if (out / MODEL_FILE).is_file():
        raise UserError(f"{out}: is a complete import already; name a new folder")
    opened = open_weights(source)
    if not isinstance(opened.weights, HuggingFaceWeights):
        raise UserError(f"{source}: is not in Hugging Face's form; needs {CONFIG_FILE}")
    files = [source / name for name in opened.weights.folder.files]
    headers = {file.name: read_header(file) for file in files}
    origin = {
        "folder": str(source),
        "config": read_json(source / CONFIG_FILE),
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
    }
    beside = {f"{SOURCE_FOLDER}/{file.name}": file.read_bytes() for file in texts_of(source)}
    beside[f"{SOURCE_FOLDER}/{HEADERS_FILE}"] = json.dumps(headers, indent=1).encode()
    return write_weights_folder(
        out, opened.model, opened.weights, origin, round(shard_gb * 1e9), beside=beside
    )
