"""Builds MDS shards from documents: ``python -m data.write_shards RECIPE``.

A folder of shards holds ``manifest.json`` and, if the tokenizer was trained, ``tokenizer.json``. Each domain
has ``documents.jsonl`` (one line per document; samples refer to documents by line number), ``rejected.jsonl``
(rejected documents with reasons), and MDS shards in ``train/`` and ``validation/``. The folder takes its
place when it is complete (:mod:`data.text.placement`). The same documents give the same bytes with any
engine.
"""

import dataclasses
import errno
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from data.opened import OpenedData
from data.shards.manifest import MANIFEST_FILE, REJECTED_FILE, Manifest, check_shards, require_match
from data.shards.upload import upload_shards
from data.text.build import build_into, remove_finished
from data.text.engines import Engine, Processes, open_engine
from data.text.growth import MOST_DOCUMENTS, GrowthPlan, describe_growth, plan_growth
from data.text.installed import SOURCE_DOMAINS, CorpusDocument, installed_corpus
from data.text.job import OUT
from data.text.placement import KEY, Placement, placement_of
from train.recipe.errors import UserError
from train.recipe.phases import domains_of
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.recipe.topology import usable_cores
from train.record.command import Figures, command
from train.record.tables import text_table

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.EBUSY, errno.EXDEV)


def ensure_shards(opened: OpenedData) -> None:
    """Checks a recipe's shards; builds them first if they are missing and the recipe names a corpus.

    One rank calls it before any other opens the shards. It waits for another process that builds the same
    shards. Of shards in a store only the manifest is fetched; every other file is checked when it is read.

    Raises:
        UserError: if the shards are missing or damaged, or do not match the recipe.
    """
    recipe = opened.recipe
    if opened.cache is not None:
        opened.fetch_manifest()
    else:
        if recipe.data.corpus == "installed" and not (opened.root / MANIFEST_FILE).exists():
            build_shards(recipe)
        opened.check()
    require_match(opened.manifest, recipe)


def build_shards(
    recipe: Recipe,
    *,
    rebuild: bool = False,
    documents: Callable[[], Iterator[CorpusDocument]] | None = None,
    engine: Engine | None = None,
) -> Manifest:
    """Builds the recipe's shards from its sources, the installed corpus, or the given documents.

    Args:
        recipe: sets folder, tokenizer, sequence length and amount of text.
        rebuild: replace existing shards; otherwise they are used as they are.
        documents: yields documents in place of the recipe's.
        engine: runs the tasks; None: all cores of this machine.

    Raises:
        UserError: if the folder holds something else, or a domain has too little text.
    """
    root = Path(recipe.data.shards)
    if documents is None and recipe.data.corpus is None and not recipe.data.sources:
        remedy = "set it to `installed`, or give data.sources"
        raise UserError("is null, so there is nothing to build from", key="data.corpus", remedy=remedy)
    if documents is not None or not recipe.data.sources:
        # Code and prose always: recipes with one of them share shards with those that have both.
        wanted = {*SOURCE_DOMAINS, *domains_of(recipe), *recipe.data.validation_domains}
        documents = documents or (lambda: installed_corpus(recipe.data.corpus_bytes, domains=wanted))
    place = placement_of(root)
    with place.locked():
        if (root / MANIFEST_FILE).exists() and not rebuild:
            return check_shards(root)
        place.check()
        if documents is not None:
            shutil.rmtree(place.work, ignore_errors=True)
        try:
            place.work.mkdir(exist_ok=True)
            engine = engine or Processes(usable_cores())
            manifest = build_into(place.work, recipe, engine, documents() if documents is not None else None)
            (place.work / OUT / MANIFEST_FILE).write_text(manifest.to_json())
            place.take(place.work / OUT)
        except OSError as error:
            raise _as_user_error(error, place) from None
        finally:
            # A build from sources can continue later; one from given documents can't.
            if documents is not None:
                shutil.rmtree(place.work, ignore_errors=True)
        remove_finished(place.work, keeps=documents is None and recipe.data.preparation.keep_cleaned)
    return manifest


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    parser.add_argument("--rebuild", action="store_true", help="replace existing shards")
    parser.add_argument(
        "--engine", choices=("local", "spark"), default="local", help="run tasks here or on Spark"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: cores)")
    parser.add_argument(
        "--plan-documents",
        type=float,
        metavar="N",
        help="compute from existing shards what N documents would take; build nothing",
    )
    parser.add_argument("--check", action="store_true", help="hash every byte of the shards; build nothing")
    parser.add_argument(
        "--upload",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="then copy the shards to an object store, the manifest last (default: data.remote)",
    )
    parser.add_argument(
        "--join", action="store_true", help="with --upload: add the domains to those in the store"
    )


@command(
    "python -m data.write_shards",
    "Builds a recipe's shards from its sources or the installed corpus, or checks them.",
    add_arguments,
    json="also write the manifest, or the plan, there",
    file="recipe",
    mistakes=(OSError,),
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Builds or checks the recipe's shards, and uploads them to a store with --upload."""
    recipe = load_recipe(options.recipe, options.overrides)
    root = Path(recipe.data.shards)
    if options.plan_documents is not None:
        plan = _plan(recipe, options.plan_documents)
        print(describe_growth(plan))
        return Figures(dataclasses.asdict(plan))
    address = "" if options.upload is None else options.upload or recipe.data.remote
    if address is None:
        remedy = "give one, or set data.remote"
        raise UserError("no address to upload the shards to", key="--upload", remedy=remedy)
    if options.join and not address:
        raise UserError("needs --upload", key="--join", remedy="give --upload ADDRESS")
    if address:  # data.shards is then the folder where the shards are built, not a cache of the store.
        here = dataclasses.replace(recipe.data, remote=None, cache_bytes=None)
        recipe = dataclasses.replace(recipe, data=here)
    if options.check:
        manifest = check_shards(root, every_byte=True)
        require_match(manifest, recipe)
    else:
        can_build = bool(recipe.data.corpus or recipe.data.sources) and recipe.data.remote is None
        if options.rebuild or (can_build and not (root / MANIFEST_FILE).exists()):
            engine = open_engine(options.engine, options.workers)
            build_shards(recipe, rebuild=options.rebuild, engine=engine)
        opened = OpenedData(recipe)
        ensure_shards(opened)
        manifest = opened.manifest
    if address:
        upload_shards(root, address, join=options.join)
    print(describe(manifest, root))
    return Figures(manifest.to_json())


def _plan(recipe: Recipe, documents: float) -> GrowthPlan:
    """Plans the preparation of a number of documents by the recipe's shards.

    Raises:
        UserError: if there are no shards, or no documents.
    """
    root = Path(recipe.data.shards)
    if not 1 <= documents <= MOST_DOCUMENTS:
        what = f"is {documents:g}, but must lie in [1, {MOST_DOCUMENTS:g}]"
        raise UserError(what, key="--plan-documents", remedy="give a number of documents, such as 1e9")
    if not (root / MANIFEST_FILE).exists():
        remedy = "first build those of a sample of the corpus"
        raise UserError(f"{root} holds no shards to compute from", key="--plan-documents", remedy=remedy)
    return plan_growth(check_shards(root), root, recipe.data.preparation, int(documents))


def describe(manifest: Manifest, root: Path) -> str:
    """Describes the shards as a table."""
    lines = [f"{root}: {manifest.tokenizer.name}, sequences of {manifest.sequence_tokens} tokens"]
    rows = [
        (
            f"{name}/{side}",
            f"{split.documents:,}",
            f"{split.samples:,}",
            f"{split.tokens:,}",
            f"{split.bytes_per_token:.2f}",
            f"{split.unigram_entropy:.2f}",
        )
        for name, domain in manifest.domains.items()
        for side, split in domain.splits.items()
    ]
    heads = ("split", "documents", "samples", "tokens", "bytes/token", "entropy")
    lines.append(text_table(heads, rows, "<>>>>>"))
    for name, domain in manifest.domains.items():
        splits = domain.splits.values()
        kept = sum(split.documents if split.files is None else split.files for split in splits)
        kept_bytes = sum(it.text_bytes if it.file_bytes is None else it.file_bytes for it in splits)
        lost, lost_bytes = sum(domain.rejected.values()), domain.rejected_bytes
        counts = {
            "read": (kept + lost, kept_bytes + lost_bytes),
            "kept": (kept, kept_bytes),
            "rejected": (lost, lost_bytes),
        }
        # Older manifests have no bytes of what was rejected.
        has_bytes = lost_bytes or not lost
        words = [
            f"{what} {n:,} records" + (f" of {size:,} bytes" if has_bytes else "")
            for what, (n, size) in counts.items()
        ]
        lines.append(f"{name}: {', '.join(words)}")
        if any(split.files is not None for split in splits):
            joined = sum(split.documents for split in splits)
            lines.append(f"{name}: {kept:,} files of repositories are joined into {joined:,} documents")
        if domain.is_masked:
            tokens = sum(split.tokens for split in domain.splits.values())
            trained = sum(split.trained_tokens or 0 for split in domain.splits.values())
            lines.append(f"{name}: a loss on {trained:,} of {tokens:,} tokens")
        if domain.rejected:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in domain.rejected.items())
            lines.append(f"{name}: rejected {reasons}; each is listed in {root / name / REJECTED_FILE}")
        if domain.personal_data is not None:
            found = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in domain.personal_data.items())
            treated = "replaced" if "personal data replaced" in domain.transformation else "left"
            lines.append(f"{name}: personal data, {treated}: {found}")
        lines += [f"{name}: {loss}" for loss in domain.losses]
    return "\n".join(lines)


def _as_user_error(error: OSError, place: Placement) -> OSError | UserError:
    """The error of a build on a full, read-only or failing disk; other errors are returned as they are."""
    again = "the same command continues where it stopped"
    if error.errno in _FULL:
        what = f"no room is left for {error.filename or place.work} ({error.strerror})"
        return UserError(what, key=KEY, remedy=f"make room, or give a folder on another disk; {again}")
    if error.errno in _FAILING:
        what = f"{error.filename or place.work} can't be used ({error.strerror})"
        is_input = error.filename and not Path(str(error.filename)).is_relative_to(place.work)
        return UserError(what, key="data.sources" if is_input else KEY, remedy=f"mend that; {again}")
    return error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
