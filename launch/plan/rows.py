"""Published figures in CSV files beside the code; each row names its source and the source's date."""

import csv
from pathlib import Path

FOLDER = Path(__file__).parent


def read_rows(file: str) -> list[dict[str, str]]:
    """Returns the rows of a CSV file in this folder, by column.

    ``source`` is where the row's figures were published, ``date`` when (for a data sheet: when the GPU was
    announced), as YYYY-MM-DD.
    """
    with (FOLDER / file).open(newline="") as stream:
        return list(csv.DictReader(stream))
