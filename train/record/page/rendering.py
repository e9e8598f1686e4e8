"""Pages from Jinja2 templates: one base, every value escaped, no external resources."""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ROOT = Path(__file__).parents[3]
"""Root of template names, such as ``train/report/run.html.j2``."""
NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]\d+)?( ms|[%xkMGT])?")


class Shortened(str):
    """The beginning of a text as a table's cell, which shows the whole of it under the pointer."""

    whole: str

    def __new__(cls, whole: str, characters: int) -> "Shortened":
        """Keeps that many characters."""
        cell = super().__new__(cls, whole[:characters])
        cell.whole = whole
        return cell


def render(template: str, **context: Any) -> str:
    """Renders a template.

    Args:
        template: its path in the repository.
        context: the template's variables; a :class:`~markupsafe.Markup` is HTML, everything else is text.

    Raises:
        jinja2.UndefinedError: if the template uses a variable that is not given.
    """
    return _environment().get_template(template).render(context)


def verbatim(file: str) -> Markup:
    """Returns a file of the repository unescaped: a style sheet or a script of ours."""
    return Markup((ROOT / file).read_text())


def digest(script: str) -> str:
    """Returns a script's SHA-256 as a page's content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def numeric_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Returns for each column whether it contains only numbers and empty cells."""
    filled = [[row[column] for row in rows if row[column]] for column in range(len(heads))]
    return [bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells) for cells in filled]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"verbatim": verbatim, "numeric_columns": numeric_columns, "digest": digest}
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment
