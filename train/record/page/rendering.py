"""Pages from Jinja2 templates: one base, every value escaped, nothing loaded from outside."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ROOT = Path(__file__).parents[3]
"""Templates are named by their path below it, such as ``train/report/run.html.j2``."""
NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]\d+)?( ms|[%xkMGT])?")


def render(template: str, **context: Any) -> str:
    """Fills a template.

    Args:
        template: its path in the repository.
        context: what the template names; a :class:`~markupsafe.Markup` is taken as HTML, all else as text.

    Raises:
        jinja2.UndefinedError: if the template names something that is not given.
    """
    return _environment().get_template(template).render(context)


def verbatim(file: str) -> Markup:
    """A file of the repository as it is: a style sheet or a script of ours."""
    return Markup((ROOT / file).read_text())


def numeric_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Of each column: has it numbers and nothing else but empty cells?"""
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
    environment.globals |= {"verbatim": verbatim, "numeric_columns": numeric_columns}
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment
