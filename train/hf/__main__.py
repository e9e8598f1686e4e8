"""Weights in and out: `python -m train.hf import|export|upcycle|check|serving`, each with `--help`."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from train.hf.serving import ENGINES, check_folder
from train.recipe.errors import UserError
from train.recipe.schema import Balance, Moe

USAGE_STATUS = 2
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
WEIGHTS = "a run (runs/NAME), one of its checkpoints, or an imported folder"

Run = Callable[[argparse.Namespace], int]
"""A command; returns the exit status."""


def main(arguments: list[str]) -> int:
    """Runs the command line; exit status 1 if `check` found a difference, 2 for a mistake of the user."""
    options = parse(arguments)
    try:
        status: int = options.run(options)
    except UserError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return USAGE_STATUS
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line; `run` is the command's function."""
    parser = argparse.ArgumentParser(
        prog="python -m train.hf", description="Weights in and out of Hugging Face's form."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Run, description: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=description, description=description)
        one.set_defaults(run=run)
        one.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
        return one

    _import_options(
        command("import", run_import, "turns a Hugging Face folder into weights that a recipe can start from")
    )
    _export_options(
        command("export", run_export, "writes a Hugging Face folder that AutoModelForCausalLM loads offline")
    )
    _upcycle_options(
        command(
            "upcycle",
            run_upcycle,
            "turns a dense model into a mixture of experts with the same loss at step 0",
        )
    )
    _check_options(
        command("check", run_check, "compares our decoder with what transformers computes from an export")
    )
    _serving_options(
        command(
            "serving", run_serving, "holds an exported DBRX folder to an engine's table of names and shapes"
        )
    )
    return parser.parse_args(arguments)


def run_import(options: argparse.Namespace) -> int:
    """Imports a Hugging Face folder, or verifies an imported one."""
    if options.verify == (options.out is not None):
        raise UserError("give SOURCE and OUT, or --verify and a folder")
    _opening(options)
    from train.hf.import_hf import import_folder
    from train.hf.weights_folder import verify_weights_folder

    if options.verify:
        read = verify_weights_folder(options.source)
        print(f"{options.source}: {read / 1e9:.3f} GB are what was written")
        return 0
    written = import_folder(options.source, options.out, options.shard_gb)
    print(
        f"{options.out}: {written.parameters:,} parameters, {written.bytes / 1e9:.3f} GB in "
        f"{written.files} files; start a recipe from it with start.weights={options.out}"
    )
    _write_figures(options, asdict(written))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Exports weights as a Hugging Face folder."""
    _opening(options)
    import torch

    from train.hf.export import write_folder
    from train.hf.weights import open_weights

    source = open_weights(options.source, options.checkpoint)
    exported = write_folder(
        source,
        options.out,
        getattr(torch, DTYPES[options.dtype]) if options.dtype else None,
        round(options.shard_gb * 1e9) if options.shard_gb else None,
    )
    print(
        f"{exported.folder}: {exported.architecture} from {source.path}, {exported.bytes / 1e9:.3f} GB of "
        f"{exported.dtype} in {len(exported.files)} files"
    )
    _write_figures(options, asdict(exported))
    return 0


def run_upcycle(options: argparse.Namespace) -> int:
    """Makes a mixture of experts of a dense model."""
    _opening(options)
    from train.hf.upcycle import upcycle

    moe = Moe(experts=options.experts, top_k=options.top_k, balance=Balance(options.balance))
    written = upcycle(options.source, options.out, moe, options.granularity, options.seed)
    print(
        f"{options.out}: {written.parameters:,} parameters, {written.bytes / 1e9:.3f} GB; a recipe that says "
        f"`extends: {options.out}/model.yaml` has its architecture, start.weights={options.out} its weights"
    )
    _write_figures(options, asdict(written))
    return 0


def run_check(options: argparse.Namespace) -> int:
    """Compares one export, or a small model of every architecture, with transformers."""
    if (options.source is None) != (options.folder is None):
        raise UserError("give SOURCE and FOLDER, or neither: then every architecture is tried")
    print("check: importing torch and transformers", file=sys.stderr, flush=True)
    from train.hf import check

    rows = list(
        check.compare_all() if options.source is None else [check.compare(options.source, options.folder)]
    )
    print(check.table(rows))
    _write_figures(options, [asdict(row) for row in rows])
    return 0 if all(row.passed for row in rows) else 1


def run_serving(options: argparse.Namespace) -> int:
    """Holds an export to an engine's parameters."""
    table = check_folder(options.folder, options.engine, options.tensor_parallel)
    width = max(len(slot.name) for slot in table)
    for slot in table:
        print(f"{slot.name:{width}}  {' x '.join(map(str, slot.shape)):>20}  {' + '.join(slot.sources)}")
    print(f"{len(table)} parameters of {options.engine} filled, nothing missing, nothing left over")
    _write_figures(options, [asdict(slot) for slot in table])
    return 0


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder with config.json and safetensors")
    parser.add_argument(
        "out", type=Path, nargs="?", help="folder to write; the same call continues one that was cut off"
    )
    parser.add_argument(
        "--shard-gb",
        type=_positive,
        default=5.0,
        metavar="N",
        help="most gigabytes (1e9 bytes) per file, which is also what is in memory (default: 5)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read SOURCE, an imported folder, against its manifest instead"
    )


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=WEIGHTS)
    parser.add_argument("out", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--checkpoint", help="of a run: batch-..., instead of the newest whole one")
    parser.add_argument(
        "--shard-gb",
        type=_positive,
        metavar="N",
        help="most gigabytes (1e9 bytes) per file (default: 5, or the files that it was imported from)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")


def _upcycle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=f"dense: {WEIGHTS}, or one in Hugging Face's form")
    parser.add_argument(
        "out", type=Path, help="folder to write; the same call continues one that was cut off"
    )
    parser.add_argument("--experts", type=_count, default=16, help="experts E per layer (default: 16)")
    parser.add_argument("--top-k", type=_count, default=4, help="experts per token (default: 4)")
    parser.add_argument(
        "--granularity",
        type=_count,
        default=1,
        metavar="G",
        help="slices per copy of the dense layer; top-k = G keeps its FLOPs (default: 1, copies)",
    )
    parser.add_argument("--balance", choices=[b.value for b in Balance], default="loss", help="default: loss")
    parser.add_argument("--seed", type=int, default=17, help="of the router (default: 17)")


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="?", help=WEIGHTS)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="what export made of it; neither: every architecture"
    )


def _serving_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder that export wrote")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm", help="default: vllm")
    parser.add_argument("--tensor-parallel", type=_count, default=1, metavar="P", help="degree (default: 1)")


def _opening(options: argparse.Namespace) -> None:
    print(f"{options.command}: opening {options.source}; importing torch first", file=sys.stderr, flush=True)


def _write_figures(options: argparse.Namespace, figures: object) -> None:
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
