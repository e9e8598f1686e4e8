"""Files of published figures are complete: no empty cell, and a source and a date in every row."""

import datetime
from pathlib import Path

import pytest

from launch.plan.rows import read_rows

MAY_BE_EMPTY = {
    # A run has exactly one of the two measurements.
    "published_speeds.csv": {"tokens_per_second_per_gpu", "flop_utilisation"},
    # The announcement compares DBRX with no other model.
    "table5.csv": {"published_relative"},
}
LAUNCH = Path(__file__).resolve().parents[3] / "launch"
FILES = sorted(LAUNCH.rglob("*.csv"))


def test_every_file_is_looked_at() -> None:
    names = [file.name for file in FILES]
    assert names == ["published_models.csv", "published_speeds.csv", "gpus.csv", "table5.csv"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_row_is_complete_and_says_where_from_and_when(file: Path) -> None:
    rows = read_rows(file)
    assert rows and {"source", "date"} <= rows[0].keys()
    for row in rows:
        # Rows that are too long have a key None, rows that are too short a value None.
        empty = {column for column, cell in row.items() if not cell or column is None}
        assert empty <= MAY_BE_EMPTY.get(file.name, set()), row
        assert datetime.date.fromisoformat(row["date"]) < datetime.date.today()


def test_no_row_stands_twice() -> None:
    for file in FILES:
        rows = [tuple(row.values()) for row in read_rows(file)]
        assert len(set(rows)) == len(rows), file.name


def test_a_run_is_measured_once_and_its_batch_is_whole() -> None:
    models = {row["model"] for row in read_rows(LAUNCH / "experiments/published_models.csv")}
    for row in read_rows(LAUNCH / "experiments/published_speeds.csv"):
        assert row["model"] in models
        assert bool(row["tokens_per_second_per_gpu"]) != bool(row["flop_utilisation"]), row
        together = int(row["gpus"]) * int(row["microbatch_sequences"])
        assert int(row["batch_sequences"]) * int(row["tensor"]) * int(row["pipeline"]) % together == 0, row
