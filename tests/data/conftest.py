"""A small corpus of two domains, with shards built once for all tests in this folder."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data.text.engines import Spark
from data.text.installed import CorpusDocument
from data.write_shards import build_shards
from train.recipe.schema import Data, Recipe, Tokenizer, TokenizerKind, Training

WORDS = [
    *("the", "be", "to", "of", "and", "that", "have", "with", "cat", "saw", "ran", "red", "sea", "old"),
    *("<|endoftext|>", "naïve", "中文", "x1", "(y)", "\n"),
]


def small_documents() -> Iterator[CorpusDocument]:
    """60 distinct documents per domain, of 5 to 150 words."""
    for domain, seed in (("code", 1), ("prose", 2)):
        rng = np.random.default_rng(seed)
        for number in range(60):
            words = rng.choice(WORDS, rng.integers(5, 150))
            yield CorpusDocument(
                domain, f"{domain}/{number}.txt", f"{domain} {number}: " + " ".join(words) + "\n"
            )


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """Returns a recipe over small shards; keywords override its data section."""

    def make(shards: Path, **changes: object) -> Recipe:
        data = Data(
            shards=str(shards),
            domains={"prose": 0.3, "code": 0.7},
            sequence_tokens=32,
            validation_sequences=5,
            workers=0,
        )
        return Recipe(
            name="small",
            seed=11,
            tokenizer=Tokenizer(TokenizerKind.bpe, 300),
            data=dataclasses.replace(data, **changes),  # type: ignore[arg-type]
            training=Training(duration_tokens=10_000, global_batch_sequences=8, microbatch_sequences=2),
        )

    return make


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Recipe:
    """The recipe of existing shards, which must not be changed."""
    recipe = make_recipe(tmp_path_factory.mktemp("data") / "shards")
    build_shards(recipe, documents=small_documents)
    return recipe


@pytest.fixture(scope="session")
def spark() -> Iterator[Spark]:
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    engine = Spark(2)
    yield engine
    engine.stop()
