"""Secrets of addresses and of the environment reach no record, no line and no server."""

import json
import logging
import os
from pathlib import Path

import pytest

from train.evaluate.suite import load_suite
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.secrets import without_secrets
from train.record.lease import release
from train.record.log import progress
from train.record.run_folder import claim_run_folder
from train.tracking.uploader import collect_facts

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("https://me:pass-word@host:5000/ml", "https://host:5000/ml"),
        ("https://me:p@ss/w?rd#1@host/ml", "https://host/ml"),
        ("https://:pass@host", "https://host"),
        ("https://ghp_token@host/x", "https://host/x"),
        ("postgresql://me:pass@host/db?sslmode=on&password=more", "postgresql://me@host/db?sslmode=on&password=***"),
        ("s3://key:secret@bucket/a", "s3://key@bucket/a"),
        ("two: https://a:b@h/x and mysql+pymysql://c:d@i/y", "two: https://h/x and mysql+pymysql://c@i/y"),
        ("https://h/x?X-Amz-Signature=ab12&X-Amz-Date=1&sig=q#top", "https://h/x?X-Amz-Signature=***&X-Amz-Date=1&sig=***#top"),
        ("azure://c?sv=1&se=2&sig=a%2Fb", "azure://c?sv=1&se=2&sig=***"),
        ("AccountName=a;AccountKey=b==;x=1", "AccountName=a;AccountKey=***;x=1"),
        # Nothing to hide.
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("s3://bucket/a@2024?design=3&monkey=4", "s3://bucket/a@2024?design=3&monkey=4"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("12:30: me@host; key=value", "12:30: me@host; key=value"),
    ],
)  # fmt: skip
def test_an_address_loses_its_secrets_and_nothing_else(text: str, public: str) -> None:
    assert without_secrets(text) == public
    assert without_secrets(public) == public


def test_passwords_reach_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tracking.uri=https://me:pass-word@host/ml", "data.remote=s3://me:pass-word@bucket/shards"]
    recipe = load_recipe(SMOKE, [*given, "data.corpus=null", f"runs_dir={tmp_path}", "name=mine"])
    assert "pass-word" in str(recipe.tracking.uri) and "pass-word" in str(recipe.data.remote)
    folder = claim_run_folder(recipe).folder
    facts = collect_facts(folder, recipe, [], str(recipe.tracking.uri), {})
    facts.write(folder)
    assert claim_run_folder(recipe).folder == folder  # It resumes, though its recipe lacks the password.
    for text in ("cannot reach https://me:pass-word@host/ml", "a"):
        progress.warning(text)
        logging.getLogger("finegrain.x").error("%s", UserError(text))
    shown = "".join(capsys.readouterr())
    files = [file.read_text() for file in folder.rglob("*") if file.is_file()]
    assert "https://host/ml" in shown and "s3://me@bucket/shards" in "".join(files)
    assert "pass-word" not in "".join([shown, *files, json.dumps(facts.params), to_yaml(recipe)])
    release(folder)


@pytest.mark.parametrize(
    "text",
    [
        'tracking: { experiment: "${oc.env:TOP}" }',
        'tracking: { experiment: "a-${oc.env:TOP,none}" }',
        'tracking: { registered_model: oc, experiment: "${${tracking.registered_model}.env:TOP}" }',
        'tracking: { experiment: "${oc.decode:${oc.env:TOP}}" }',
        'tracking: { registered_model: "${oc.env:TOP}", experiment: "${tracking.registered_model}" }',
        'data: { domains: { code: 1.0, "${oc.env:TOP}": 0.0 }, skips: [{reason: "${oc.env:TOP}"}] }',
        'name: "${oc.env:TOP}"',
        'runs_dir: "${oc.env:AWS_SECRET_ACCESS_KEY}"',
        "runs_dir: /x/$AWS_SECRET_ACCESS_KEY",
        "data: { shards: $GITHUB_TOKEN }",
        "evaluation: { suite: $WANDB_API_KEY }",
    ],
)
def test_somebody_elses_recipe_reads_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for name in ("TOP", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "not-for-others")
    (tmp_path / "theirs.yaml").write_text(f"extends: {SMOKE}\n{text}\n")
    with pytest.raises(UserError) as raised:
        load_recipe(tmp_path / "theirs.yaml")
    line = str(raised.value)
    assert "raised while resolving" not in line, "ours, not OmegaConf's"
    assert "not-for-others" not in line and "\n" not in line and line.startswith(f"{tmp_path}/theirs.yaml: ")


def test_keys_of_folders_may_name_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    shards = "shards: '${oc.env:SCRATCH}/shards', remote: '${oc.env:NOT_SET,/store}'"
    (tmp_path / "r.yaml").write_text(f"extends: {SMOKE}\ndata: {{{shards}, corpus: null}}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.data.shards, recipe.data.remote) == ("/scratch/shards", "/store")
    from omegaconf import OmegaConf

    assert OmegaConf.create({"a": "${oc.env:SCRATCH}"}).a == "/scratch"  # Outside of our files as ever.


def test_a_suite_reads_no_variable(tmp_path: Path) -> None:
    name = next(iter(os.environ))
    (tmp_path / "suite.yaml").write_text(f"name: '${{oc.env:{name}}}'\ntasks: {{}}\n")
    with pytest.raises(UserError, match=f"names the variable {name}"):
        load_suite(tmp_path / "suite.yaml")
