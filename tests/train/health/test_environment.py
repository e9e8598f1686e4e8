"""The environment that a rank sets itself where its launcher did not."""

import os
import subprocess
import sys
from pathlib import Path

from train.health.environment import TABLE, set_defaults
from train.recipe.topology import Topology, usable_cores

ROOT = Path(__file__).resolve().parents[3]


def defaults(ranks: int, *, has_gpu: bool, **given: str) -> dict[str, str]:
    variables = dict(given)
    set_defaults(Topology(0, ranks, 0, ranks), variables, has_gpu=has_gpu)
    return variables


def test_ranks_on_gpus_get_the_table_and_the_users_own_variables_hold() -> None:
    found = defaults(8, has_gpu=True, NCCL_DEBUG="INFO")
    table = {v.name: v.value for v in TABLE if v.device in (None, "cuda")}
    kept = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": str(max(1, min(8, usable_cores() // 8)))}
    assert found.pop("TRITON_CACHE_DIR").startswith("/")
    assert found == table | kept


def test_ranks_on_cpus_share_the_cores_and_one_process_keeps_them() -> None:
    assert defaults(2, has_gpu=False)["OMP_NUM_THREADS"] == "1"
    alone = defaults(1, has_gpu=False)
    assert "OMP_NUM_THREADS" not in alone and "HF_HUB_OFFLINE" not in alone
    assert not any("NCCL" in name or "CUDA" in name for name in alone)


def test_the_main_job_sets_them_before_torch_is_imported() -> None:
    """The run itself is replaced by a look at what it would find."""
    code = (
        "import os, runpy, sys, types\n"
        "seen = types.ModuleType('train.run')\n"
        "seen.run = lambda *_: print(os.environ['PYTHONFAULTHANDLER'], 'torch' in sys.modules) or 0\n"
        "sys.modules['train.run'] = seen\n"
        "sys.argv = ['train/main.py', 'yamls/smoke.yaml']\n"
        "runpy.run_path('train/main.py', run_name='__main__')"
    )
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("\n1 False\n"), done.stderr
