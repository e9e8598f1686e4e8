"""Which files of a Hugging Face dataset are its training data: neither leftovers nor other splits.

``datasets`` keeps what ``map``, ``filter`` and ``shuffle`` made (``cache-*.arrow``) among the files of a
saved dataset, whose ``state.json`` lists its own. A saved ``DatasetDict`` has a folder for each split, which
``dataset_dict.json`` lists; folders from the hub name the split in their files or folders.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.text.file_listing import named
from train.recipe.errors import UserError
from train.record import log

logger = log.get_logger(__name__)

STATE, SPLITS = "state.json", "dataset_dict.json"
TRAIN = "train"
_EDGE = r"(?:^|$|[-._ 0-9])"
_SUFFIX = re.compile(r"\.(?:arrow|parquet|jsonl?|ndjson|txt)(?:\.gz|\.zst)?$")
_TRAINING = re.compile(rf"{_EDGE}(?:train|training){_EDGE}", re.I)
_HELD_OUT = re.compile(rf"{_EDGE}(?:test|testing|eval|evaluation|validation|valid|val|dev){_EDGE}", re.I)


def data_files(files: dict[str, Path], key: str) -> dict[str, Path]:
    """Returns the files that hold a dataset's training data; what is passed over is named in a line.

    Args:
        files: the files of a source by name, in order.
        key: the source's key, for messages.

    Raises:
        UserError: if a saved dataset lacks one of its files, or has several splits and none called train.
    """
    chosen = _without_leftovers(files, key)
    chosen, is_saved = _of_training_splits(chosen, key)
    if held_out := held_out_beside_training(name for name in chosen if name not in is_saved):
        what = f"reads the split train, not {named(held_out)}"
        logger.warning(f"{key}: {what}; to train on those too, give them a source of their own")
        left_out = set(held_out)
        chosen = {name: file for name, file in chosen.items() if name not in left_out}
    return chosen


def held_out_beside_training(names: Iterable[str]) -> list[str]:
    """Returns the names that speak of a test or validation split, if others speak of a training split.

    A folder or the file's own name may do so, as on the hub.
    """
    listed = list(names)
    if not any(_is_training(name) for name in listed):
        return []
    return [name for name in listed if _says(name, _HELD_OUT) and not _is_training(name)]


def _is_training(name: str) -> bool:
    return _says(name, _TRAINING)


def _says(name: str, split: re.Pattern[str]) -> bool:
    return any(split.search(part) for part in _SUFFIX.sub("", name).split("/"))


def _without_leftovers(files: dict[str, Path], key: str) -> dict[str, Path]:
    """Drops what lies among the files of a saved dataset and is none of them."""
    listed: dict[Path, set[str] | None] = {}
    for file in files.values():
        if file.parent not in listed:
            listed[file.parent] = _data_files_of(file.parent, key)
    left = [name for name, file in files.items() if not _is_listed(file, listed[file.parent])]
    if left:
        what = f"passed over {named(left)}, which {STATE} does not list as data of the saved dataset"
        logger.warning(f"{key}: {what}")
    return {name: file for name, file in files.items() if _is_listed(file, listed[file.parent])}


def _is_listed(file: Path, names: set[str] | None) -> bool:
    return names is None or file.name in names


def _data_files_of(folder: Path, key: str) -> set[str] | None:
    """The data files of a saved dataset; None if the folder holds none."""
    entries = _read(folder / STATE, key).get("_data_files")
    if not isinstance(entries, list):
        return None
    names = {str(entry["filename"]) for entry in entries if isinstance(entry, dict) and "filename" in entry}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        what = f"{folder} lacks {named(missing)}, which its {STATE} lists"
        raise UserError(what, key=key, remedy="copy the whole dataset again")
    return names


def _of_training_splits(files: dict[str, Path], key: str) -> tuple[dict[str, Path], set[str]]:
    """Keeps the split train of each saved DatasetDict; also returns the names of the files in such a one."""
    dicts: dict[Path, list[str] | None] = {}
    split_of: dict[str, tuple[Path, str]] = {}
    for name, file in files.items():
        # The folders from the source's own down to the file's.
        for folder in file.parents[: name.count("/") + 1]:
            if folder not in dicts:
                splits = _read(folder / SPLITS, key).get("splits")
                dicts[folder] = [str(split) for split in splits] if isinstance(splits, list) else None
            if dicts[folder] is not None:
                split_of[name] = folder, file.relative_to(folder).parts[0]
    for folder, splits in dicts.items():
        if splits:
            _report_splits(folder, splits, [of for of in split_of.values() if of[0] == folder], key)
    left_out = {
        name for name, (folder, split) in split_of.items() if split != _training_split(dicts[folder] or [])
    }
    return {name: file for name, file in files.items() if name not in left_out}, set(split_of)


def _training_split(splits: list[str]) -> str:
    return splits[0] if len(splits) == 1 else TRAIN


def _report_splits(folder: Path, splits: list[str], found: list[tuple[Path, str]], key: str) -> None:
    train = _training_split(splits)
    if train not in splits:
        raise UserError(
            f"{folder} has the splits {', '.join(splits)}, and none is called {TRAIN}",
            key=key,
            remedy=f"name the folder of one, for example {folder / splits[0]}",
        )
    counts = Counter(split for _, split in found)
    if not counts[train]:
        raise UserError(
            f"{folder} lacks the files of its split {train}", key=key, remedy="copy the whole dataset again"
        )
    others = [f"{split} ({count} files)" for split, count in sorted(counts.items()) if split != train]
    if others:
        what = f"reads the split {train} of {folder}, not {', '.join(others)}"
        logger.warning(f"{key}: {what}; to train on another split, give its folder a source of its own")


def _read(path: Path, key: str) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file, or it holds something else."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error})", key=key, remedy="copy the whole dataset again"
        ) from None
    return tree if isinstance(tree, dict) else {}
