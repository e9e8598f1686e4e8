"""Generation: same with and without cache, in a batch and alone; sampling as in transformers."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.generate.__main__ import main
from train.generate.generation import OwnText, generate, text_of
from train.generate.sampling import Sampling, next_tokens
from train.hf.weights import open_weights
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.kv_cache import CachedDecoder, flush_right
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Ffn, Model, Moe, Norm, Position, Recipe, Tokenizer, TokenizerKind

pytestmark = pytest.mark.slow

MakeRun = Callable[[Recipe], tuple[Path, Decoder]]

DBRX = Model(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=40,
    vocab_size=300,
    max_sequence_tokens=160,
    clip_qkv=8,
    moe=Moe(experts=4, top_k=2),
)
MODELS = {
    "dbrx": DBRX,
    "llama": replace(DBRX, norm=Norm.rmsnorm, clip_qkv=None, moe=None),
    "mpt": replace(DBRX, position=Position.alibi, ffn=Ffn.mlp, moe=None, tie_embeddings=True),
}
GREEDY = Sampling()


def _decoder(model: Model) -> Decoder:
    decoder = Decoder(model, device="cpu")
    initialize(decoder, model, seed=11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)  # Enough for the most likely token to depend on the text.
    return decoder


@pytest.fixture
def run(tokenizer_folder: Path, make_run: MakeRun) -> Path:
    base = load_recipe(Path(__file__).parents[3] / "yamls" / "smoke.yaml")
    recipe = replace(
        base,
        name="talker",
        model=DBRX,
        data=replace(base.data, shards=str(tokenizer_folder)),
        tokenizer=Tokenizer(kind=TokenizerKind.bpe, vocab_size=300),
    )
    return make_run(recipe)[0]


def _continue(
    decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int, use_cache: bool
) -> list[Tensor]:
    """Returns the logits of each greedy step."""
    cached = CachedDecoder(decoder, use_cache=use_cache)
    fed = flush_right(prompts, torch.device("cpu"))
    logits = []
    for _ in range(steps):
        logits.append(cached.feed(fed))
        fed = logits[-1].argmax(-1, keepdim=True)
    return logits


@pytest.mark.parametrize("kind", MODELS)
def test_cache_and_padding_change_nothing(kind: str) -> None:
    decoder = _decoder(MODELS[kind])
    prompts = [[5, 17, 250, 3, 99, 42, 8], [120], [7, 7, 30]]
    together = _continue(decoder, prompts, 12, use_cache=True)
    for with_cache, without in zip(together, _continue(decoder, prompts, 12, use_cache=False), strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-5, rtol=1e-5)
    for i, prompt in enumerate(prompts):
        text = torch.tensor([prompt])
        for logits in together:
            with torch.no_grad():
                plain = decoder(text).logits_BSV
            assert plain is not None
            torch.testing.assert_close(logits[i], plain[0, -1], atol=1e-5, rtol=1e-5)
            text = torch.cat([text, plain[:, -1:].argmax(-1)], dim=1)
    spread = torch.stack(together).argmax(-1).unique().numel()
    assert spread > 2, "a text of one token would hide a wrong cache"


def test_several_tokens_may_be_fed_to_a_cache_that_is_not_empty() -> None:
    decoder = _decoder(DBRX)
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    cached = CachedDecoder(decoder)
    cached.feed(ids[:, :4])
    torch.testing.assert_close(
        cached.feed(ids[:, 4:]), CachedDecoder(decoder).feed(ids), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=0.9, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.5),
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_transformers(sampling: Sampling) -> None:
    from transformers import generation

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 3
    seen = torch.tensor([[3, 4, 5, 3]])
    scores = generation.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, logits.clone())
    scores = generation.TemperatureLogitsWarper(sampling.temperature)(seen, scores)
    if sampling.top_k:
        scores = generation.TopKLogitsWarper(sampling.top_k)(seen, scores)
    if sampling.top_p:
        scores = generation.TopPLogitsWarper(sampling.top_p)(seen, scores)
    if sampling.min_p:
        scores = generation.MinPLogitsWarper(sampling.min_p)(seen, scores)
    expected = scores.softmax(-1)[0]
    draws = next_tokens(
        logits.expand(20_000, -1), seen.expand(20_000, -1), sampling, torch.Generator().manual_seed(2)
    )
    counts = torch.bincount(draws, minlength=50)
    assert (counts[expected == 0] == 0).all()
    torch.testing.assert_close(counts / counts.sum(), expected, atol=0.015, rtol=0)


def test_seeds_repeat_and_differ(run: Path) -> None:
    source = open_weights(run)
    text, decoder = text_of(source), _decoder(DBRX)

    def said(seed: int) -> list[int]:
        *_, answers = generate(decoder, text, ["def"], Sampling(temperature=1.0, seed=seed), max_tokens=20)
        return answers[0].ids

    assert said(1) == said(1) != said(2)


class Script:
    """A byte tokenizer."""

    def __init__(self, end: int = 300) -> None:
        self.end_ids = frozenset({end})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Scripted(Decoder):
    """A decoder that generates given tokens: the last norm's output is replaced by one-hot rows."""

    def __init__(self, script: bytes) -> None:
        super().__init__(replace(DBRX, d_model=260, n_heads=2, n_layers=1, moe=None, vocab_size=260))
        self.script = script
        self.step = 0
        torch.nn.init.eye_(self.lm_head.weight)  # type: ignore[union-attr]
        self.transformer.norm_f.register_forward_hook(self._speak)

    def _speak(self, _module: object, _inputs: object, output: Tensor) -> Tensor:
        hot = torch.zeros_like(output)
        hot[..., self.script[self.step]] = 1
        self.step += 1
        return hot


def _pieces(script: bytes, stop: tuple[str, ...] = (), end: int = 300) -> tuple[list[str], str]:
    seen, ending = [""], ""
    for answers in generate(Scripted(script), Script(end), ["x"], GREEDY, max_tokens=len(script), stop=stop):
        assert answers[0].text.startswith(seen[-1]), "what was shown must not change"
        seen.append(answers[0].text)
        ending = answers[0].ending
    return seen[1:], ending


def test_text_streams_by_whole_characters() -> None:
    pieces, ending = _pieces("aß👩b".encode())
    assert pieces == ["a", "a", "aß", "aß", "aß", "aß", "aß👩", "aß👩b"]
    assert ending == "length"


def test_a_stop_text_ends_the_answer_and_is_never_shown() -> None:
    pieces, ending = _pieces(b"one\n--two\n---three", stop=("\n---",))
    assert pieces[-1] == "one\n--two" and ending == "stop"
    assert all(not piece.endswith("\n") for piece in pieces)
    assert _pieces(b"ends with \n-", stop=("\n---",))[0][-1] == "ends with \n-"


def test_the_end_of_text_ends_the_answer() -> None:
    pieces, ending = _pieces(b"so it is.\x00 never", end=0)
    assert pieces[-1] == "so it is." and ending == "end of text"


def test_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "answers.json"
    common = [str(run), "--max-tokens", "6", "--temperature", "0", "--json", str(figures)]
    assert main([*common, "def one"]) == 0
    alone = json.loads(figures.read_text())["answers"][0]
    assert capsys.readouterr().out == alone["text"] + "\n"
    (tmp_path / "prompts").write_text("import\n\ndef one\n")
    assert main([*common, "--file", str(tmp_path / "prompts"), "--no-cache"]) == 0
    batch = json.loads(figures.read_text())["answers"]
    assert [row["prompt"] for row in batch] == ["import", "def one"] and batch[1] == alone
    assert "--- 2: def one\n" in capsys.readouterr().out
    chatml = ["--chat", "--chat-template", "yamls/chatml.jinja", "--system", "Be brief.", "Hi?"]
    assert main([*common, *chatml]) == 0
    assert json.loads(figures.read_text())["answers"][0]["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_mistakes_are_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for arguments, words in (
        (["x", "--max-tokens", "160"], "exceed the model's 160"),
        ([], "no prompt"),
        (["-"], "has no tokens"),
        (["x", "--checkpoint", "batch-1"], "is not a checkpoint"),
    ):
        assert main([str(run), *arguments]) == 2
        complaint = capsys.readouterr().err.strip().splitlines()[-1]
        assert complaint.startswith("generate: ") and words in complaint
    assert main([str(run.parent / "nothing"), "x"]) == 2


def test_bf16_weights_speak_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "def", "--dtype", "bf16", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_exported_folders_speak_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.hf.__main__ import main as hf

    assert hf(["export", str(run), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    said = []
    for source in (run, tmp_path / "hf"):
        assert main([str(source), "def one", "--temperature", "0", "--max-tokens", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_folder_without_a_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    source = open_weights(run)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        text_of(replace(source, recipe=None))
    assert isinstance(text_of(source), OwnText)
