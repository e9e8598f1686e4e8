"""A Hugging Face folder as weights that a recipe can start from: `python -m train.hf.import_hf SOURCE OUT`.

Only safetensors are read: no pickle, no remote code. Every tensor is checked before the first is
copied (present, of the right shape and type, none too many) and for NaN before it is written. A call that
was cut off is gone on with by the same call.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from train.recipe.errors import UserError

if TYPE_CHECKING:
    from train.hf.weights_folder import Written

USAGE_STATUS = 2


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (2: a mistake of the user)."""
    options = parse(arguments)
    print(f"import: opening {options.source}; importing torch first", file=sys.stderr, flush=True)
    from train.hf.weights_folder import verify_weights_folder

    try:
        if options.verify:
            read = verify_weights_folder(options.source)
            print(f"{options.source}: {read / 1e9:.3f} GB are what was written")
            return 0
        written = import_folder(options.source, options.out, options.shard_gb)
    except UserError as error:
        print(f"import: {error}", file=sys.stderr)
        return USAGE_STATUS
    print(
        f"{options.out}: {written.parameters:,} parameters, {written.bytes / 1e9:.3f} GB in "
        f"{written.files} files; start a recipe from it with start.weights={options.out}"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(written), indent=1) + "\n")
    return 0


def import_folder(source: Path, out: Path, shard_gb: float = 5.0) -> "Written":
    """Checks and streams a Hugging Face folder into a folder of weights under our names.

    Args:
        source: `config.json` and safetensors, of an architecture in :mod:`train.hf.hf_mapping`.
        out: new, empty, or left unfinished by the same call.
        shard_gb: most gigabytes (1e9 bytes) per file.

    Raises:
        UserError: if the source cannot be expressed, is damaged or holds NaN.
    """
    from train.hf.folders import CONFIG_FILE, HEADERS_FILE, MODEL_FILE, SOURCE_FOLDER, read_json
    from train.hf.model_card import texts_of
    from train.hf.safetensors_io import read_header
    from train.hf.weights import HuggingFaceWeights, open_weights
    from train.hf.weights_folder import write_weights_folder
    from train.recipe.errors import UserError

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


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.hf.import_hf",
        description="Turns a Hugging Face folder into weights that a recipe can start from, streamed.",
    )
    parser.add_argument("source", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write; the same call goes on with it")
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=5.0,
        metavar="N",
        help="most gigabytes (1e9 bytes) per file (default: 5)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read SOURCE, an imported folder, against its manifest instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args(arguments)
    if options.verify == (options.out is not None):
        parser.error("give SOURCE and OUT, or --verify and a folder")
    if not options.shard_gb > 0:
        parser.error("--shard-gb must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
