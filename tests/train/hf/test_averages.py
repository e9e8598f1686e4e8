"""Averages of weights: of each checkpoint, and the mean of the last; opened and exported like weights."""

import json
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.checkpoint.files import Progress
from train.checkpoint.saver import CheckpointSaver
from train.hf.average_option import Average, parse_average
from train.hf.export import write_folder
from train.hf.initial_weights import freeze
from train.hf.open_decoder import open_decoder
from train.hf.weights import open_weights
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.schema import Balance, Recipe
from train.recipe.topology import Topology

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"
TINY = ["model.d_model=32", "model.n_layers=1", "model.ffn_hidden_size=32", "model.vocab_size=512"]
TINY += ["tokenizer.vocab_size=512", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.balance=bias"]
FROZEN = "transformer.wte.weight"
BIAS = "transformer.blocks.0.ffn.router.expert_bias"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A run with three checkpoints: its folder, the weights of each, and the last average."""
    recipe: Recipe = load_recipe(SMOKE, TINY)
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, average_decay=0.5))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    decoder = Decoder(recipe.model)
    initialize(decoder, recipe.model, seed=3)
    freeze(decoder, [FROZEN])
    optimizer = build_optimizer(decoder, recipe.optimizer)
    wrapped = torch.nn.ModuleDict({"decoder": decoder})  # LanguageModel's prefix.
    saver = CheckpointSaver(folder / "checkpoints", Topology(), keep_last=9)
    seen = []
    for batch in (1, 2, 3):
        for p in decoder.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        decoder.get_buffer(BIAS).fill_(float(batch))
        saver.start(wrapped, optimizer, Progress(batch, 8 * batch, 64 * batch, 1.0))
        saver.wait()
        seen.append({name: tensor.clone() for name, tensor in decoder.state_dict().items()})
    average = {
        name: optimizer.state[p]["average"] if p in optimizer.state else p.detach()
        for name, p in decoder.named_parameters()
    }
    return folder, seen, average


def test_the_mean_of_the_last_checkpoints(run: tuple[Path, list[dict[str, torch.Tensor]], object]) -> None:
    folder, seen, _ = run
    source = open_weights(folder, average=Average(2))
    assert source.path.name == "batch-00000003"
    decoder, _ = open_decoder(folder, device="cpu", average=Average(2))
    for name, tensor in decoder.state_dict().items():
        torch.testing.assert_close(tensor, (seen[1][name] + seen[2][name]) / 2, msg=name)
    assert decoder.get_buffer(BIAS).tolist() == [2.5] * 4
    middle = source.weights.read("lm_head.weight", 3, 5)
    assert torch.equal(middle, decoder.lm_head.weight[3:5])
    (folder / "checkpoints/batch-00000002/manifest.json").unlink()
    mean = open_weights(folder, average=Average(2)).weights.read("lm_head.weight")
    torch.testing.assert_close(mean, (seen[0]["lm_head.weight"] + seen[2]["lm_head.weight"]) / 2)
    with pytest.raises(
        UserError, match=r"--average: .*has 2 complete checkpoints, not 3; checkpoint.keep_last"
    ):
        open_weights(folder, average=Average(3))
    with pytest.raises(UserError, match="averages a run's newest checkpoints"):
        open_weights(folder, "batch-00000003", Average(2))


def test_the_exponential_average_of_a_checkpoint(
    run: tuple[Path, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    folder, seen, average = run
    decoder, _ = open_decoder(folder, device="cpu", average=Average(None))
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, average[name]), name
        assert torch.equal(parameter, seen[2][name]) == (name == FROZEN)
    assert decoder.get_buffer(BIAS).tolist() == [3.0] * 4
    # That of the first checkpoint is its weights.
    first = open_weights(folder, "batch-00000001", Average(None))
    assert torch.equal(first.weights.read("lm_head.weight"), seen[0]["lm_head.weight"])


def test_an_average_is_exported_and_says_so(
    run: tuple[Path, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _, average = run
    source = open_weights(folder, average=Average(None))
    assert source.model.moe is not None
    model = replace(source.model, moe=replace(source.model.moe, balance=Balance.loss))  # a bias has no family
    out = tmp_path / "out"
    write_folder(replace(source, model=model, recipe=None), out)  # the run has no tokenizer
    exported = open_weights(out).weights.read("lm_head.weight")
    assert torch.equal(exported, average["lm_head.weight"])
    assert json.loads((out / "provenance.json").read_text())["lineage"]["average"] == "ema"
    with pytest.raises(UserError, match="is not a run, so it has no average"):
        open_weights(out, average=Average(None))


def test_what_is_no_average_is_refused() -> None:
    assert parse_average("ema") == Average(None) and parse_average("last:5") == Average(5)
    for text in ("last", "last:1", "last:x", "last:-3", "ema:2", ""):
        with pytest.raises(ArgumentTypeError, match="must be ema, or last:N"):
            parse_average(text)
