"""Tables have columns as wide as their cells and print every cell as text."""

from train.record.tables import markdown_table, text_table


def test_columns_and_sides() -> None:
    rows = [("code/train", "1,234", "1e3"), ("a", 5, "")]
    assert text_table(("split", "tokens", ""), rows, "<><").splitlines() == [
        "split         tokens",
        "code/train     1,234  1e3",
        "a                  5",
    ]
    assert text_table((), rows, "<>>").splitlines()[1] == "a               5"


def test_no_rows() -> None:
    assert text_table(("a", "b"), [], "<>").split() == ["a", "b"]
    assert text_table((), [], "") == ""


def test_markdown() -> None:
    assert markdown_table(("part", "found"), [("kernels", "0.0e+00")], "<>").splitlines() == [
        "| part    |   found |",
        "|:--------|--------:|",
        "| kernels | 0.0e+00 |",
    ]
