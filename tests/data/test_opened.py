"""OpenedData opens lazily and once; checked files are not hashed again."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import data.shards.index
from data.opened import OpenedData, open_data
from train.recipe.curriculum import plan_stages
from train.recipe.errors import UserError
from train.recipe.schema import Recipe


def test_nothing_is_opened_before_it_is_asked_for(tmp_path: Path, make_recipe: Callable[..., Recipe]):
    opened = open_data(make_recipe(tmp_path / "none"))
    assert opened.validated_domains == ["code", "prose"]
    with pytest.raises(UserError, match="no shards at"):
        _ = opened.manifest


def test_everything_is_opened_once(built: Recipe):
    opened = OpenedData(built)
    assert opened.manifest is opened.manifest and opened.tokenizer is opened.tokenizer
    assert opened.index("code", "train") is opened.index("code", "train")
    assert opened.shards("code", "train") is opened.shards("code", "train")
    plan = opened.plan(plan_stages(built))
    assert opened.plan(plan_stages(built)) is plan
    longer = dataclasses.replace(built, training=dataclasses.replace(built.training, duration_tokens=20_000))
    assert opened.plan(plan_stages(longer)) is not plan


def test_what_was_checked_is_hashed_again_only_when_it_has_changed(
    tmp_path: Path, built: Recipe, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(built.data.shards, tmp_path / "shards")
    opened = OpenedData(make_recipe(tmp_path / "shards"))
    opened.check()
    hashed: list[Path] = []
    real = data.shards.index.file_mismatch
    monkeypatch.setattr(
        "data.shards.index.file_mismatch", lambda p, *rest: hashed.append(p) or real(p, *rest)
    )
    samples = opened.shards("code", "train")
    assert samples[0].tokens.size == 32 and not hashed
    shard = samples.file_of(0).path
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = OpenedData(opened.recipe).shards("code", "train")
    assert opened.index("code", "train").mismatch(0) == "is altered: its SHA-256 differs"
    with pytest.raises(UserError, match="is altered"):
        again[0]
    assert hashed == [shard, shard]
