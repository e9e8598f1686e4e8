"""A package that an installation leaves out is named, with the key that needs it and what to do."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from train.model.experts import HAS_GROUPED_MM
from train.recipe.errors import UserError
from train.recipe.packages import LEFT_OUT, check_packages, left_out
from train.recipe.reading import load_recipe

ROOT = Path(__file__).resolve().parents[3]


def names(requirements: list[str]) -> set[str]:
    return {Requirement(each).name.lower().replace("_", "-") for each in requirements}


@pytest.mark.slow
def test_what_may_be_left_out_is_not_in_the_core() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    core = names(project["project"]["dependencies"])
    groups = project["dependency-groups"]
    rest = names(groups["full"]) | names(groups["stores"]) | names(groups["dev"])
    for module in LEFT_OUT.keys() - {"alembic"}:  # MLflow brings it along.
        found = {name.lower().replace("_", "-") for name in packages_distributions()[module]}
        assert found & rest and not found & core, module


@pytest.mark.parametrize(
    ("key", "value", "module", "instead"),
    [
        ("tracking.mlflow", "true", "mlflow", "set tracking.mlflow=false"),
        ("data.remote", "s3://bucket/shards", "boto3", "use a folder"),
        ("evaluation.suite", "yamls/suites/gauntlet.yaml", "transformers", "remove it"),
    ],
)
def test_the_key_is_named(
    key: str, value: str, module: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(ROOT / "yamls/smoke.yaml", ["tracking.mlflow=false", f"{key}={value}"])
    check_packages(recipe)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        check_packages(recipe)
    line = f"{key}: needs {LEFT_OUT[module]}, which this installation leaves out; {instead}"
    assert str(error.value).startswith(line) and str(error.value).endswith("install without --core")


def test_a_torch_that_cannot_compile_experts_is_refused() -> None:
    recipe = load_recipe(ROOT / "yamls/smoke.yaml", ["tracking.mlflow=false", "training.compile=blocks"])
    if HAS_GROUPED_MM:
        check_packages(recipe)
    else:
        with pytest.raises(
            UserError, match=r"training\.compile: needs torch 2\.10 with experts, and this is"
        ):
            check_packages(recipe)


def test_other_modules_are_no_matter_of_the_installation() -> None:
    assert left_out(ModuleNotFoundError(name="train.nothing")) is None
    assert left_out(ModuleNotFoundError()) is None
    line = "needs PyArrow, which this installation leaves out; install without --core"
    assert left_out(ModuleNotFoundError(name="pyarrow.parquet")) == line


@pytest.mark.slow
def test_a_command_ends_in_one_line() -> None:
    code = """
    import sys
    sys.modules["sklearn"] = None
    from train.record.command import command
    @command("python any.py", "Any.", lambda parser: None, name="any")
    def main(options):
        import sklearn
    sys.exit(main([]))
    """
    words = [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines())]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    line = "any: needs scikit-learn, which this installation leaves out; install without --core\n"
    assert (result.returncode, result.stderr) == (2, line)
