"""Memory of a process that prepares whole-file compressed inputs does not grow with their text."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
BUILD = """
import gzip, json, random, resource, sys
from pathlib import Path
from data.text import build, mds
from data.text.engines import Processes
from data.write_shards import build_shards
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import Data, Recipe, Tokenizer, TokenizerKind

folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
build.BPE_TEXT_BYTES = mds.SHARD_BYTES = 2_000_000
random.seed(5)
words = [f"{a}{b}" for a in "bcdfghjk" for b in ("alt", "orn", "ink", "ust")]
with gzip.open(folder / "in.jsonl.gz", "wt", 1) as file:
    for _ in range(megabytes * 50):
        text = " ".join(random.choices(words, k=4000))
        file.write(json.dumps({"text": text}) + "\\n")
source = Source("code", SourceKind.jsonl, str(folder / "in.jsonl.gz"), dataset="d", version="1", origin="o",
                licence="l")
data = Data(shards=str(folder / "shards"), domains={"code": 1.0}, sequence_tokens=512, sources=[source],
            preparation=Preparation(near_duplicates=None))
recipe = Recipe(tokenizer=Tokenizer(TokenizerKind.bpe, 300), data=data)
build_shards(recipe, engine=Processes(1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kilobytes(folder: Path, megabytes: int) -> int:
    """The most memory of a process that builds shards from one compressed file of so much text."""
    folder.mkdir()
    command = [sys.executable, "-c", BUILD, str(folder), str(megabytes)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ended.stdout.split()[-1])


def test_memory_does_not_grow_with_a_compressed_file(tmp_path: Path) -> None:
    """Beyond a batch of texts, which both files fill; 5 to 6 times the text where a stage holds it all."""
    small, large = (peak_kilobytes(tmp_path / str(it), it) for it in (15, 40))
    assert large - small < 25_000, (small, large)
