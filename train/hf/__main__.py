"""Conversion of weights: `python -m train.hf import|export|upcycle|check|serving`, each with `--help`."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from pathlib import Path

from train.hf.average_option import add_average
from train.hf.serving import ENGINES, check_folder
from train.recipe.errors import UserError
from train.recipe.schema import Balance, Moe
from train.record import log
from train.record.command import CommandGroup, Figures, Outcome, at_least, command
from train.record.tables import text_table

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
WEIGHTS = "a run (runs/NAME), one of its checkpoints, or an imported folder"
JSON_HELP = "write the figures as JSON too"

logger = log.get_logger("train.hf")


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder with config.json and safetensors")
    parser.add_argument(
        "out", type=Path, nargs="?", help="folder to write; the same call continues an interrupted one"
    )
    parser.add_argument(
        "--shard-gb",
        type=_positive,
        default=5.0,
        metavar="N",
        help="maximum gigabytes (1e9 bytes) per file, and also in memory (default: 5)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check SOURCE, an imported folder, against its manifest instead"
    )


@command(
    "python -m train.hf import",
    "turns a Hugging Face folder into weights that a recipe can start from",
    _import_arguments,
    json=JSON_HELP,
    name="import",
)
def run_import(options: Namespace) -> Outcome:
    """Imports a Hugging Face folder, or verifies an imported one."""
    if options.verify == (options.out is not None):
        raise UserError("give SOURCE and OUT, or --verify and a folder")
    _announce("import", options.source)
    from train.hf.import_hf import import_folder
    from train.hf.weights_folder import verify_weights_folder

    if options.verify:
        read = verify_weights_folder(options.source)
        print(f"{options.source}: {read / 1e9:.3f} GB match the manifest")
        return 0
    written = import_folder(options.source, options.out, options.shard_gb)
    print(
        f"{options.out}: {written.parameters:,} parameters, {written.bytes / 1e9:.3f} GB in "
        f"{written.files} files; a recipe gets its architecture with `extends: {options.out}/model.yaml`, "
        f"its weights with start.weights={options.out}"
    )
    return Figures(asdict(written))


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=WEIGHTS)
    parser.add_argument("out", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--checkpoint", help="of a run: batch-..., instead of the newest complete one")
    add_average(parser)
    parser.add_argument(
        "--shard-gb",
        type=_positive,
        metavar="N",
        help="maximum gigabytes (1e9 bytes) per file (default: 5, or the files that it was imported from)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")


@command(
    "python -m train.hf export",
    "writes a Hugging Face folder that AutoModelForCausalLM loads offline",
    _export_arguments,
    json=JSON_HELP,
    name="export",
)
def run_export(options: Namespace) -> Figures:
    """Exports weights as a Hugging Face folder."""
    _announce("export", options.source)
    import torch

    from train.hf.export import write_folder
    from train.hf.weights import open_weights

    source = open_weights(options.source, options.checkpoint, options.average)
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
    return Figures(asdict(exported))


def _upcycle_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=f"dense model: {WEIGHTS}, or a Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to write; the same call continues an interrupted one")
    parser.add_argument(
        "--experts", type=at_least(int, 1), default=16, help="experts E per layer (default: 16)"
    )
    parser.add_argument("--top-k", type=at_least(int, 1), default=4, help="experts per token (default: 4)")
    parser.add_argument(
        "--granularity",
        type=at_least(int, 1),
        default=1,
        metavar="G",
        help="slices per copy of the dense layer; top-k = G keeps its FLOPs (default: 1, copies)",
    )
    parser.add_argument(
        "--shared",
        type=at_least(int, 0),
        default=0,
        metavar="S",
        help="of the G slices, those that are a shared expert, for every token (default: 0); top-k = G - S "
        "keeps the FLOPs then",
    )
    parser.add_argument("--balance", choices=[b.value for b in Balance], default="loss", help="default: loss")
    parser.add_argument("--seed", type=int, default=17, help="of the router (default: 17)")


@command(
    "python -m train.hf upcycle",
    "turns a dense model into a mixture of experts with the same loss at step 0",
    _upcycle_arguments,
    json=JSON_HELP,
    name="upcycle",
)
def run_upcycle(options: Namespace) -> Figures:
    """Turns a dense model into a mixture of experts."""
    _announce("upcycle", options.source)
    from train.hf.upcycle import upcycle

    moe = Moe(experts=options.experts, top_k=options.top_k, balance=Balance(options.balance))
    written = upcycle(options.source, options.out, moe, options.granularity, options.seed, options.shared)
    print(
        f"{options.out}: {written.parameters:,} parameters, {written.bytes / 1e9:.3f} GB; a recipe gets its "
        f"architecture with `extends: {options.out}/model.yaml`, its weights with start.weights={options.out}"
    )
    return Figures(asdict(written))


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="?", help=WEIGHTS)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="its export; without SOURCE and FOLDER, every architecture"
    )


@command(
    "python -m train.hf check",
    "compares our decoder with what transformers computes from an export",
    _check_arguments,
    json=JSON_HELP,
    name="check",
)
def run_check(options: Namespace) -> Figures:
    """Compares one export, or a small model of every architecture, with transformers; 1: they differ."""
    if (options.source is None) != (options.folder is None):
        raise UserError("give SOURCE and FOLDER, or neither to check every architecture")
    logger.info("check: importing torch and transformers")
    from train.hf import check

    rows = list(
        check.compare_all() if options.source is None else [check.compare(options.source, options.folder)]
    )
    print(check.table(rows))
    return Figures([asdict(row) for row in rows], 0 if all(row.passed for row in rows) else 1)


def _serving_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder that export wrote")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm", help="default: vllm")
    parser.add_argument(
        "--tensor-parallel", type=at_least(int, 1), default=1, metavar="P", help="degree (default: 1)"
    )


@command(
    "python -m train.hf serving",
    "checks an exported DBRX folder against an engine's table of names and shapes",
    _serving_arguments,
    json=JSON_HELP,
    name="serving",
)
def run_serving(options: Namespace) -> Figures:
    """Checks an export against an engine's parameters."""
    table = check_folder(options.folder, options.engine, options.tensor_parallel)
    rows = [(slot.name, " x ".join(map(str, slot.shape)), " + ".join(slot.sources)) for slot in table]
    print(text_table((), rows, "<><"))
    print(f"{len(table)} parameters of {options.engine} filled, none missing, none unused")
    return Figures([asdict(slot) for slot in table])


main = CommandGroup(
    "python -m train.hf",
    "Conversion of weights from and to Hugging Face folders.",
    {
        "import": run_import,
        "export": run_export,
        "upcycle": run_upcycle,
        "check": run_check,
        "serving": run_serving,
    },
)


def _announce(name: str, source: Path) -> None:
    logger.info(f"{name}: importing torch, then opening {source}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
