"""Comparisons of run folders whose losses follow known curves."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.train.report.test_report import SUMMARY, LinkCollector
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.record import metrics
from train.record.step_log import StepLog
from train.record.summary import write_summary
from train.report import scaling
from train.report.__main__ import main
from train.report.compare import compare, read_entries

pytestmark = pytest.mark.slow

SMOKE = Path(__file__).parents[3] / "yamls" / "smoke.yaml"
BUDGETS = (1e15, 3e15, 1e16)
DENSE = ["model.moe=null"]


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand: no test here asks for more than which side of a value an interval lies on."""
    monkeypatch.setattr(scaling, "DRAWS", 100)


def leave(
    folder: Path, name: str, flops: float, losses: dict[str, float], seed: int, overrides: list[str]
) -> Path:
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    recipe = load_recipe(SMOKE, [f"name={name}", f"seed={seed}", *overrides])
    (run_dir / "recipe.yaml").write_text(to_yaml(recipe))
    record = StepLog(run_dir / "metrics.jsonl")
    bits = {metrics.bits_per_byte(domain): loss / 3 for domain, loss in losses.items()}
    record.write(1, {"tokens": 1000, "time": 1e9, **bits})
    tokens = 1_000_000
    write_summary(
        run_dir,
        replace(SUMMARY, name=name, tokens=tokens, flops_per_token=flops / tokens, validation_loss=losses),
    )
    return run_dir


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Dense and fine models at three budgets of three seeds; fine needs half the FLOPs."""
    folder = tmp_path_factory.mktemp("ladder")
    generator = np.random.default_rng(1)
    runs = []
    for kind, saving, overrides in (("dense", 1.0, DENSE), ("fine", 2.0, [])):
        for place, budget in enumerate(BUDGETS):
            for seed in range(3):
                loss = 1.8 + 1.6 * (budget * saving / 1e16) ** -0.16
                losses = {
                    "code": loss - 0.3 + generator.normal(0, 0.003),
                    "prose": loss + 0.3 + generator.normal(0, 0.003),
                }
                runs.append(leave(folder, f"{kind}-{place}-{seed}", budget, losses, seed, overrides))
    return runs


def test_the_command_finds_the_saving_and_leaves_its_files(
    ladder: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    arguments = [*map(str, ladder), "--compare", "--out", str(tmp_path), "--json", str(figures)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "16 experts, top-4" in printed and "fewer FLOPs" in printed
    tree = json.loads(figures.read_text())
    (found,) = tree["advantages"]
    assert (found["family"], found["baseline"]) == ("16 experts, top-4", "dense")
    assert found["low"] < 2.0 < found["high"] and found["ratio"] == pytest.approx(2.0, rel=0.15)
    fine = [cell for cell in tree["cells"] if cell["family"] != "dense"]
    assert [cell["verdict"] for cell in fine] == ["lower loss"] * 3
    assert [round(cell["relative_flops"], 2) for cell in fine] == [1, 3, 10]
    page = (tmp_path / "comparison.html").read_text()
    links = LinkCollector()
    links.feed(page)
    assert all(address.startswith("#") for address in links.addresses)
    assert "training FLOPs" in page and "million tokens" not in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert len(rows) == len(ladder) and {row["seed"] for row in rows} == {"0", "1", "2"}


def test_one_budget_is_compared_at_equal_flops_alone(ladder: list[Path]) -> None:
    of_largest = [run for run in ladder if "-2-" in run.name]
    comparison = compare(read_entries(of_largest))
    assert not comparison.curves and any("No curves" in note for note in comparison.notes)
    fine = next(cell for cell in comparison.cells if cell.family != "dense")
    # 1.6 - 1.6 * 2^-0.16: the loss that half the FLOPs is worth here.
    assert fine.difference == pytest.approx(1.6 * (2.0**-0.16 - 1), abs=0.01)
    assert fine.interval is not None and fine.interval[1] < 0


def test_a_family_of_one_budget_leaves_the_others_their_curves(ladder: list[Path], tmp_path: Path) -> None:
    coarse = ["model.moe.experts=8", "model.moe.top_k=2"]
    more = [
        leave(tmp_path, f"coarse-{seed}", BUDGETS[-1], {"code": 2.9, "prose": 3.5 + seed / 10}, seed, coarse)
        for seed in range(2)
    ]
    comparison = compare(read_entries([*ladder, *more]))
    alone = compare(read_entries(ladder))
    assert comparison.curves == alone.curves and comparison.advantages == alone.advantages
    assert any(note.startswith("8 experts, top-2: a single FLOP budget") for note in comparison.notes)
    assert {cell.family for cell in comparison.cells} == {"dense", "16 experts, top-4", "8 experts, top-2"}


def test_what_noise_alone_parts_is_not_significant(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    runs = []
    for balance in ("loss", "bias"):
        keys = [f"model.moe.balance={balance}"]
        for seed in range(3):
            losses = {"code": 3 + generator.normal(0, 0.02), "prose": 4 + generator.normal(0, 0.02)}
            runs.append(leave(tmp_path, f"{balance}-{seed}", 1e15, losses, seed, keys))
    comparison = compare(read_entries(runs, group=["model.moe.balance"]), baseline="balance=loss")
    (row,) = [cell for cell in comparison.cells if cell.family == "balance=bias"]
    assert row.verdict == "not significant"


def test_seeds_that_both_sides_have_are_paired(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    of_seed = generator.normal(0, 0.1, 3)
    runs = []
    for balance, worse in (("loss", 0.0), ("bias", 0.02)):
        keys = [f"model.moe.balance={balance}"]
        for seed in range(3):
            loss = 3 + of_seed[seed] + worse + generator.normal(0, 0.002)
            runs.append(leave(tmp_path, f"{balance}-{seed}", 1e15, {"code": loss}, seed, keys))
    entries = read_entries(runs, group=["model.moe.balance"])
    (row,) = [cell for cell in compare(entries, baseline="balance=loss").cells if cell.difference]
    assert row.verdict == "higher loss"
    # Without pairing, seed noise hides the effect: the same runs, as if of other seeds.
    others = [replace(it, seed=it.seed + 10) if it.family == "balance=bias" else it for it in entries]
    (row,) = [cell for cell in compare(others, baseline="balance=loss").cells if cell.difference]
    assert row.verdict == "not significant"


def test_one_seed_has_no_interval(ladder: list[Path]) -> None:
    comparison = compare(read_entries([run for run in ladder if run.name.endswith("-2-0")]))
    fine = next(cell for cell in comparison.cells if cell.family != "dense")
    assert fine.interval is None and fine.verdict == "one seed: no interval"


def test_bits_per_byte_compares_tokenizers_and_nats_do_not(ladder: list[Path], tmp_path: Path) -> None:
    other = leave(
        tmp_path,
        "other",
        BUDGETS[0],
        {"code": 3.0, "prose": 3.3},
        0,
        [*DENSE, "tokenizer.vocab_size=2048", "model.vocab_size=2048"],
    )
    with pytest.raises(UserError, match=r"different tokenizers; .*bits_per_byte"):
        read_entries([ladder[0], other])
    entries = read_entries([ladder[0], other], metric="bits_per_byte", group=["tokenizer.vocab_size"])
    assert [entry.family for entry in entries] == ["vocab_size=4096", "vocab_size=2048"]
    assert entries[1].losses["code"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--group", "model.nothing"], "no such key"),
        (["--baseline", "sparse"], "families are 16 experts, top-4, dense"),
        (["--group", "optimizer.kind"], "all runs belong to one family, kind="),
    ],
)
def test_mistakes_take_one_line(
    ladder: list[Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, ladder), "--compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_unfinished_run_is_named(
    ladder: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = leave(tmp_path, "unfinished", 1e15, {"code": 1.0}, 0, DENSE)
    (run_dir / "summary.json").unlink()
    assert main(["--compare", *map(str, ladder[:2]), str(run_dir), "--out", str(tmp_path / "out")]) == 2
    assert "unfinished: is not complete" in capsys.readouterr().err


def test_any_two_runs_are_laid_over_each_other(
    ladder: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = leave(tmp_path, "<other>", 1e15, {"code": 1.0}, 0, [*DENSE, "optimizer.learning_rate=0.5"])
    (other / "summary.json").unlink()
    out = tmp_path / "out"
    assert main(["--compare", str(ladder[0]), str(other), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "is not complete" in said and "overlay.html" in said
    page = (out / "overlay.html").read_text()
    assert "<h2>Difference of the recipes</h2>" in page and "&lt;other&gt;" in page
    learning_rate = load_recipe(ladder[0] / "recipe.yaml").optimizer.learning_rate
    row = page[page.index("optimizer.learning_rate</td>") :].split("</tr>")[0]
    assert str(learning_rate) in row and "0.5" in row
    assert "optimizer.weight_decay</td>" not in page, "equal keys are not listed"
    assert main(["--compare", str(other), "--out", str(out)]) == 2
