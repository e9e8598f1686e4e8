"""Readiness of a run's folders and shards, checked before torch is imported; leaves nothing behind."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from data.chat_template import read_template
from data.shards.enough import require_validation
from data.shards.manifest import MANIFEST_FILE, read_manifest, require_match
from data.tokenizer import open_tokenizer
from train.recipe.errors import UserError
from train.recipe.phases import fills_in_middle
from train.recipe.schema import OnExisting, Recipe, TokenizerKind
from train.record.run_folder import SUMMARY_FILE


def check_readiness(recipe: Recipe, file: str) -> None:
    """Raises if the run would end for want of a folder, of shards or of a tokenizer.

    Shards in an object store are found only when they are fetched, and files may still be damaged: the run
    itself checks both.

    Args:
        recipe: a valid recipe.
        file: the recipe's file, for the error.

    Raises:
        UserError: one line that names file, key and remedy.
    """
    folder = Path(recipe.runs_dir) / recipe.name
    if recipe.on_existing is OnExisting.resume:
        with suppress(OSError):  # A name that is too long is refused below.
            if (folder / SUMMARY_FILE).exists():
                return  # Complete: nothing is read or written.
    try:
        _require_writable(folder, "runs_dir", "name a folder on a disk with room that you may write to")
        if recipe.data.remote is not None:
            _check_remote(recipe.data.remote)
            _require_writable(Path(recipe.data.shards), "data.shards", "name a folder for the cache")
        else:
            _check_shards(recipe)
    except UserError as error:
        raise error.at(file) from None


def _check_remote(remote: str) -> None:
    if "://" not in remote and not (Path(remote) / MANIFEST_FILE).is_file():
        raise UserError(
            f"no shards at {remote}",
            key="data.remote",
            remedy="correct the path, or upload them with `python -m data.write_shards RECIPE --upload`",
        )


def _check_shards(recipe: Recipe) -> None:
    root = Path(recipe.data.shards)
    if recipe.data.corpus is not None and not (root / MANIFEST_FILE).exists():
        path = recipe.tokenizer.path
        if path is not None and not Path(path).exists():
            raise UserError(f"no {path}", key="tokenizer.path", remedy="correct the path")
        read_template(recipe.tokenizer)
        _require_writable(root, "data.shards", "give a folder that can be, for the shards to be built in")
        return
    manifest = read_manifest(root)
    is_opened = recipe.tokenizer.kind is TokenizerKind.bpe or fills_in_middle(recipe)
    require_match(manifest, recipe, open_tokenizer(recipe.tokenizer, root) if is_opened else None)
    require_validation(manifest, recipe)


def _require_writable(folder: Path, key: str, remedy: str) -> None:
    """Raises unless the folder, or the nearest one above it that exists, can be written to."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)
    except OSError as error:  # For example a name that is too long.
        raise UserError(f"can't be written ({error.strerror})", key=key, remedy=remedy) from None
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{folder} can't be written ({there} is no folder)", key=key, remedy=remedy)
    try:
        # Permissions do not tell: nobody can write to /proc, not even those who may.
        with TemporaryDirectory(prefix=".writable-", dir=there):
            pass
    except OSError as error:
        what = f"{there} can't be written to ({error.strerror})"
        raise UserError(what, key=key, remedy=remedy) from None
