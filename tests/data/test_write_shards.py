import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.opened import OpenedData
from data.shards.manifest import check_shards, entropy, read_manifest, require_match, unigram_entropy
from data.shards.packing import PADDING
from data.shards.streams import ShardFolder
from data.text.growth import plan_growth
from data.tokenizer import open_tokenizer
from data.write_shards import build_shards, ensure_shards, main
from tests.data.conftest import small_documents
from train.recipe.errors import UserError
from train.recipe.reading import to_yaml
from train.recipe.schema import Model, Recipe

pytestmark = pytest.mark.slow


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def copy(built: Recipe, make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """A recipe whose shards a test may damage."""
    shutil.copytree(built.data.shards, tmp_path / "shards")
    return make_recipe(tmp_path / "shards")


def test_a_plan_for_more_documents_is_computed_from_shards(
    built: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = Path(built.data.shards)
    manifest = check_shards(root)
    million, billion = (plan_growth(manifest, root, built.data.preparation, n) for n in (10**6, 10**9))
    for name in ("text_bytes", "signature_bytes", "band_bytes", "token_bytes", "driver_memory_bytes"):
        assert getattr(billion, name) == pytest.approx(1000 * getattr(million, name), rel=0.05)
    assert billion.task_memory_bytes == million.task_memory_bytes < 10**9
    assert billion.spans == 954 and million.spans == 1 and million.band_bytes == 25 * 16 * 10**6
    command = ["yamls/smoke.yaml", f"data.shards={root}", "--plan-documents"]
    assert main([*command, "1e9"]) == 0 and "partitions by band" in capsys.readouterr().out
    assert main([*command, "nan"]) == 2 and main([*command, "5", f"data.shards={tmp_path}/none"]) == 2


def test_every_document_is_in_the_shards_once_and_on_one_side(built: Recipe):
    root = Path(built.data.shards)
    tokenizer = open_tokenizer(built.tokenizer, root)
    for domain in ("code", "prose"):
        texts = [document.text for document in small_documents() if document.domain == domain]
        listing = [json.loads(line) for line in (root / domain / "documents.jsonl").read_text().splitlines()]
        assert [entry["name"] for entry in listing] == [f"{domain}/{number}.txt" for number in range(60)]
        seen: dict[int, str] = {}
        for side in ("train", "validation"):
            pieces: dict[int, list[np.ndarray]] = {}
            folder = ShardFolder(root / domain / side)
            for number in range(len(folder)):
                sample = folder[number]
                parts = np.split(sample.tokens, np.cumsum(sample.lengths)[:-1])
                for ordinal, part in zip(sample.documents.tolist(), parts, strict=True):
                    pieces.setdefault(ordinal, []).append(part)
            assert all((part == tokenizer.pad_id).all() for part in pieces.pop(PADDING, []))
            for ordinal, parts in pieces.items():
                assert ordinal not in seen and listing[ordinal]["split"] == side
                seen[ordinal] = side
                ids = np.concatenate(parts)
                assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
                assert tokenizer.decode(ids[:-1]) == texts[ordinal]
        assert sorted(seen) == list(range(60)) and set(seen.values()) == {"train", "validation"}


def test_the_manifest_counts_what_is_there(built: Recipe):
    root = Path(built.data.shards)
    manifest = check_shards(root, every_byte=True)
    assert manifest == read_manifest(root)
    for domain, record in manifest.domains.items():
        texts = [document.text for document in small_documents() if document.domain == domain]
        assert sum(split.documents for split in record.splits.values()) == 60
        assert sum(split.text_bytes for split in record.splits.values()) == len("".join(texts).encode())
        for side, split in record.splits.items():
            folder = ShardFolder(root / domain / side)
            samples = [folder[number] for number in range(len(folder))]
            owner = np.concatenate([np.repeat(sample.documents, sample.lengths) for sample in samples])
            tokens = np.concatenate([sample.tokens for sample in samples])
            assert split.samples == len(samples)
            assert split.tokens == (owner != PADDING).sum()
            assert split.tokens + split.padding_tokens == 32 * len(samples)
            assert split.unigram_entropy == pytest.approx(unigram_entropy(tokens[owner != PADDING]))


def test_entropy_is_that_of_the_frequencies():
    assert unigram_entropy(np.array([3, 3, 7, 7])) == pytest.approx(np.log(2))
    assert unigram_entropy(np.array([5, 5])) == 0
    assert entropy(np.array([1, 0, 3])) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))


def test_the_same_documents_give_the_same_bytes(
    built: Recipe, make_recipe: Callable[..., Recipe], tmp_path: Path
):
    recipe = make_recipe(tmp_path / "again")
    build_shards(recipe, documents=small_documents)
    assert files(Path(recipe.data.shards)) == files(Path(built.data.shards))


def test_a_rebuild_replaces_and_a_build_does_not(copy: Recipe):
    root = Path(copy.data.shards)
    before = files(root)
    (root / "code/train/index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json is altered"):
        build_shards(copy, documents=small_documents)
    build_shards(copy, documents=small_documents, rebuild=True)
    assert files(root) == before
    assert not list(root.parent.glob(".shards.partial"))


def test_a_build_that_fails_leaves_nothing(make_recipe: Callable[..., Recipe], tmp_path: Path):
    recipe = make_recipe(tmp_path / "shards")

    def broken():
        yield from list(small_documents())[:30]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        build_shards(recipe, documents=broken)
    with pytest.raises(UserError, match=r"data.domains: prose has 0 documents"):
        build_shards(recipe, documents=lambda: iter(list(small_documents())[:60]))
    assert [path.name for path in tmp_path.iterdir()] == [".shards.lock"]


def test_a_folder_of_something_else_is_left_alone(make_recipe: Callable[..., Recipe], tmp_path: Path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no shards"):
        build_shards(make_recipe(tmp_path / "shards"), documents=small_documents, rebuild=True)
    assert (tmp_path / "shards/thesis.txt").read_text() == "mine"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize(
    "name",
    ["code/train/shard.00000.mds", "prose/validation/index.json", "code/documents.jsonl", "manifest.json"],
)
def test_damage_is_named_in_one_line(copy: Recipe, damage: Callable[[Path], None], name: str):
    root = Path(copy.data.shards)
    path = root / name
    damage(path)
    with pytest.raises(UserError) as caught:
        check_shards(root)
    line = str(caught.value)
    assert "\n" not in line and "data.shards" in line and "write_shards" in line
    assert str(path) in line or (damage is Path.unlink and name == "manifest.json")


def test_large_shards_are_hashed_only_on_demand(copy: Recipe, monkeypatch: pytest.MonkeyPatch):
    root = Path(copy.data.shards)
    flip(root / "code/train/shard.00000.mds")
    monkeypatch.setattr("data.shards.manifest.HASHED_BYTES", 10)
    check_shards(root)
    with pytest.raises(UserError, match="altered"):
        check_shards(root, every_byte=True)
    truncate(root / "code/train/shard.00000.mds")
    with pytest.raises(UserError, match=r"has \d+ bytes instead of"):
        check_shards(root)


def test_shards_that_the_recipe_does_not_mean_are_refused(built: Recipe, make_recipe: Callable[..., Recipe]):
    import dataclasses

    manifest = read_manifest(Path(built.data.shards))
    shards = Path(built.data.shards)
    cases = {
        r"data.sequence_tokens: is 64, but .* has sequences of 32": make_recipe(shards, sequence_tokens=64),
        r"data.domains.music: .* has no domain music; it has code, prose": make_recipe(
            shards, domains={"music": 1.0}
        ),
        r"data.validation_domains: .* has no domain music": make_recipe(shards, validation_domains=["music"]),
        r"data.corpus_bytes: is 7, but": make_recipe(shards, corpus="installed", corpus_bytes=7),
        r"tokenizer.kind: is bpe-512, but .* was made with bpe-300": dataclasses.replace(
            built, tokenizer=dataclasses.replace(built.tokenizer, vocab_size=512)
        ),
    }
    require_match(manifest, built)
    for pattern, recipe in cases.items():
        with pytest.raises(UserError, match=pattern):
            require_match(manifest, recipe)


def test_missing_shards_are_built_only_from_a_corpus(make_recipe: Callable[..., Recipe], tmp_path: Path):
    with pytest.raises(UserError, match="no shards at"):
        ensure_shards(OpenedData(make_recipe(tmp_path / "shards")))
    recipe = make_recipe(tmp_path / "shards", corpus="installed", corpus_bytes=300_000)
    opened = OpenedData(recipe)
    ensure_shards(opened)
    first = opened.manifest
    assert first.domains["code"].splits["train"].tokens > 10_000
    again = OpenedData(recipe)
    ensure_shards(again)
    assert again.manifest == first


def test_command_line(built: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import dataclasses

    model = Model(
        d_model=8,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        ffn_hidden_size=8,
        vocab_size=300,
        max_sequence_tokens=32,
    )
    optimizer = dataclasses.replace(built.optimizer, learning_rate=0.1)
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(dataclasses.replace(built, model=model, optimizer=optimizer)))
    assert main([str(path), "--check", "--json", str(tmp_path / "out.json")]) == 0
    assert "prose/validation" in capsys.readouterr().out
    assert (tmp_path / "out.json").read_text() == (Path(built.data.shards) / "manifest.json").read_text()
    assert main([str(path), "data.sequence_tokens=16"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(path), "--rebuild"]) == 2
    assert "data.corpus" in capsys.readouterr().err
