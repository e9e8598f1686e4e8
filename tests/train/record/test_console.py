from train.record import metrics
from train.record.console import format_batch, format_validation

FIGURES = {
    metrics.LOSS: 4.12345,
    metrics.LOSS_BALANCE: 1.02,
    metrics.LEARNING_RATE: 2.9e-3,
    metrics.GRADIENT_NORM: 0.85,
    metrics.TOKENS_PER_SECOND: 14_230.0,
    metrics.LOSS_Z: 1.0,
}


def test_line_of_a_batch() -> None:
    assert format_batch(120, 489, 983_040, FIGURES, 92.0) == (
        "batch 120/489   983k tokens  loss  4.123  balance 1.020  lr 2.90e-03  grad  0.850"
        "  14.2k tokens/s  left 1 min 32 s"
    )


def test_columns_stay_in_place() -> None:
    other = {key: value * 3 for key, value in FIGURES.items()}
    first = format_batch(1, 489, 8192, FIGURES, 1200.0)
    last = format_batch(480, 489, 3_932_160, other, 3.0)
    assert first.index("left") == last.index("left")
    assert [i for i, c in enumerate(first) if c == "l"][:2] == [i for i, c in enumerate(last) if c == "l"][:2]
    assert first.isascii()


def test_dense_model_has_no_balance_and_the_end_no_time_left() -> None:
    line = format_batch(489, 489, 4_005_888, {metrics.LOSS: 4.0}, 0.0)
    assert line == "batch 489/489  4.01M tokens  loss  4.000  done"


def test_line_of_an_evaluation() -> None:
    assert format_validation(100, 489, {"code": 4.3123, "prose": 4.5}) == (
        "batch 100/489  validation loss  code 4.312  prose 4.500"
    )
