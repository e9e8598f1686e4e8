"""An export of one environment is the same model in the other's transformers, in both directions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.train.hf.other_stack import all_logits, export_all
from train.hf.check import SMALL_MODELS, TOLERANCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENTS = {".venv": "make install", ".venv-minimum": "make install STACK=minimum"}


def other_python() -> Path:
    """Returns the Python of an environment of this checkout in which this test does not run."""
    here = Path(sys.prefix).resolve()
    others = [name for name in ENVIRONMENTS if (ROOT / name).resolve() != here]
    for name in others:
        if (ROOT / name / "bin/python").exists():
            return ROOT / name / "bin/python"
    pytest.skip(f"{others[0]} is missing; `{ENVIRONMENTS[others[0]]}` makes it")


def test_an_export_is_the_same_model_in_the_other_environment(tmp_path: Path) -> None:
    python, here, there, logits = other_python(), tmp_path / "here", tmp_path / "there", tmp_path / "logits"
    export_all(here)
    done = subprocess.run(
        [python, "-m", "tests.train.hf.other_stack", here, there, logits],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version = done.stdout.split()[-1]
    if version == transformers.__version__:
        pytest.skip(f"{python} has transformers {version} too")
    theirs, ours = load_file(logits), all_logits(here, there)
    assert theirs.keys() == ours.keys() and len(ours) == 2 * len(SMALL_MODELS)
    for name, expected in ours.items():
        torch.testing.assert_close(theirs[name], expected, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
        assert expected.std() > 0.1, "logits this small would agree whatever the weights"
