"""Records of any shape: none ends a job or is lost, and no step takes more than its share of time for one."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.text.bpe import train_bpe
from data.text.clean import clean
from data.text.edited_items import EditedItems
from data.text.engines import Processes
from data.text.evaluation_overlap import EvaluationTexts
from data.text.inputs import Chunk, SourceFile
from data.text.job import PreparationJob
from data.text.personal import find
from data.text.words import hash_words
from data.tokenizer import open_tokenizer
from data.write_shards import build_shards
from train.recipe.preparation import Preparation, Quality, Source, SourceKind
from train.recipe.schema import Recipe, Tokenizer, TokenizerKind

pytestmark = pytest.mark.slow

FACTS = {"dataset": "any", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
SMALL = Tokenizer(TokenizerKind.bpe, 300)
ATOMS = [
    "a",
    " ",
    "\n",
    "\r\n",
    "\t",
    "=",
    "-",
    "é",
    "7",
    "中",
    "한",
    "\u0301",
    "\u0316",
    "😀",
    "_",
    "\x00",
    "'",
]
ATOMS += [
    "\u2028",
    "\u00a0",
    "\u200d",
    "the ",
    "def f(x):\n",
    "...",
    "# ",
    "…",
    "ACGT",
    "عربي ",
    "ก",
    "\u0e31",
]
ATOMS += ["<|endoftext|>", "e\u0301", "1,234.5", "/", "\\", '"', "{", "\ufeff", "\ud800", "\U0010ffff"]
SHORT, TIMES = 10_000, 8
"""Characters of a text, and how many times longer the other one is."""
MOST = 3 * TIMES
"""A step that takes the square of a text's length would take 64 times as long for 8 times the length; the
measured ratios are below 17."""
LEAST = 1e-3
"""Seconds of a step that are taken for its start; a short text may take less."""


def unit_of(rng: random.Random) -> str:
    """A few signs or words, each some times in a row: what a long text repeats."""
    return "".join(rng.choice(ATOMS) * rng.choice([1, 1, 2, 7, 50]) for _ in range(rng.randint(1, 3)))


def text_of(rng: random.Random, characters: int) -> str:
    unit = unit_of(rng)
    return unit_of(rng)[:1] + (unit * (characters // len(unit) + 1))[:characters] + unit_of(rng)[:1]


def record_of(rng: random.Random) -> bytes:
    """A line of JSON of any shape, or none at all."""
    text = text_of(rng, rng.choice([0, 1, 30, 400, 3000]))
    trees: list[Any] = [{"text": text}] * 6 + [{"text": [text]}, {"text": {"text": text}}, {"other": text}]
    trees += [text, 7, None, [], {}, {"text": None}, {"text": 1e400}, {text: text}, [[{"text": text}]]]
    lines = [json.dumps(tree).encode() for tree in trees]
    lines += [
        b"[" * 100_000,
        b'{"text": ' * 5000,
        b'{"text": ' + b"9" * 6000 + b"}",
        rng.randbytes(50),
        b"\x00" * 50,
    ]
    lines += [lines[0][: len(lines[0]) // 2], b"\xef\xbb\xbf" + lines[0], b'{"text": "\\ud83d"}']
    return rng.choice(lines).replace(b"\n", b" ")


@pytest.mark.parametrize("seed", range(3))
def test_no_record_ends_a_job(seed: int, tmp_path: Path, make_recipe: Callable[..., Recipe]):
    rng = random.Random(seed)
    lines = [record_of(rng) for _ in range(120)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    values = [text_of(rng, 300).encode("utf-8", "surrogatepass")[: rng.randint(1, 400)] for _ in range(40)]
    parquet.write_table(pa.table({"text": pa.array([*values, None], pa.binary())}), tmp_path / "b.parquet")
    sources = [
        Source(domain=domain, kind=kind, path=str(tmp_path / name), quality=quality, **FACTS)
        for domain, quality in (("prose", Quality.none), ("code", Quality.code), ("web", Quality.prose))
        for kind, name in ((SourceKind.jsonl, "a.jsonl"), (SourceKind.parquet, "b.parquet"))
    ]
    recipe = make_recipe(tmp_path / "shards", sources=sources, domains={"prose": 1.0})
    manifest = build_shards(recipe, engine=Processes(1))
    count = sum(bool(line.strip()) for line in lines) + len(values) + 1
    assert manifest.domains["prose"].splits["train"].documents > 10
    for domain in manifest.domains.values():
        assert sum(it.documents for it in domain.splits.values()) + sum(domain.rejected.values()) == count


def steps(folder: Path) -> dict[str, Callable[[str], object]]:
    """The steps that read a document's text, by name; each is to take time in proportion to its length."""
    small = train_bpe(SMALL, iter(["a few words to learn from, a few words"] * 5))
    cl100k = open_tokenizer(Tokenizer(), folder)
    # Without the optional faster encoder.
    cl100k._encode_batch = cl100k._encode_with_tiktoken
    (folder / "task.txt").write_text(
        "one two three four five six seven eight nine ten eleven twelve thirteen"
    )
    (folder / "items.txt").write_text(" ".join(f"the a = {n} e 中 7 x1" for n in range(30)))
    evaluation = EvaluationTexts((str(folder / "task.txt"),), 13)

    def filtered(quality: Quality) -> Callable[[str], object]:
        def run(text: str) -> object:
            path = folder / "one.jsonl"
            path.write_text(json.dumps({"text": text}) + "\n")
            source = Source(domain="d", kind=SourceKind.jsonl, path="", quality=quality, **FACTS)
            job = PreparationJob(folder / "work", (source,), Preparation(), (), SMALL, 32, False)
            job.file("clean", 0, "json").unlink(missing_ok=True)
            file = SourceFile(0, path.name, str(path), path.stat().st_size, 0)
            return clean(job, Chunk(0, 0, (file,), 0, file.bytes))

        return run

    return {
        **{f"filter {quality.value}": filtered(quality) for quality in Quality},
        "evaluation text": lambda text: evaluation.touches(hash_words(text)),
        "personal data": find,
        "edited items": EditedItems((str(folder / "items.txt"),), 0.3).touches,
        "learn": lambda text: train_bpe(SMALL, iter([text])),
        "encode": lambda text: small.encode_documents([text]),
        "encode with cl100k": lambda text: cl100k.encode_documents([text]),
    }


@pytest.mark.parametrize("seed", range(6))
def test_no_step_takes_more_than_its_share_of_time(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    text = (unit_of(rng) * SHORT).encode("utf-8", "ignore").decode()[:SHORT]
    for name, step in steps(tmp_path).items():
        # Of the process's own time the least of some, so that other work on the machine hardly counts.
        short, long = (min(_seconds(step, text * times) for _ in range(3)) for times in (1, TIMES))
        assert long < MOST * max(short, LEAST), f"{name} of {text[:20]!r}..."


def _seconds(step: Callable[[str], object], text: str) -> float:
    begin = time.process_time()
    step(text)
    return time.process_time() - begin
