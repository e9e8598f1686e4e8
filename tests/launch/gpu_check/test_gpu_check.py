"""The bring-up check on the CPU, and its detection of injected faults."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.gpu_check import __main__ as command
from launch.gpu_check import attention
from launch.gpu_check.attention import check_attention
from launch.gpu_check.kernels import check_kernels, relative_error
from launch.gpu_check.numerics import check_numerics
from launch.gpu_check.rows import CheckRow
from launch.gpu_check.step import check_step, gpu_of, slice_of
from launch.plan.hardware import GPUS
from launch.plan.memory import memory, states
from train.cpu import permutation
from train.model.router import Router
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Precision, Recipe
from train.recipe.tiny import tiny_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TOKENS, WIDTH = 24, 32


def failures(rows: list[CheckRow]) -> str:
    return "\n".join(f"{row.what}: {row.found} ({row.wanted})" for row in rows if not row.passed)


def small(recipe: str) -> Recipe:
    return tiny_recipe(load_recipe(ROOT / recipe), steps=3)


def test_kernels_agree_with_their_definitions() -> None:
    rows = check_kernels("cpu", TOKENS, WIDTH)
    assert len(rows) == 4 * 12 + 2 * 3
    assert failures(rows) == ""


def test_a_kernel_that_forgets_the_weights_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = permutation._weighted_sums

    def forgetful(rows: Tensor, places: Tensor, _weights: Tensor | None) -> Tensor:
        return right(rows, places, None)

    monkeypatch.setattr(permutation, "_weighted_sums", forgetful)
    found = failures(check_kernels("cpu", TOKENS, WIDTH))
    assert "scatter (float32" in found and "experts" not in found


def test_attention_agrees_and_a_mask_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(check_attention("cpu", 96, 128)) == ""
    right = attention._in_bf16
    monkeypatch.setattr(
        attention, "_in_bf16", lambda model, device, length, *_: right(model, device, length, None, None)
    )
    assert [row.passed for row in check_attention("cpu", 96, 128)] == [True] * 2 + [False] * 4


def test_a_vendors_container_without_composer_is_enough() -> None:
    absent = ("composer", "streaming", "llmfoundry", "torchmetrics", "mlflow", "transformers", "pyspark")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "import launch.experiments.bench.gpu, launch.gpu_check.attention, launch.gpu_check.kernels\n"
        "import launch.gpu_check.numerics, launch.gpu_check.step\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_not_a_number_is_never_within_a_bound() -> None:
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_numerics_agree_with_themselves_exactly_in_fp32_and_nearly_in_bf16() -> None:
    recipe = load_recipe(ROOT / "yamls/smoke.yaml")
    rows = check_numerics("cpu", recipe, (Precision.fp32, Precision.bf16))
    assert failures(rows) == ""
    exact, rounded = rows[:4], rows[4:]
    assert [row.found for row in exact] == ["0.0e+00"] * 4
    assert [row.found for row in rounded if "choices" not in row.what].count("0.0e+00") == 0


def test_numerics_find_a_router_that_differs_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, built = load_recipe(ROOT / "yamls/smoke.yaml"), []
    before = Router.__init__

    def crooked(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)  # type: ignore[arg-type]
        built.append(self)
        if len(built) > 2:  # the reference's two layers come first
            self.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.5, *inputs[1:]))

    monkeypatch.setattr(Router, "__init__", crooked)
    found = failures(check_numerics("cpu", recipe, (Precision.fp32,)))
    assert "loss" in found and "gradients" in found


def test_a_step_is_measured_and_its_states_are_the_plans() -> None:
    recipe = replace(small("yamls/dbrx-moe-a.yaml"))
    rows = check_step("cpu", recipe, GPUS["h100"], steps=3)
    assert failures(rows) == ""
    assert [row.part for row in rows] == ["memory", *["speed"] * 4]
    assert float(rows[1].found.replace(",", "")) > 0 and "planned" in rows[1].wanted


def test_states_that_the_plan_does_not_know_of_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small("yamls/dbrx-moe-a.yaml")
    known = states(recipe.model, recipe.parallelism, 1, 0, recipe.optimizer)
    more = replace(known, optimizer=known.optimizer * 2)
    monkeypatch.setattr("launch.gpu_check.step.states", lambda *_: more)
    assert "weights, gradients, optimizer" in failures(check_step("cpu", recipe, None, steps=1))


def test_the_slice_fits_and_is_the_largest() -> None:
    recipe = load_recipe(ROOT / "yamls/dbrx-moe-a.yaml")
    for gib in (24, 40, 80):
        found = slice_of(recipe, gib * 2**30)
        assert memory(found, 1).total < 0.9 * gib * 2**30
    assert slice_of(recipe, 80 * 2**30).model.n_layers > slice_of(recipe, 24 * 2**30).model.n_layers
    with pytest.raises(UserError, match="do not fit"):
        slice_of(recipe, 2**30)


def test_data_sheets_by_name() -> None:
    assert gpu_of("NVIDIA H100 80GB HBM3") is GPUS["h100"] and gpu_of("Tesla T4") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "no NVIDIA GPU" in capsys.readouterr().out


def test_a_part_that_breaks_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[CheckRow]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("train.layout.device.describe_hardware", lambda *_: "1 x GPU")

    def endless() -> list[CheckRow]:
        while True:
            time.sleep(0.01)

    fine = CheckRow("numerics", "loss", "0.0e+00", "<= 1e-05")
    all_parts = {"kernels": broken, "numerics": lambda: [fine], "memory": endless}
    monkeypatch.setattr(command, "parts", lambda: all_parts)
    monkeypatch.setattr(command, "LIMIT_SECONDS", 2)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--json", "rows.json"]) == 1
    text = re.sub(" +", " ", (tmp_path / "gpu-check.md").read_text())
    assert (
        "no kernel image" in text
        and "**FAIL**" in text
        and "| numerics | loss | 0.0e+00 | <= 1e-05 | ok |" in text
    )
    assert "TimeoutError: not done when 2 s were over" in text
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3
