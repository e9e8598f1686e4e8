"""Declarations of keys: ranges are enforced, and only the intended keys may change on resume and start."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.shards.manifest import preparation_digest
from train.recipe.catalogue import describe_keys, on_resume, schema_keys
from train.recipe.errors import UserError
from train.recipe.keys import KeyRules, OnResume, OnStart, out_of_range
from train.recipe.preparation import Repositories, Source, SourceKind
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import DataSkip, FillInMiddle, Latent, Phase, Recipe, TransferBase, Yarn
from train.recipe.topology import Topology

ROOT = Path(__file__).resolve().parents[3]
SMOKE = str(ROOT / "yamls/smoke.yaml")

FREE_SECTIONS = {"tracking", "parallelism", "checkpoint", "watch", "preflight", "evaluation", "guard"}
FREE_KEYS = {
    *("name", "runs_dir", "on_existing", "data.workers", "data.remote", "data.cache_bytes"),
    *("data.validation_domains", "data.validation_sequences"),
    *("training.recompute", "training.recompute_layers", "training.recompute_rest", "training.offload"),
    *(
        "data.phases[].context",
        "training.loss_chunk_tokens",
        "training.profile_batches",
        "training.profile_ranks",
    ),
}
EDITABLE_KEYS = {
    *(
        "data.shards",
        "data.domains",
        "data.max_epochs",
        "data.domain_max_epochs",
        "data.fill_in_middle",
        "data.fill_in_middle.share",
        "data.fill_in_middle.domain_shares",
        "data.fill_in_middle.spm",
        "data.phases",
        "data.skips",
    ),
    *(
        f"training.{name}"
        for name in (
            "duration_tokens",
            "global_batch_sequences",
            "microbatch_sequences",
            "expert_precision",
            "compile",
            "deterministic",
        )
    ),
}


def with_value(section: Any, path: list[str], value: object) -> Any:
    """Returns a section with another value of one key, given by the parts of its name."""
    name, rest = path[0], path[1:]
    if name.endswith("[]"):
        items = getattr(section, name[:-2])
        return replace(section, **{name[:-2]: [with_value(items[0], rest, value)]})
    if rest:
        return replace(section, **{name: with_value(getattr(section, name), rest, value)})
    old = getattr(section, name)
    return replace(section, **{name: {"one": value} if isinstance(old, dict) else value})


@functools.cache
def with_every_section() -> Recipe:
    recipe = load_recipe(SMOKE)
    facts = {"dataset": "d", "version": "1", "origin": "o", "licence": "l"}
    source = Source("code", SourceKind.text, "x", repositories=Repositories(folders=1), **facts)
    phases = [Phase(tokens=9, fill_in_middle=FillInMiddle())]
    data = replace(recipe.data, phases=phases, skips=[DataSkip(0, 1)], sources=[source])
    latent = Latent(kv_rank=8, nope_width=8, rope_width=8, v_width=8)
    base = TransferBase(8, 1, 1, 8)
    model = replace(recipe.model, yarn=Yarn(2.0, 64), latent=latent, transfer_base=base)
    return replace(recipe, data=data, model=model)


def beyond(rules: KeyRules) -> list[float]:
    """Returns numbers just outside a range."""
    below = [rules.above] if rules.above is not None else []
    below += [rules.at_least - 1] if rules.at_least is not None else []
    over = [rules.below] if rules.below is not None else []
    return [
        *below,
        *over,
        *([rules.at_most + 1] if rules.at_most is not None else []),
        float("nan"),
        float("inf"),
    ]


RANGED = {name: key.rules for name, key in schema_keys().items() if key.rules.range}


@pytest.mark.parametrize("name", RANGED)
def test_a_number_out_of_range_is_refused_by_its_key(name: str) -> None:
    recipe = with_every_section()
    assert list(out_of_range(recipe)) == []
    for number in beyond(RANGED[name]):
        (found,) = out_of_range(with_value(recipe, name.split("."), number))
        named = name.replace("[]", "[0]")
        assert found.key in (named, f"{named}.one")
        assert found.what == f"is {number}" and found.remedy


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=-1", "seed: is -1; must lie in [0, 4e+09]"),
        ("guard.rollback_before_batches=-1", "guard.rollback_before_batches: is -1; must not be negative"),
        ("model.moe.jitter_eps=1", "model.moe.jitter_eps: is 1.0; must lie in [0, 1); 0.01 is usual"),
        ("schedule.final_share=1.5", "schedule.final_share: is 1.5; must lie in [0, 1]"),
        ("preflight.slow_factor=1", "preflight.slow_factor: is 1.0; must be above 1; 3 is usual"),
        ("data.domain_max_epochs.code=0", "data.domain_max_epochs.code: is 0.0; must be above 0"),
        ("data.domains.code=0", "data.domains.code: is 0.0; must be above 0, or omit the domain"),
        ("data.phases=[{tokens: -3, weights: {code: 1}}]", "data.phases[0].tokens: is -3; must be above 0"),
        ("tokenizer.vocab_size=9", "tokenizer.vocab_size: is 9; 256 bytes and 2 special tokens need 258"),
    ],
)
def test_the_remedy_says_the_range(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_recipe(SMOKE, [override]), Topology(), SMOKE)
    assert str(caught.value) == f"{SMOKE}: {expected}"


def test_what_may_differ_when_a_run_is_resumed() -> None:
    found: dict[OnResume, set[str]] = {each: set() for each in OnResume}
    for name in schema_keys():
        found[on_resume(name)].add(name)
    assert {name for name in found[OnResume.free] if name.split(".")[0] not in FREE_SECTIONS} == FREE_KEYS
    in_sections = {name for name in schema_keys() if name.split(".")[0] in FREE_SECTIONS}
    assert found[OnResume.free] == in_sections | FREE_KEYS
    assert {name for name in found[OnResume.edit] if "[]" not in name} == EDITABLE_KEYS
    assert on_resume("data.domains.code") is OnResume.edit
    assert on_resume("model.d_model") is on_resume("unknown.key") is OnResume.never


def test_what_may_differ_from_the_weights_of_step_0() -> None:
    rules = {name: key.rules.on_start for name, key in schema_keys().items() if name.startswith("model.")}
    equal = {name.removeprefix("model.") for name, it in rules.items() if it in (None, OnStart.equal)}
    assert equal == {
        *("d_model", "n_layers", "n_heads", "n_kv_heads", "ffn_hidden_size", "vocab_size"),
        *("head_width", "ffn", "norm", "qk_norm", "qk_norm_over", "tie_embeddings", "moe.experts"),
        *("qkv_bias", "rope_share"),
        *(f"moe.{name}" for name in ("expert_hidden_size", "shared_hidden_size", "shared_gate")),
        *("moe.dense_layers", "moe.every_n_layers"),
        *(f"latent.{name}" for name in ("q_rank", "kv_rank", "nope_width", "rope_width", "v_width")),
    }
    reported = {name.removeprefix("model.") for name, it in rules.items() if it is OnStart.reported}
    yarn = {
        f"yarn.{name}" for name in ("factor", "original_tokens", "beta_fast", "beta_slow", "attention_factor")
    }
    assert reported - {"yarn", *yarn} == {
        *("rope_theta", "max_sequence_tokens", "norm_eps", "clip_qkv", "position", "mtp"),
        *(f"moe.{name}" for name in ("score", "weight_scale", "groups", "top_groups", "group_score")),
    }


@pytest.mark.parametrize(
    ("name", "value", "is_other"),
    [
        ("sources[].path", "elsewhere", False),
        ("preparation.chunk_bytes", 9, False),
        ("preparation.zstd_level", 3, False),
        ("preparation.evaluation_texts", ["x"], True),
        ("preparation.near_duplicates", 0.9, True),
        ("sources[].version", "2", True),
    ],
)
def test_which_keys_make_other_shards(name: str, value: object, is_other: bool) -> None:
    recipe = with_every_section()
    changed = replace(recipe, data=with_value(recipe.data, name.split("."), value))
    assert (preparation_digest(changed) != preparation_digest(recipe)) is is_other


def test_help_describes_every_key() -> None:
    text = describe_keys()
    assert all(f"  {name}  (" in text for name in schema_keys())
    assert len(schema_keys()) > 50
    assert "  data.workers  (default 1; at least 0; free on resume)\n" in text
    assert "  schedule.decay_tokens  (default 0; at least 0; read when schedule.kind == wsd)\n" in text
