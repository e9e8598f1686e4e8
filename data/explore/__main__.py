"""What shards hold, as a page: ``python -m data.explore SHARDS``."""

import argparse
import sys
from pathlib import Path

from data.explore.exploration import DOCUMENTS, describe, explore
from data.explore.shards_page import write_page
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS

PAGE_FILE = "shards.html"


def main(arguments: list[str]) -> int:
    """Runs the command line; returns 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m data.explore",
        description="Writes a page on shards: sizes, lengths, duplicates, languages, rarity, and a map of "
        "documents to search.",
    )
    parser.add_argument("folder", metavar="SHARDS", help="of a mixture, of one of its domains, or of a run")
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        default=Path(PAGE_FILE),
        help=f"the page (default {PAGE_FILE} in the current folder)",
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", default=DOCUMENTS, help=f"documents to draw (default {DOCUMENTS})"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    try:
        found = explore(Path(options.folder), options.sample, progress=sys.stderr.isatty())
        write_page(found, options.html)
    except UserError as error:
        print(error, file=sys.stderr)
        return USAGE_STATUS
    print(describe(found))
    print(f"open {options.html}")
    if options.json:
        options.json.write_text(found.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
