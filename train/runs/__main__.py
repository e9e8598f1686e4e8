"""Runs from the command line: `python -m train.runs list | show | diff | rename | copy | rm | tag`.

A run is named by its folder, or by its name in `--runs-dir`.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.units import short_number
from train.record.changes import differences, keys_of, read_changes
from train.record.command import CommandGroup, Figures, command
from train.record.log import progress
from train.record.run_folder import RECIPE_FILE
from train.record.tables import text_table
from train.record.tags import check_tag, read_tags, write_tags
from train.report.run_page import as_text, describe, key_figures
from train.report.run_record import read_run
from train.runs.operations import copy, remove, rename, update_mlflow
from train.runs.overview import Overview, find_run, overview_of, runs_in

RESERVED = ("mlflow.", "finegrain.", "package.", "name.", "resumed_with.")
"""Beginnings of tags that are set by the run itself."""

TAG_CHARACTERS = 40
"""Characters of a tag in the list; `show` and `--json` have all."""


def _runs_dir(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
    )


def _one(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="folder or name of a run")
    _runs_dir(parser)


def _list_arguments(parser: ArgumentParser) -> None:
    _runs_dir(parser)
    parser.add_argument("--tag", metavar="NAME[=VALUE]", help="only runs with this tag")


def _two_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="folder or name of a run")
    parser.add_argument("other", help="folder or name of another one")
    _runs_dir(parser)


def _name_arguments(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("name", help="new name")


def _remove_arguments(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--keep-mlflow", action="store_true", help="leave the MLflow run as it is")


def _tag_arguments(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("tags", nargs="*", metavar="NAME=VALUE", help="set a tag; NAME- removes one")


@command(
    "python -m train.runs list", "list runs with their state and losses", _list_arguments, json="as JSON"
)
def _list(options: Namespace) -> Figures:
    found = [overview_of(folder) for folder in runs_in(options.runs_dir)]
    if options.tag:
        name, equals, value = options.tag.partition("=")
        found = [run for run in found if name in run.tags and (not equals or run.tags[name] == value)]
    heads = ("run", "state", "batches", "tokens", "done", "loss", "validation", "last step", "tags, origin")
    print(text_table(heads, [_row(run) for run in found], "<<>>>>><<"))
    return Figures([run.as_dict() for run in found])


def _row(run: Overview) -> tuple[str, ...]:
    share = run.tokens / run.duration_tokens if run.duration_tokens else None
    tags = [_short(f"{name}={value}" if value else name) for name, value in run.tags.items()]
    return (
        run.name,
        run.state,
        f"{run.batches:,}" if run.batches else "",
        short_number(run.tokens) if run.tokens else "",
        f"{min(share, 1.0):.0%}" if share is not None else "",
        f"{run.loss:.3f}" if run.loss is not None else "",
        f"{run.validation_loss:.3f}" if run.validation_loss is not None else "",
        _moment(run.last_time),
        ", ".join([*tags, *([f"fork of {run.fork_of}"] if run.fork_of else [])]),
    )


def _short(tag: str) -> str:
    return tag if len(tag) <= TAG_CHARACTERS else f"{tag[: TAG_CHARACTERS - 1]}…"


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds is not None else ""


@command(
    "python -m train.runs show", "show one run: figures, tags, checkpoints, changes", _one, json="as JSON"
)
def _show(options: Namespace) -> Figures:
    folder = find_run(options.run, options.runs_dir)
    run = overview_of(folder)
    facts: dict[str, float | str] = {
        "folder": str(folder),
        "state": f"{run.state} {f'({run.holder})' if run.holder else ''}".strip(),
        "last step": _moment(run.last_time),
        "checkpoints of batches": ", ".join(f"{batch:,}" for batch in run.checkpoints) or "none",
        "fork of": run.fork_of,
        "tags": ", ".join(f"{name}={value}" for name, value in run.tags.items()),
    }
    figures = {name: value for name, value in key_figures(read_run(folder)).items() if name != "status"}
    print(describe({name: value for name, value in (facts | figures).items() if value != ""}))
    changes = read_changes(folder)
    rows = [
        (f"{change.batch:,}", change.time, each.key, each.before, each.now)
        for change in changes
        for each in change.keys
    ]
    if rows:
        print("\n" + text_table(("after batch", "time", "key", "before", "now"), rows, "><<<<"))
    tree = run.as_dict() | {"folder": str(folder), "figures": figures}
    return Figures(tree | {"changes": [_change(change) for change in changes]})


def _change(change: Any) -> dict[str, Any]:
    return {**change.__dict__, "keys": [each.__dict__ for each in change.keys]}


@command(
    "python -m train.runs diff",
    "compare two runs: the keys of their recipes that differ, and their figures",
    _two_arguments,
    json="as JSON",
)
def _diff(options: Namespace) -> Figures:
    folders = [find_run(text, options.runs_dir) for text in (options.run, options.other)]
    recipes = [keys_of(load_recipe(folder / RECIPE_FILE)) for folder in folders]
    changed = differences(*recipes)
    heads = [folder.name for folder in folders]
    rows = [(each.key, _plain(each.before), _plain(each.now)) for each in changed]
    print(text_table(("key", *heads), rows, "<<<") if rows else "the recipes are equal")
    figures = [key_figures(read_run(folder)) for folder in folders]
    names = [name for name in dict.fromkeys([*figures[0], *figures[1]]) if name != "name"]
    cells = [[as_text(each[name]) if name in each else "" for each in figures] for name in names]
    print("\n" + text_table(("figure", *heads), [(n, *c) for n, c in zip(names, cells, strict=True)], "<>>"))
    keys = [{"key": each.key, "before": each.before, "now": each.now} for each in changed]
    return Figures({"runs": [str(folder) for folder in folders], "keys": keys, "figures": figures})


def _plain(value: object) -> str:
    return "null" if value is None else str(value)


@command("python -m train.runs rename", "rename a run, also in MLflow", _name_arguments)
def _rename(options: Namespace) -> int:
    print(rename(find_run(options.run, options.runs_dir), options.name))
    return 0


@command("python -m train.runs copy", "copy a run to one of its own, also in MLflow", _name_arguments)
def _copy(options: Namespace) -> int:
    print(copy(find_run(options.run, options.runs_dir), options.name))
    return 0


@command("python -m train.runs rm", "remove a run, also in MLflow", _remove_arguments)
def _remove(options: Namespace) -> int:
    folder = find_run(options.run, options.runs_dir)
    if not options.yes:
        if not sys.stdin.isatty():
            raise UserError(f"{folder} would be removed for good", remedy="say so with --yes")
        run = overview_of(folder)
        question = f"remove {folder}, {run.batches:,} batches, {len(run.checkpoints)} checkpoints? [y/N] "
        if input(question).strip().lower() not in ("y", "yes"):
            return 1
    remove(folder, keeps_mlflow=options.keep_mlflow)
    progress.info(f"{folder} is removed")
    return 0


@command("python -m train.runs tag", "set, remove or show a run's tags, also in MLflow", _tag_arguments)
def _tag(options: Namespace) -> int:
    folder = find_run(options.run, options.runs_dir)
    tags = read_tags(folder)
    for text in options.tags:
        name, equals, value = text.partition("=")
        removed = name.removesuffix("-")
        if not equals and name.endswith("-"):
            if tags.pop(removed, None) is None:
                raise UserError(f"{folder.name} has no tag {removed}", remedy="show its tags: name none")
            continue
        if not name or name.startswith(RESERVED):
            raise UserError(f"{name!r} is no name for a tag", remedy="use another one")
        check_tag(name, value)
        tags[name] = value
    if options.tags:
        write_tags(folder, tags)
        update_mlflow(folder)
    for name, value in sorted(tags.items()):
        print(f"{name}={value}")
    return 0


main = CommandGroup(
    "python -m train.runs",
    "Lists, compares, renames, copies, removes and tags runs.",
    {
        "list": _list,
        "show": _show,
        "diff": _diff,
        "rename": _rename,
        "copy": _copy,
        "rm": _remove,
        "tag": _tag,
    },
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
