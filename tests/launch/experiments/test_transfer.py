"""The curves of loss against rate: the best rate of a curve, and a page from a complete CSV file."""

import csv
import math
from pathlib import Path

import pytest

from launch.experiments import transfer
from train.recipe.reading import load_recipe
from train.recipe.transfer import transfer_base_of


def test_the_best_rate_is_a_parabola_s_vertex_or_the_edge() -> None:
    curve = {2.0**place: (place - 0.3) ** 2 + 4 for place in (-1, 0, 1, 2)}
    rate, inside = transfer.best_rate(curve)
    assert rate == pytest.approx(2**0.3) and inside
    assert transfer.best_rate({1.0: 3.0, 2.0: 2.0}) == (2.0, False)
    assert transfer.best_rate({1.0: 3.0, 2.0: 2.0, 4.0: math.inf}) == (2.0, True)


def test_a_complete_file_is_only_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every model grows from the base in the recipe; a rate that is in the file is not trained again."""
    recipe = load_recipe(transfer.RECIPE)
    every = transfer.curves(recipe)
    bases = [curve.recipe.model.transfer_base for curve in every if curve.rule == transfer.RULES[0]]
    assert bases == [None, *[transfer_base_of(recipe.model)] * 4]
    page = tmp_path / transfer.PAGE
    page.write_text(f"before\n{transfer.BEGIN}\nold\n{transfer.END}\nafter\n")
    with (tmp_path / transfer.TABLE).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("axis", "size", "rule", "rate", "seed", "loss"))
        for curve in every:
            writer.writerows((curve.axis, curve.size, curve.rule, rate, 1, 4 + rate) for rate in (1, 2))
    assert transfer.main(["--docs", str(tmp_path), "--rates", "1", "2"]) == 0
    table = capsys.readouterr().out.strip()
    assert len(table.splitlines()) == 2 + len(every) and table.count("1, at the edge") == len(every)
    assert page.read_text() == f"before\n{transfer.BEGIN}\n{table}\n{transfer.END}\nafter\n"
    assert (tmp_path / transfer.PICTURE).stat().st_size > 1000
