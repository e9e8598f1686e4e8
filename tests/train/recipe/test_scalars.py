"""A key's type decides what a value means, in files and on the command line."""

from pathlib import Path
from typing import Any

import pytest

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Compile

ROOT = Path(__file__).resolve().parents[3]
SMOKE = str(ROOT / "yamls/smoke.yaml")
SOURCE = "domain: web, kind: jsonl, path: /x, dataset: d, origin: o, licence: l"


def found(recipe: object, key: str) -> Any:
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe


CASES: list[tuple[str, str, object]] = [
    *(("name", text, text) for text in ("on", "1e3", "3.10", "2026-11-28", "0x1f", "12:30:00")),
    ("name", "'null'", "null"),
    ("data.remote", "null", None),
    ("data.remote", "'null'", "null"),
    ("training.duration_tokens", "2e9", 2_000_000_000),
    ("training.duration_tokens", "1_000_000", 1_000_000),
    ("training.duration_tokens", "1.2e9", 1_200_000_000),
    ("training.duration_tokens", "1.2B", 1_200_000_000),
    ("training.duration_tokens", "12 T", 12_000_000_000_000),
    ("training.duration_tokens", "9007199254740.993k", 9007199254740993),
    ("training.global_batch_sequences", "2K", 2000),
    ("data.cache_bytes", "1.5GB", 1_500_000_000),
    ("data.cache_bytes", "20M", 20_000_000),
    ("training.duration_tokens", "9007199254740993", 9007199254740993),
    ("training.clip_norm", "1e-3", 1e-3),
    ("training.clip_norm", "2", 2.0),
    ("training.clip_norm", "null", None),
    ("training.compile", "off", Compile.off),
    ("training.document_masking", "false", False),
    ("optimizer.betas", "[0.9, 1e-1]", [0.9, 0.1]),
    ("training.frozen", '["*.router.*", on]', ["*.router.*", "on"]),
]


@pytest.mark.parametrize(("key", "text", "value"), CASES)
def test_a_file_and_the_command_line_mean_the_same(
    tmp_path: Path, key: str, text: str, value: object
) -> None:
    section, _, leaf = key.rpartition(".")
    line = f"{section}: {{{leaf}: {text}}}" if section else f"{leaf}: {text}"
    (tmp_path / "r.yaml").write_text(f"extends: {SMOKE}\n{line}\n")
    for recipe in (load_recipe(tmp_path / "r.yaml"), load_recipe(SMOKE, [f"{key}={text}"])):
        assert found(recipe, key) == value and type(found(recipe, key)) is type(value)


def test_a_version_keeps_its_last_zero(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"extends: {SMOKE}\ndata: {{corpus: null, sources: [{{{SOURCE}, version: 3.10}}]}}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").data.sources[0].version == "3.10"


def test_text_on_the_command_line_is_taken_whole() -> None:
    recipe = load_recipe(SMOKE, ["data.shards=/data/run #3/shards", "data.remote=s3://bucket/a: b"])
    assert (recipe.data.shards, recipe.data.remote) == ("/data/run #3/shards", "s3://bucket/a: b")


def test_folders_begin_at_home_and_name_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    (tmp_path / "r.yaml").write_text(f"extends: {SMOKE}\nruns_dir: ~/runs\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["data.shards=$SCRATCH/shards"])
    assert (recipe.runs_dir, recipe.data.shards) == ("/home/me/runs", "/scratch/shards")
    assert load_recipe(SMOKE, ["name=~$SCRATCH"]).name == "~$SCRATCH"  # no folder


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("runs_dir: $NOWHERE/runs", "runs_dir: $NOWHERE is not set; set it, or write the folder out"),
        ("name: a\nname: b", "is not YAML: `name` occurs twice"),
        ("data: {shards: '${oc.env:NOT_SET_ANYWHERE}'}", "data.shards: "),
        ("data: {shards: '${data.typo}'}", "data.shards: "),
        ("data: {shards: '${no_such_resolver:1}'}", "data.shards: "),
        ("data: {shards: '${'}", "is not YAML: "),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "r.yaml").write_text(f"extends: {SMOKE}\n{text}\n")
    with pytest.raises(UserError) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert str(raised.value).startswith(f"{tmp_path / 'r.yaml'}: {line}")
    assert "\n" not in str(raised.value)


def test_a_whole_number_is_not_rounded() -> None:
    with pytest.raises(UserError, match=r"training\.duration_tokens"):
        load_recipe(SMOKE, ["training.duration_tokens=1.5e0"])
