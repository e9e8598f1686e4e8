"""transformers computes the same from a tiny run's export; a model that cannot be exported is refused."""

from pathlib import Path

import pytest

from launch.verify.export import ExportCheck, different_files
from launch.verify.harness import Workspace
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


def test_an_export_is_the_same_model(tmp_path: Path) -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml")
    workspace = Workspace(recipe, tmp_path)
    check = ExportCheck(recipe)
    check.rows = list(check.run(workspace))
    assert check.has_passed, list(check.failures())
    assert [row.what for row in check.rows] == ["logits", "tokens", "files"]


def test_a_file_that_differs_or_is_missing_is_named(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.safetensors").write_bytes(b"same")
        (tmp_path / folder / "b.safetensors").write_bytes(folder.encode())
    (tmp_path / "other" / "c.safetensors").write_bytes(b"")
    assert different_files(tmp_path / "one", tmp_path / "other") == ["b.safetensors", "c.safetensors"]


def test_a_model_that_transformers_does_not_have_is_refused() -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml", ["model.moe.balance=bias"])
    with pytest.raises(UserError, match=r"--export.*leave it out"):
        ExportCheck(recipe)
