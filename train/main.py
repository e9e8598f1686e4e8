"""The main job: `composer train/main.py RECIPE.yaml [key=value ...]`.

Everything that can be wrong with a recipe is found here, in a second, before torch is imported.
"""

import argparse
import json
import sys
from pathlib import Path

# `python train/main.py` puts train/ itself on the path, where modules would shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.evaluate.suite import check_suite
from train.hf.start import check_start
from train.recipe.catalogue import describe_keys
from train.recipe.describe import describe_run
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.rules import validate
from train.recipe.topology import Topology


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (2: a mistake in the recipe)."""
    options = parse(arguments)
    try:
        topology = Topology.from_environment()
        recipe = load_recipe(options.recipe, options.overrides)
        validate(recipe, topology, options.recipe)
        changes = check_start(recipe, options.recipe)
        check_suite(recipe, options.recipe)
        if options.dry_run:
            if topology.is_main:
                text, figures = describe_run(recipe, topology)
                print(f"{to_yaml(recipe)}\n{text}")
                if options.json:
                    Path(options.json).write_text(json.dumps(figures, indent=1))
            return 0
        if topology.is_main:
            for change in changes:
                print(change)
            print(f"{recipe.name}: recipe is sound; importing torch, Composer and MegaBlocks", flush=True)
        from train.run import run

        return run(recipe, topology)
    except UserError as error:
        if "topology" not in locals() or topology.is_main:
            print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="composer train/main.py",
        description="Trains the model of a recipe. The same command resumes a run that was cut off.",
        epilog=describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="wins over the file, for example training.clip_norm=0.5",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, sizes, FLOPs and batch arithmetic; build nothing",
    )
    parser.add_argument("--json", metavar="FILE", help="with --dry-run: write its figures as JSON too")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
