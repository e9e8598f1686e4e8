"""Published figures in CSV files next to the code; each row names its source and the source's date."""

import csv
from pathlib import Path


def read_rows(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file by column.

    ``source`` is where the row's figures were published, ``date`` when (for a data sheet: when the GPU was
    announced), as YYYY-MM-DD.
    """
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))
