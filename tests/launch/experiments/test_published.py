"""The step-time model against published training speeds."""

from pathlib import Path

import pytest

from launch.experiments.published import (
    WITHIN,
    fit,
    format_published,
    main,
    published_figures,
    published_models,
    published_systems,
)
from launch.plan.hardware import GPUS
from launch.plan.step_time import FITTED
from train.recipe import sizes

H100 = GPUS["h100"]


def test_constants_are_the_fit() -> None:
    assert fit(published_systems(), H100) == FITTED


def test_five_rows_fit_and_the_others_are_predicted() -> None:
    systems = published_systems()
    assert sum(system.fits for system in systems) == 5
    assert not any(system.fits for system in systems if system.model.moe), "no mixture of experts was fitted"
    figures = [row for row in published_figures() if not row["fitted"]]
    near = [row for row in figures if abs(float(row["error"])) <= WITHIN]
    assert len(near) >= 51, "of 57"


@pytest.mark.parametrize(
    "name",
    ["MPT-7b", "MPT-13b", "MPT-70b", "Mixtral 8x22B, folding", "Qwen2-57B-A14B, folding", "Qwen3-235B-A22B"],
)
def test_named_systems_within_the_bound(name: str) -> None:
    rows = [row for row in published_figures() if str(row["system"]).startswith(name)]
    assert rows
    assert all(abs(float(row["error"])) <= WITHIN for row in rows)


def test_models_have_the_published_sizes() -> None:
    models = published_models()
    # NumParams of LLM Foundry's table at 2048 tokens, learned positions and biases included.
    for size, published in {
        "3b": 2_651_837_440,
        "7b": 6_658_859_008,
        "13b": 12_853_954_560,
        "30b": 29_975_214_080,
    }.items():
        assert sizes.total_parameters(models[f"MPT-{size}"]) == pytest.approx(published, rel=0.01)
    assert sizes.total_parameters(models["Qwen2-57B-A14B"]) == pytest.approx(57.4e9, rel=0.01)
    # Queries' and keys' norms, of a head's width each, are not counted.
    for name, published in {"Qwen3-30B-A3B": 30.53e9, "Qwen3-235B-A22B": 235.09e9}.items():
        assert sizes.total_parameters(models[name]) == pytest.approx(published, rel=0.001)


def test_table_names_fitted_rows() -> None:
    assert format_published().count("  fitted\n") == 5


def test_the_docs_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    page = (Path(__file__).resolve().parents[3] / "docs/planner.md").read_text()
    assert f"```text\n{capsys.readouterr().out.strip()}\n```" in page
