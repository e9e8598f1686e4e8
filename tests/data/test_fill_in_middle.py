"""Fill-in-the-middle: a plain form of it, batches on any ranks and after any start, and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.audit.__main__ import main as audit
from data.batch import NO_TARGET, Batch
from data.fill_in_middle import SHORTEST, FillInMiddleTransform
from data.hugging_face_tokenizer import HuggingFaceTokenizer
from data.loader import build_train_loader, build_validation_loaders
from data.opened import OpenedData
from data.shards.manifest import require_match
from data.shards.packing import PADDING, Sample, pack, pack_whole
from data.text.bpe import train_bpe
from data.tokenizer import find_sentinels, open_tokenizer
from data.write_shards import build_shards
from tests.data.audit.test_audit import line_of
from tests.data.conftest import small_documents
from train.recipe.curriculum import Stage, continue_stages, from_json, plan_stages, to_json
from train.recipe.errors import UserError
from train.recipe.phases import SENTINELS
from train.recipe.preparation import Packing, Preparation
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.rules import validate
from train.recipe.schema import FillInMiddle, Phase, Recipe, Tokenizer, TokenizerKind
from train.recipe.topology import Topology

S, EOS, PAD = 32, 90, 91
PREFIX, SUFFIX, MIDDLE = 100, 101, 102
MASK64 = (1 << 64) - 1
SMOKE = str(Path(__file__).parents[2] / "yamls/smoke.yaml")


def stage_of(share: float, spm: float) -> Stage:
    return Stage(0, 0, 0, 9, 1, 1, {"code": 1.0}, {}, "linear", 0, 9, 1.0, 1.0, {"code": share}, spm)


def plain(samples: list[Sample], numbers: list[int]) -> list[tuple[int, int]]:
    """Borders of the documents of a sequence, token by token."""
    owners: list[tuple[int, int]] = []  # document, and how often a sample was no neighbour before
    jumps = 0
    for place, sample in enumerate(samples):
        jumps += place > 0 and numbers[place] != numbers[place - 1] + 1
        for document, length in zip(sample.documents.tolist(), sample.lengths.tolist(), strict=True):
            owners += [(document, jumps)] * length
    borders = [n for n in range(len(owners) + 1) if n in (0, len(owners)) or owners[n] != owners[n - 1]]
    return [(begin, end) for begin, end in pairwise(borders) if owners[begin][0] != PADDING]


def mixed(value: int) -> int:
    """SplitMix64's output function in integers of any size."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)


def rearranged(tokens: list[int], first_token: int, key: int, share: float, spm: float) -> list[int]:
    """One document in the plain form."""
    end = [EOS] if tokens[-1] == EOS else []
    text = tokens[: len(tokens) - len(end)]
    noise = mixed(first_token + key & MASK64)
    draws = [(mixed(noise + n * 0x9E3779B97F4A7C15 & MASK64) >> 11) / (1 << 53) for n in range(1, 5)]
    if len(text) < SHORTEST or draws[0] >= share:
        return tokens
    text = text[:-3]
    a, b = sorted(int(draw * (len(text) + 1)) for draw in draws[2:])
    if draws[1] < spm:
        return [PREFIX, SUFFIX, *text[b:], MIDDLE, *text[:a], *text[a:b], *end]
    return [PREFIX, *text[:a], SUFFIX, *text[b:], MIDDLE, *text[a:b], *end]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", ["end to end", "whole"])
def test_documents_are_rearranged_as_in_the_plain_form(seed: int, packing: str) -> None:
    rng = np.random.default_rng(seed)
    texts = [(n, rng.integers(0, EOS, rng.integers(1, 90)).astype(np.int32)) for n in range(60)]
    if packing == "whole":
        ended = [(n, np.append(ids, np.int32(EOS))) for n, ids in texts]
        samples = pack_whole(ended, sequence_tokens=S, pad_id=PAD)
    else:
        samples = list(pack(texts, sequence_tokens=S, eos_id=EOS, pad_id=PAD))
    form = FillInMiddleTransform((PREFIX, SUFFIX, MIDDLE), EOS, seed=seed, sample_tokens=S)
    key, seen, share, spm = int(form._key[0]), 0, 0.7, 0.4
    for step in (1, 2, 4):
        for at in range(0, len(samples) - step, step):
            row = samples[at : at + step]
            numbers = np.arange(at, at + step)
            numbers[2:] += at % 3  # Sometimes the third sample is no neighbour of the second.
            position = 10**12 + 7 * at
            found = form.rearrange(row, numbers, position=position, domain="code", stage=stage_of(share, spm))
            wanted = np.concatenate([sample.tokens for sample in row]).tolist()
            for begin, end in plain(row, numbers.tolist()):
                document = rearranged(wanted[begin:end], position * S + begin, key, share, spm)
                seen += document != wanted[begin:end]
                wanted[begin:end] = document
            assert np.concatenate([sample.tokens for sample in found]).tolist() == wanted
            for old, new in zip(row, found, strict=True):
                assert new.tokens.dtype == np.int32
                assert new.lengths is old.lengths and new.documents is old.documents
    assert seen > 20


def test_shares_and_cuts_are_even() -> None:
    """Over 2,000 documents: the shares to 4 standard deviations, and the cuts of two uniform draws."""
    tokens = np.arange(S, dtype=np.int32)
    sample = Sample(tokens, np.array([S], np.int32), np.array([0]))
    form = FillInMiddleTransform((PREFIX, SUFFIX, MIDDLE), EOS, seed=1, sample_tokens=S)
    of = [
        cut
        for n in range(2000)
        for cut in form.cuts([sample], np.array([0]), position=n, domain="code", stage=stage_of(0.5, 0.25))
    ]
    assert len(of) == pytest.approx(1000, abs=90)
    assert sum(cut.order == "SPM" for cut in of) == pytest.approx(250, abs=62)
    # Of 30 places each; the mean of the smaller of two draws is a third of the way.
    assert np.mean([cut.first for cut in of]) == pytest.approx((S - 3) / 3, abs=1)
    assert np.mean([cut.second for cut in of]) == pytest.approx(2 * (S - 3) / 3, abs=1)
    assert {0, S - 3} <= {cut.first for cut in of} | {cut.second for cut in of}


def test_samples_with_a_loss_mask_and_other_domains_are_left_alone() -> None:
    tokens = np.arange(S, dtype=np.int32)
    sample = Sample(tokens, np.array([S], np.int32), np.array([0]))
    masked = dataclasses.replace(sample, trained=np.full(S // 8, 255, np.uint8))
    form = FillInMiddleTransform((PREFIX, SUFFIX, MIDDLE), EOS, seed=1, sample_tokens=S)
    place: Any = {"position": 0, "stage": stage_of(1.0, 0.5)}
    for given, domain, moves in ((sample, "code", True), (masked, "code", False), (sample, "prose", False)):
        (found,) = form.rearrange([given], np.array([0]), domain=domain, **place)
        assert (found.tokens.tolist() != tokens.tolist()) == moves


PHASES = [
    Phase(tokens=30 * 8 * S, weights={"code": 0.7, "prose": 0.3}, sequence_tokens=2 * S),
    Phase(
        tokens=30 * 8 * S,
        weights={"code": 0.5, "prose": 0.5},
        fill_in_middle=FillInMiddle(share=0.9, domain_shares={"prose": 0.0}, spm=1.0),
        sequence_tokens=S,
    ),
    Phase(tokens=20 * 8 * S, weights={"prose": 1.0}, fill_in_middle=FillInMiddle()),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Recipe:
    """Three phases over shards packed whole: both domains, one of them with a share of its own, and none."""
    made = make_recipe(
        tmp_path_factory.mktemp("data") / "shards",
        domains={},
        phases=PHASES,
        window_shards=2,
        preparation=Preparation(packing=Packing.best_fit),
        fill_in_middle=FillInMiddle(share=0.5),
    )
    made = dataclasses.replace(
        made,
        tokenizer=Tokenizer(TokenizerKind.bpe, 303, special_tokens=list(SENTINELS[0])),
        training=dataclasses.replace(made.training, duration_tokens=sum(phase.tokens for phase in PHASES)),
    )
    build_shards(made, documents=small_documents)
    return made


def read(recipe: Recipe, start: int = 0, batches: int = 80, **place: Any) -> list[Batch]:
    place = {"rank": 0, "world_size": 1} | place
    return list(islice(build_train_loader(OpenedData(recipe), start_sample=start, **place), batches))


@pytest.fixture(scope="module")
def whole(recipe: Recipe) -> list[Batch]:
    return read(recipe)


def test_batches_differ_from_plain_ones_by_whole_documents_only(recipe: Recipe, whole: list[Batch]) -> None:
    none = [dataclasses.replace(phase, fill_in_middle=FillInMiddle()) for phase in PHASES]
    untouched = read(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, phases=none)))
    sentinels = set(find_sentinels(OpenedData(recipe).tokenizer, recipe.tokenizer))
    eos_id, seen = OpenedData(recipe).tokenizer.eos_id, {}
    for number, (one, other) in enumerate(zip(whole, untouched, strict=True)):
        for key in ("document_ids", "sample_positions", "domain_ids"):
            assert torch.equal(one[key], other[key])
        assert torch.equal(one["targets"] == NO_TARGET, other["targets"] == NO_TARGET)
        follows = one["targets"][:, :-1] != NO_TARGET
        assert torch.equal(one["targets"][:, :-1][follows], one["input_ids"][:, 1:][follows])
        for row, domain in enumerate(one["domain_ids"].tolist()):
            for document in range(int(one["document_ids"][row].max()) + 1):
                mine = one["document_ids"][row] == document
                new, old = one["input_ids"][row][mine].tolist(), other["input_ids"][row][mine].tolist()
                if new == old:
                    continue
                kind = (number // 30, domain)
                seen[kind] = seen.get(kind, 0) + 1
                text = old[:-1] if old[-1] == eos_id else old
                assert sorted(set(new) - set(old)) == sorted(sentinels)
                assert sorted(text[:-3]) == sorted(id for id in new[: len(text)] if id not in sentinels)
                assert new[len(text) :] == old[len(text) :]
    # Code and prose in the first phase, only code in the second.
    assert seen.keys() == {(0, 0), (0, 1), (1, 0)} and min(seen.values()) > 10


@pytest.mark.parametrize(
    ("start", "world_size", "workers"), [(0, 2, 0), (0, 4, 1), (352, 1, 2), (464, 2, 0), (488, 4, 0)]
)
def test_ranks_workers_and_starts_change_nothing(
    recipe: Recipe, whole: list[Batch], start: int, world_size: int, workers: int
) -> None:
    data = dataclasses.replace(recipe.data, workers=workers)
    training = dataclasses.replace(recipe.training, microbatch_sequences=1)
    recipe = dataclasses.replace(recipe, data=data, training=training)
    past = from_json(json.loads(json.dumps(to_json(plan_stages(recipe)))))
    curriculum = continue_stages(past, recipe, start)
    first = past.batch_at(start)
    ranks = [
        read(recipe, start, 12, rank=rank, world_size=world_size, curriculum=curriculum)
        for rank in range(world_size)
    ]
    for parts, expected in zip(zip(*ranks, strict=True), whole[first : first + 12], strict=True):
        for key, tensor in expected.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), tensor), key


def test_validation_is_left_to_right(recipe: Recipe) -> None:
    sentinels = find_sentinels(OpenedData(recipe).tokenizer, recipe.tokenizer)
    for loader in build_validation_loaders(OpenedData(recipe), rank=0, world_size=1).values():
        assert not any(np.isin(batch["input_ids"], sentinels).any() for batch in loader)


def test_the_audit_knows_what_was_read_and_shows_it(
    recipe: Recipe, whole: list[Batch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = to_yaml(recipe).replace("learning_rate: ???", "learning_rate: 0.1")
    text = text.replace("max_sequence_tokens: ???", "max_sequence_tokens: 64").replace(": ???", ": 8")
    (tmp_path / "recipe.yaml").write_text(text)
    lines = [line_of(number + 1, batch) for number, batch in enumerate(whole)]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "data_log.jsonl").write_text(log)
    assert audit([str(tmp_path)]) == 0
    assert audit([str(tmp_path), "--step", "35", "--text"]) == 0
    shown = capsys.readouterr().out
    assert "the tokens of 80 steps match the shards" in shown
    assert "position 272, " in shown and "<|fim_prefix|><|fim_suffix|>" in shown
    wanted = OpenedData(recipe).tokenizer.decode(whole[34]["input_ids"][0].tolist())
    assert "".join(wanted.split()).startswith(
        "".join(shown[shown.index("position 272,") :].split("\n", 1)[1].split("position")[0].split())[:60]
    )
    assert audit([str(tmp_path), "--text"]) == 2
    # Rearranged otherwise: the same shards, another share.
    (tmp_path / "recipe.yaml").write_text(text.replace("share: 0.9", "share: 0.8"))
    assert audit([str(tmp_path)]) == 1
    assert "trained on other tokens than those of the shards" in capsys.readouterr().out


def test_the_past_of_a_run_is_not_rearranged_otherwise(recipe: Recipe) -> None:
    past = plan_stages(recipe)
    changed = [*PHASES[:2], dataclasses.replace(PHASES[2], fill_in_middle=FillInMiddle(share=1.0))]
    later = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, phases=changed))
    assert continue_stages(past, later, 464).stages[2].fill_in_middle == {"prose": 1.0}
    other = dataclasses.replace(recipe.data, fill_in_middle=FillInMiddle(share=0.5, spm=0.4))
    expected = (
        r"phases\[0\].fill_in_middle: is code 0.5, prose 0.5, SPM 0.4, but tokens .* with code 0.5, "
        "prose 0.5, SPM 0.5"
    )
    with pytest.raises(UserError, match=expected):
        continue_stages(past, dataclasses.replace(recipe, data=other), 464)


def test_a_checkpoint_of_an_earlier_version_has_no_fill_in_middle(built: Recipe) -> None:
    tree = to_json(plan_stages(built))
    for stage in tree["stages"]:
        del stage["fill_in_middle"], stage["spm"]
    assert from_json(tree) == plan_stages(built)


def test_sentinels_are_found_or_refused(built: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    cl100k = open_tokenizer(Tokenizer(), Path("unused"))
    assert find_sentinels(cl100k, Tokenizer()) == (100258, 100260, 100259)
    names = ["<s>", "<|fim_suffix|>", "<|fim_middle|>"]
    with pytest.raises(UserError, match=r"fill_in_middle_tokens: .* tokenizer cl100k_base has no <s> for it"):
        find_sentinels(cl100k, Tokenizer(fill_in_middle_tokens=names))
    trained = train_bpe(Tokenizer(TokenizerKind.bpe, 300), iter(["the cat sat"] * 9))
    with pytest.raises(UserError, match=r"the tokenizer bpe-300 has no tokens of a known name for it; name"):
        find_sentinels(trained, Tokenizer())
    for number, of in enumerate(SENTINELS):
        more = Tokenizer(TokenizerKind.bpe, 300, special_tokens=["<|im_start|>", *of])
        made = train_bpe(more, iter(["the cat sat " + " ".join(of)] * 9))
        made.to_hugging_face(folder := tmp_path / str(number))
        # Of the same file read by either kind.
        again = open_tokenizer(dataclasses.replace(more, fill_in_middle_tokens=list(of)), folder)
        theirs = HuggingFaceTokenizer(folder)
        assert (
            find_sentinels(made, more) == find_sentinels(again, more) == find_sentinels(theirs, Tokenizer())
        )
        assert again.fingerprint == made.fingerprint != trained.fingerprint
        for handle in (made, theirs):
            (ids,) = handle.encode_documents([of[0]])
            assert ids.size > 1 and handle.decode(ids) == of[0]
    with pytest.raises(
        UserError, match=r"tokenizer.special_tokens: .*tokenizer.json was trained without <x>"
    ):
        open_tokenizer(Tokenizer(TokenizerKind.bpe, 300, special_tokens=["<x>"]), Path(built.data.shards))
    with pytest.raises(UserError, match=r"vocab_size: is 258; 256 bytes and 3 special tokens need 259"):
        train_bpe(Tokenizer(TokenizerKind.bpe, 258, special_tokens=["<x>"]), iter(["abc"]))
    # Shards of a tokenizer without them, and of conversations.
    asked = dataclasses.replace(built.data, fill_in_middle=FillInMiddle(domain_shares={"code": 0.5}))
    without = dataclasses.replace(built, data=asked)
    with pytest.raises(UserError, match="tokenizer bpe-300 has no tokens of a known name"):
        OpenedData(without).require_match()
    manifest = OpenedData(recipe).manifest
    splits = {
        side: dataclasses.replace(split, trained_tokens=5, trained_bytes=9)
        for side, split in manifest.domains["prose"].splits.items()
    }
    masked = manifest.domains | {"prose": dataclasses.replace(manifest.domains["prose"], splits=splits)}
    few = [dataclasses.replace(PHASES[0], fill_in_middle=FillInMiddle(domain_shares={"prose": 0.5}))]
    chats = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, phases=few))
    with pytest.raises(UserError, match=r"phases\[0\].fill_in_middle.domain_shares: only some .* of prose"):
        require_match(dataclasses.replace(manifest, domains=masked), _by_targets(chats))


def _by_targets(recipe: Recipe) -> Recipe:
    mean = type(recipe.training.loss_mean)("targets")
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, loss_mean=mean))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.fill_in_middle.share=0.5"],
            "tokenizer.special_tokens: lacks <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>, which "
            "fill-in-the-middle needs; add them, so that the BPE is trained with them",
        ),
        (
            ["data.fill_in_middle.domain_shares.web=0.5"],
            "data.fill_in_middle.domain_shares.web: is not a domain there; it has ('code', 'prose')",
        ),
        (
            ["tokenizer.fill_in_middle_tokens=[a, b, a]"],
            "tokenizer.fill_in_middle_tokens: has 2 names; name those before prefix, suffix and middle",
        ),
        (
            ["tokenizer.special_tokens=[<|pad|>]"],
            "tokenizer.special_tokens: repeats a name, or one of <|endoftext|>, <|pad|>; name each once",
        ),
        (
            ["tokenizer.special_tokens=[<|unused_9|>]"],
            "tokenizer.special_tokens: has an empty name, or one in <|unused_; change it",
        ),
    ],
)
def test_recipes_that_cannot_fill_in_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(load_recipe(SMOKE, overrides), Topology(), SMOKE)
    assert str(caught.value) == f"{SMOKE}: {expected}"


def test_a_recipe_says_it_by_phase() -> None:
    phase = "{tokens: 1e6, weights: {code: 1}, fill_in_middle: {domain_shares: {code: 0.5}, spm: 0.25}}"
    recipe = load_recipe(SMOKE, ["data.domains={}", f"data.phases=[{phase}]"])
    (stage,) = plan_stages(recipe).stages
    assert (stage.fill_in_middle, stage.spm) == ({"code": 0.5}, 0.25)
