"""Times of datatrove's stages, in an interpreter that has it, for :mod:`launch.experiments.bench.stages`.

It imports nothing of ours: datatrove and this framework need not fit into one environment.

"""

import json
import sys
import tempfile
import time
from pathlib import Path


def main(path: str) -> None:
    """Reads texts, then runs the stage that each line of the input names, and prints its seconds.

    Args:
        path: a file of texts, a JSON string a line.
    """
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    with Path(path).open() as lines:
        texts = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        minhash = MinhashDedupSignature(folder)
        quality, repetition = GopherQualityFilter(), GopherRepetitionFilter()
        stages = {
            "MinHash": lambda text: minhash.get_signature(minhash.get_shingles(text)),
            "quality": lambda text: quality.filter(Document(text, "")),
            "repetition": lambda text: repetition.filter(Document(text, "")),
        }
        for line in sys.stdin:
            stage, start = stages[line.strip()], time.process_time()
            for text in texts:
                stage(text)
            print(time.process_time() - start, flush=True)
