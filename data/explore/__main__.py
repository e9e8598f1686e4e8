"""Shows the contents of shards on an HTML page: ``python -m data.explore SHARDS``."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from data.explore.exploration import DOCUMENTS, describe, explore
from data.explore.shards_page import write_page
from train.record.command import Figures, command

PAGE_FILE = "shards.html"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "folder", metavar="SHARDS", help="folder of a mixture, of one of its domains, or of a run"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        default=Path(PAGE_FILE),
        help=f"page to write (default {PAGE_FILE} in the current folder)",
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", default=DOCUMENTS, help=f"documents to draw (default {DOCUMENTS})"
    )


@command(
    "python -m data.explore",
    "Writes a page on shards: sizes, lengths, duplicates, languages, rarity, a map of documents to search.",
    add_arguments,
    json="also write the figures there",
    mistakes=(OSError,),
)
def main(options: Namespace) -> Figures:
    """Explores the shards, writes the page and prints its figures."""
    found = explore(Path(options.folder), options.sample, progress=sys.stderr.isatty())
    write_page(found, options.html)
    print(describe(found))
    print(f"open {options.html}")
    return Figures(found.to_json())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
