"""The page of the registered plan, from a record of synthetic runs whose truth is known."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from launch.experiments import efficiency
from launch.experiments.efficiency import Record, primary, secondary, verdict
from launch.experiments.ladder.results import read_results_file

LEVEL = {"s": 3.6, "m": 3.2, "g": 3.0}
DOMAINS = {"code": -0.1, "messages": 0.2, "prose": -0.1}


def write_record(
    file: Path, *, gain: float, seeds: int = 20, diverged: tuple[str, int] | None = None, rest: bool = True
) -> Record:
    """Writes a record in which fine's loss is lower than coarse's by ``gain``."""
    draw = np.random.default_rng(5)
    families = {("coarse", size): 0.0 for size in "sm"} | {("fine", size): -gain for size in "sm"}
    if rest:
        families |= {(name, size): shift for name, shift in (("adamw", 0.0), ("muon", -0.2)) for size in "sm"}
        families |= {(name, "g"): -0.1 * n for n, name in enumerate(efficiency.GRANULARITY)}
        families |= {
            ("coarse-20", "s"): 0.3,
            ("fine-20", "s"): 0.3,
            ("coarse-100", "s"): -0.3,
            ("fine-100", "s"): -0.5,
        }
        families |= {("shared", "s"): 0.1, ("sigmoid", "s"): -gain}
    with file.open("w", newline="") as stream:
        heads = ["run", "family", "size", "seed", "multiplier", "search"]
        heads += ["parameters_total", "parameters_active", "tokens", "flops"]
        heads += [f"{kind}_{domain}" for kind in ("nats", "last") for domain in DOMAINS] + [
            "cpu_seconds",
            "commit",
        ]
        rows = csv.writer(stream)
        rows.writerow(heads)
        for (family, size), shift in families.items():
            flops = {"s": 3e12, "m": 8e12, "g": 2e13}[size]
            for seed in [*range(1, seeds + 1), *((101, 102) if family == "coarse" else ())]:
                loss = LEVEL[size] + shift + 0.02 * draw.standard_normal()
                cells = [f"{loss + of:.6f}" for of in DOMAINS.values()]
                cells += [f"{loss + of + 0.03 * draw.standard_normal():.6f}" for of in DOMAINS.values()]
                if (family, seed) == diverged:
                    cells = [""] * len(cells)
                who = (
                    f"{family}-{size}-{seed}",
                    family,
                    size,
                    seed,
                    4,
                    int(seed > 100),
                    250000,
                    80000,
                    4000000,
                )
                rows.writerow((*who, flops, *cells, "190.5", "0123456789"))
    return Record(read_results_file(file))


def test_the_answers_are_the_plan_s(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    found = primary(write_record(file, gain=0.05))
    assert found is not None and found.value == pytest.approx(-0.05, abs=0.01) and found.interval[1] < 0
    assert verdict(write_record(file, gain=0.05)).startswith(
        "Yes: the interval lies wholly below zero. Fine less"
    )
    assert verdict(write_record(file, gain=0.0)).startswith("No: finer grain brings less than 0.02 nats.")
    assert verdict(write_record(file, gain=0.05, seeds=6)).startswith(
        "Interim, not the test (24 of 80 runs). Yes"
    )
    assert verdict(write_record(file, gain=0.05, seeds=1)).startswith("No answer yet: 4 of 80 runs")
    ranked = verdict(write_record(file, gain=0.05, diverged=("coarse", 3)))
    assert ranked.startswith("Yes: 2 runs diverged, so ranks decide")
    # A search's seed never counts.
    record = write_record(file, gain=0.05)
    assert {it.seed for it in record.runs("coarse", "s", 1000)} == set(range(1, 21))


def test_every_secondary_question_is_answered(tmp_path: Path) -> None:
    found = secondary(write_record(tmp_path / "runs.csv", gain=0.05))
    truth = {
        "Muon less AdamW, pooled": -0.2,
        "slope on log2 of granularity": -0.1,
        "growth of the gap per ln tokens": -0.12,
        "a shared expert less none": 0.15,
        "sigmoid less softmax": 0.0,
    }
    assert {name: it.value for name, it in found.items()} == pytest.approx(truth, abs=0.02)
    # Each block has the seeds that the plan gives it.
    assert found["sigmoid less softmax"].freedom <= 18


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    record, docs = tmp_path / "runs.csv", tmp_path / "docs"
    docs.mkdir()
    page = docs / efficiency.PAGE
    page.write_text((efficiency.DOCS / efficiency.PAGE).read_text())
    before = page.read_text().partition(efficiency.BEGIN)
    write_record(record, gain=0.05)
    for _ in range(2):
        assert efficiency.main(["--record", str(record), "--docs", str(docs)]) == 0
    text = page.read_text()
    assert text.startswith(before[0]) and text.endswith(before[2].partition(efficiency.END)[2])
    assert (docs / efficiency.TABLE).read_text() == record.read_text()
    assert (docs / efficiency.PICTURE).stat().st_size > 10_000
    # Loss falls by 0.4 / ln(8/3) nats per ln FLOPs.
    ratio = float(text.partition("As a FLOP ratio: ")[2].partition("x")[0])
    assert ratio == pytest.approx(math.exp(0.05 / 0.4 * math.log(8 / 3)), rel=0.03)
    for said in (
        "pooled, messages only",
        "pooled, of the last weights",
        "p by Holm",
        "| coarse   | s",
        "0123456",
    ):
        assert said in text
    # A record that has only begun has a page too.
    write_record(record, gain=0.05, seeds=1, rest=False)
    assert efficiency.main(["--record", str(record), "--docs", str(docs)]) == 0
    assert "No answer yet" in page.read_text()


def test_no_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert efficiency.main(["--record", str(tmp_path / "none.csv"), "--docs", str(tmp_path)]) == 2
    assert "has no runs; train some first" in capsys.readouterr().err
