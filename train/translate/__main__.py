"""Recipes of other frameworks in our keys: `python -m train.translate FILE --out RECIPE.yaml`."""

import sys
import tomllib
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.recipe.errors import UserError
from train.recipe.secrets import guarded_environment
from train.record.command import command
from train.record.files import write_whole
from train.translate.recipes import Translation, translate


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("file", type=Path, help="YAML of LLM Foundry, or TOML of torchtitan")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the recipe there (default: print it)")


@command(
    "python -m train.translate",
    "Translates a recipe of LLM Foundry or torchtitan into our keys; what has no counterpart is named.",
    add_arguments,
    file="file",
    mistakes=(OSError,),
)
def main(options: Namespace) -> int:
    """Writes or prints the translated recipe."""
    text = as_yaml(translate(read(options.file), options.file.stem))
    if options.out is None:
        print(text, end="")
        return 0
    if options.out.exists():
        raise UserError(f"{options.out} exists", key="--out", remedy="name a new file")
    write_whole(options.out, text)
    print(f"{options.out}: complete it and check it with `python train/main.py {options.out} --dry-run`")
    return 0


@guarded_environment()
def read(file: Path) -> dict[str, Any]:
    """Reads a recipe of another framework, with its references to its own keys resolved.

    Raises:
        UserError: if it can't be read.
    """
    try:
        if file.suffix == ".toml":
            return tomllib.loads(file.read_text())
        tree = OmegaConf.to_container(OmegaConf.create(file.read_text()), resolve=True)
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError("is not a mapping of keys")
    return {str(name): value for name, value in tree.items()}


def as_yaml(found: Translation) -> str:
    """Writes a translation as YAML, with what has no counterpart as comments."""
    notes = "".join(f"#   {note}\n" for note in found.notes)
    head = f"# Translated from {found.origin} by `python -m train.translate`. To be looked at:\n{notes}"
    return head + yaml.safe_dump(found.nested(), sort_keys=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
