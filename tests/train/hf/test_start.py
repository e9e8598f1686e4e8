"""Checks of the weights that a recipe starts from, before torch is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.text.bpe import train_bpe
from data.text.hugging_face_form import write_form
from data.tokenizer import TokenizerHandle, open_tokenizer
from train.hf.folders import write_model
from train.hf.start import check_start, require_start_tokenizer
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.rules import validate
from train.recipe.schema import (
    OptimizerKind,
    OptimizerStart,
    Recipe,
    Registry,
    Start,
    Tokenizer,
    TokenizerKind,
)
from train.recipe.topology import Topology
from train.record.run_folder import TOKENIZER, keep_data

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def parent() -> Recipe:
    return load_recipe(ROOT / "yamls" / "smoke.yaml")


@pytest.fixture
def run(parent: Recipe, tmp_path: Path) -> Path:
    """Returns the folder of the parent run."""
    folder = tmp_path / "parent"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(parent))
    return folder


def _from(parent: Recipe, weights: Path, optimizer: OptimizerStart = OptimizerStart.fresh) -> Recipe:
    return replace(parent, name="child", start=Start(weights=str(weights), optimizer=optimizer))


def test_nothing_to_say_where_weights_are_drawn(parent: Recipe) -> None:
    assert check_start(parent, "x.yaml") == []


def test_what_changes_is_told(parent: Recipe, run: Path) -> None:
    recipe = _from(parent, run)
    recipe = replace(
        recipe,
        model=replace(recipe.model, rope_theta=8e6, max_sequence_tokens=4096),
        optimizer=replace(recipe.optimizer, learning_rate=parent.optimizer.learning_rate / 2),
    )
    told = "\n".join(check_start(recipe, "x.yaml"))
    assert "rope_theta: 500000.0 before, 8000000.0 now" in told
    assert "max_sequence_tokens: 512 before, 4096 now" in told
    assert f"0.5 x the old peak, 5 x the old end; {recipe.schedule.warmup_tokens:,} tokens of warm-up" in told


def test_weights_alone_will_do(parent: Recipe, tmp_path: Path) -> None:
    write_model(tmp_path / "model.yaml", parent.model)
    assert "initial weights" in check_start(_from(parent, tmp_path), "x.yaml")[0]
    with pytest.raises(UserError, match=r"start.optimizer: is restored, but .* contains only weights"):
        check_start(_from(parent, tmp_path, OptimizerStart.restored), "x.yaml")


def test_misfits_are_refused(parent: Recipe, run: Path, tmp_path: Path) -> None:
    recipe = _from(parent, run, OptimizerStart.restored)
    check_start(recipe, "x.yaml")
    moe = recipe.model.moe
    assert moe is not None
    misfits = {
        "model.d_model: is 256, but the weights": replace(recipe, model=replace(recipe.model, d_model=256)),
        "model.moe.experts: is 8": replace(recipe, model=replace(recipe.model, moe=replace(moe, experts=8))),
        "model.moe: the weights are of a mixture": replace(recipe, model=replace(recipe.model, moe=None)),
        "tokenizer: .*4000 ids is not": replace(recipe, tokenizer=replace(recipe.tokenizer, vocab_size=4000)),
        "start.optimizer: .*trained with adamw": replace(
            recipe, optimizer=replace(recipe.optimizer, kind=OptimizerKind.lion)
        ),
        "start.optimizer: .*kept no average": replace(
            recipe, optimizer=replace(recipe.optimizer, average_decay=0.9)
        ),
        "start.weights: .*not a run or checkpoint": replace(
            recipe, start=Start(weights=str(tmp_path / "nowhere"))
        ),
    }
    for words, wrong in misfits.items():
        with pytest.raises(UserError, match=f"x.yaml: {words}"):
            check_start(wrong, "x.yaml")
    write_model(tmp_path / "model.yaml", replace(parent.model, moe=None))
    with pytest.raises(UserError, match=r"train.hf upcycle makes experts from a dense model"):
        check_start(_from(parent, tmp_path), "x.yaml")


def test_trained_tokenizers_are_compared(parent: Recipe, run: Path, tmp_path: Path) -> None:
    parent = replace(parent, data=replace(parent.data, shards=str(tmp_path / "old")))
    (run / "recipe.yaml").write_text(to_yaml(parent))
    recipe = _from(replace(parent, data=replace(parent.data, shards=str(tmp_path / "new"))), run)
    ranks, special_ids = {bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256}
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_form(tmp_path / name / "tokenizer.json", ".+", ranks, special_ids)
    new = tmp_path / "new" / "tokenizer.json"
    new.write_text(json.dumps(json.loads(new.read_text()), indent=1))  # Spelled differently, but the same.
    check_start(recipe, "x.yaml")
    write_form(new, ".+", ranks | {b"ab": 256}, {"<|endoftext|>": 257})
    with pytest.raises(UserError, match="tokenizer"):
        check_start(recipe, "x.yaml")


def _bpe(text: str) -> TokenizerHandle:
    return train_bpe(Tokenizer(TokenizerKind.bpe, 300), iter([text * 9]))


@pytest.mark.parametrize("is_imported", [False, True])
def test_weights_with_another_tokenizer_are_refused(
    parent: Recipe, tmp_path: Path, is_imported: bool
) -> None:
    """A Hugging Face folder, or one imported from it, brings the tokenizer that its ids belong to."""
    weights, shards = tmp_path / "weights", tmp_path / "shards"
    weights.mkdir()
    write_model(weights / "model.yaml", parent.model)
    theirs = weights / "source" if is_imported else weights
    recipe = _from(replace(parent, data=replace(parent.data, shards=str(shards))), weights)
    recipe = replace(recipe, tokenizer=Tokenizer(TokenizerKind.bpe, 300))
    assert "have no tokenizer with them" in check_start(recipe, "x.yaml")[-1]
    one, other = _bpe("the cat sat on the mat "), _bpe("xyz zyx yxz ")
    one.to_hugging_face(theirs)
    # Shards, and with them the tokenizer, may not exist yet: then it is compared once they do.
    check_start(recipe, "x.yaml")
    require_start_tokenizer(recipe, one)
    with pytest.raises(
        UserError, match=r"tokenizer: bpe-300 is not the tokenizer .* has '.*' as id 25\d instead"
    ):
        require_start_tokenizer(recipe, other)
    other.to_hugging_face(shards)
    with pytest.raises(UserError, match=r"x.yaml: tokenizer: bpe-300 is not the tokenizer"):
        check_start(recipe, "x.yaml")
    one.to_hugging_face(shards)
    check_start(recipe, "x.yaml")
    # Equal ids, but another way to split: only text shows it.
    write_form(theirs / "tokenizer.json", r"\S+|\s+", one.ranks, one.special_ids)
    with pytest.raises(UserError, match=r"splits .* in another way"):
        check_start(recipe, "x.yaml")
    (theirs / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=r"tokenizer.json can't be read"):
        check_start(recipe, "x.yaml")
    (theirs / "tokenizer.json").rename(theirs / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model is no SentencePiece model"):
        check_start(recipe, "x.yaml")
    (theirs / "tokenizer.model").rename(theirs / "vocab.txt")
    with pytest.raises(UserError, match=r"vocab.txt is of another kind"):
        check_start(recipe, "x.yaml")


@pytest.mark.parametrize("through", ["run", "checkpoint"])
def test_a_run_whose_shards_were_built_again_is_refused(
    parent: Recipe, run: Path, tmp_path: Path, through: str
) -> None:
    """Then its folder of shards has the tokenizer of new runs, which is not the one of its weights."""
    shards = tmp_path / "shards"
    parent = replace(
        parent,
        tokenizer=Tokenizer(TokenizerKind.bpe, 300),
        data=replace(parent.data, shards=str(shards)),
    )
    (run / "recipe.yaml").write_text(to_yaml(parent))
    (run / "checkpoints/ba1/state").mkdir(parents=True)
    recipe = _from(parent, run if through == "run" else run / "checkpoints/ba1")
    one, other = _bpe("the cat sat on the mat "), _bpe("xyz zyx yxz ")
    keep_data(run, {TOKENIZER: one.fingerprint})
    one.to_hugging_face(shards)
    check_start(recipe, "x.yaml")
    require_start_tokenizer(recipe, one)
    other.to_hugging_face(shards)
    with pytest.raises(UserError, match=r"tokenizer: bpe-300 \(fingerprint .* no longer has that one"):
        check_start(recipe, "x.yaml")
    with pytest.raises(UserError, match=r"no longer has that one"):
        require_start_tokenizer(recipe, other)
    # The run's folder of shards is gone: the record is all there is.
    (shards / "tokenizer.json").unlink()
    require_start_tokenizer(recipe, one)
    with pytest.raises(UserError, match=r"no longer has that one"):
        require_start_tokenizer(recipe, other)


@pytest.mark.slow
def test_the_tokenizer_of_dbrx_is_recognised(parent: Recipe, tmp_path: Path) -> None:
    write_model(tmp_path / "model.yaml", parent.model)
    recipe = replace(_from(parent, tmp_path), tokenizer=Tokenizer())
    open_tokenizer(recipe.tokenizer, tmp_path).to_hugging_face(tmp_path)
    assert len(check_start(recipe, "x.yaml")) == 1
    _bpe("the cat sat on the mat ").to_hugging_face(tmp_path)
    with pytest.raises(UserError, match=r"cl100k_base is not the tokenizer"):
        check_start(recipe, "x.yaml")


def _frozen(*patterns: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, training=replace(recipe.training, frozen=list(patterns)))


def _catalog(name: str | None) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        tracking = replace(recipe.tracking, registry=Registry.unity_catalog, registered_model=name)
        return replace(recipe, tracking=tracking)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda recipe: replace(recipe, start=Start(optimizer=OptimizerStart.restored)),
            "start.optimizer: is restored, but start.weights",
        ),
        (_frozen("*.ruter.*"), r"training.frozen: '\*.ruter.\*' matches no weight"),
        (_frozen("*"), "training.frozen: freezes every weight"),
        (_catalog(None), "tracking.registered_model: is null"),
        (_catalog("a.b"), "tracking.registered_model: is a.b"),
    ],
)
def test_validation(parent: Recipe, change: Callable[[Recipe], Recipe], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(change(parent), Topology(), "x.yaml")


def test_frozen_routers_are_valid(parent: Recipe) -> None:
    frozen = replace(
        parent, training=replace(parent.training, frozen=["*.router.*", "transformer.wte.weight"])
    )
    validate(frozen, Topology(), "x.yaml")
    dense = replace(frozen, model=replace(parent.model, moe=None))
    with pytest.raises(UserError, match="matches no weight"):
        validate(dense, Topology(), "x.yaml")


def test_no_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import train.hf.start; "
        "from train.hf.folders import model_at; "
        f"model_at(Path({str(run)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
