"""A checkpoint as a Hugging Face folder: `python -m train.hf.export runs/NAME OUT`.

A model that no architecture of `transformers` expresses exactly is refused rather than bent.
"""

import argparse
import json
import sys
from pathlib import Path

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
USAGE_STATUS = 2


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (2: a mistake of the user)."""
    options = parse(arguments)
    print(f"export: opening {options.source}; importing torch first", file=sys.stderr, flush=True)
    import torch

    from train.hf.hf_folder import write_folder
    from train.hf.weights import open_weights
    from train.recipe.errors import UserError

    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    try:
        source = open_weights(options.source, options.checkpoint)
        exported = write_folder(
            source, options.out, dtype, options.shard_gb and round(options.shard_gb * 1e9)
        )
    except UserError as error:
        print(f"export: {error}", file=sys.stderr)
        return USAGE_STATUS
    print(
        f"{exported.folder}: {exported.architecture} from {source.path}, {exported.bytes / 1e9:.3f} GB of "
        f"{exported.dtype} in {len(exported.files)} files"
    )
    if options.json:
        options.json.write_text(json.dumps(exported.__dict__, indent=1) + "\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.hf.export",
        description="Writes a Hugging Face folder that AutoModelForCausalLM loads offline.",
    )
    parser.add_argument(
        "source", type=Path, help="a run (runs/NAME), one of its checkpoints, or an imported folder"
    )
    parser.add_argument("out", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--checkpoint", help="of a run: batch-..., instead of the newest whole one")
    parser.add_argument(
        "--shard-gb",
        type=_positive,
        metavar="N",
        help="most gigabytes (1e9 bytes) per file (default: 5, or the files that it was imported from)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was exported as JSON too")
    return parser.parse_args(arguments)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
