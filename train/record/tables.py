"""Text tables, for a terminal and in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

ALIGNMENTS = {"<": "left", ">": "right"}


def text_table(heads: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """Formats a text table with columns two spaces apart.

    Args:
        heads: column heads; empty: no head line.
        rows: cells, formatted.
        align: for each column ``<`` or ``>``, to which side its cells go.
    """
    return _table(heads, rows, align, "plain")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """Formats the same as a Markdown table."""
    return _table(heads, rows, align, "pipe")


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], align: str, style: str) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    sides = [ALIGNMENTS[side] for side in align] if cells else None
    return tabulate(cells, headers=heads, tablefmt=style, colalign=sides, disable_numparse=True)
