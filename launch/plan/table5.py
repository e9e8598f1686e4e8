"""Table 5 of the DBRX announcement, computed from the recipes: training FLOPs of each model.

Relative FLOPs are 6 x active parameters x tokens (Kaplan et al. 2020, section 2.1), as the announcement
counts them; the attention term is shown separately.
"""

from dataclasses import dataclass
from pathlib import Path

from launch.plan.rows import read_rows
from train.recipe import sizes
from train.recipe.phases import phase_tokens, phases_of
from train.recipe.reading import load_recipe

YAMLS = Path(__file__).resolve().parents[2] / "yamls"


@dataclass(frozen=True)
class TableLine:
    """A line of the table: a recipe, the recipe that it is compared with, and the source of its tokens."""

    title: str
    recipe: str
    compared_with: str
    tokens: str
    """`published`, or `inferred` from the published ratio."""
    published_relative: str


ENTRIES = tuple(
    TableLine(row["title"], row["recipe"], row["compared_with"], row["tokens"], row["published_relative"])
    for row in read_rows(Path(__file__).with_name("table5.csv"))
)


@dataclass(frozen=True)
class TableRow:
    """A line of the table with its figures."""

    title: str
    recipe: str
    total_parameters: int
    active_parameters: int
    """Excludes the input embedding."""
    tokens: int
    tokens_source: str
    flops: int
    """6 x active x tokens."""
    attention_flops: int
    """12 L D S per token, S the sequence length of its phase."""
    relative_flops: float
    relative_flops_with_attention: float
    published_relative: str


def table5() -> list[TableRow]:
    """Returns the table's rows, computed from the recipes in ``yamls/``."""
    weights: dict[str, int] = {}
    attention: dict[str, int] = {}
    recipes = {entry.recipe: load_recipe(YAMLS / f"{entry.recipe}.yaml") for entry in ENTRIES}
    for name, recipe in recipes.items():
        weights[name] = attention[name] = 0
        for phase in phases_of(recipe):
            assert phase.sequence_tokens is not None
            per_token = sizes.flops_per_token_training(recipe.model, phase.sequence_tokens)
            weights[name] += per_token.weights * phase_tokens(phase)
            attention[name] += per_token.attention * phase_tokens(phase)
    return [
        TableRow(
            title=entry.title,
            recipe=entry.recipe,
            total_parameters=sizes.total_parameters(recipes[entry.recipe].model),
            active_parameters=sizes.active_parameters(recipes[entry.recipe].model),
            tokens=recipes[entry.recipe].training.duration_tokens,
            tokens_source=entry.tokens,
            flops=weights[entry.recipe],
            attention_flops=attention[entry.recipe],
            relative_flops=weights[entry.recipe] / weights[entry.compared_with],
            relative_flops_with_attention=(weights[entry.recipe] + attention[entry.recipe])
            / (weights[entry.compared_with] + attention[entry.compared_with]),
            published_relative=entry.published_relative,
        )
        for entry in ENTRIES
    ]


def format_table5(rows: list[TableRow]) -> str:
    """Formats the table for a terminal."""
    lines = [
        f"{'model':28}{'total':>9}{'active':>9}{'tokens':>9}  {'FLOPs':>9}{'relative':>10}"
        f"{'published':>11}{'with attention':>22}"
    ]
    for row in rows:
        digits = 2 if row.published_relative == "1.85x" else 1
        mark = "*" if row.tokens_source == "inferred" else " "
        lines.append(
            f"{row.title:28}{row.total_parameters / 1e9:>8.2f}B{row.active_parameters / 1e9:>8.2f}B"
            f"{row.tokens / 1e12:>8.3g}T{mark} {row.flops:>9.3g}{row.relative_flops:>9.{digits}f}x"
            f"{row.published_relative:>11}"
            f"{row.flops + row.attention_flops:>13.3g}{row.relative_flops_with_attention:>8.{digits}f}x"
        )
    return "\n".join(
        [
            *lines,
            "",
            "active: without the input embedding. FLOPs: 6 x active x tokens; attention: 12 L D S per token.",
            "* tokens inferred from the announcement's ratio; all other tokens are published.",
        ]
    )
