"""Upcycling: the mixture's loss equals the dense model's, then its experts diverge."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.hf.__main__ import main
from train.hf.folders import read_model
from train.hf.initial_weights import load_initial_weights
from train.hf.weights import open_weights
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.recipe.reading import load_recipe
from train.recipe.schema import Balance, Model, Optimizer, Recipe

pytestmark = pytest.mark.slow

MakeRun = Callable[[Recipe], tuple[Path, Decoder]]

DENSE = Model(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=96,
    vocab_size=300,
    max_sequence_tokens=64,
    clip_qkv=8,
)


@pytest.fixture
def dense(make_run: MakeRun) -> tuple[Path, Decoder]:
    base = load_recipe(Path(__file__).parents[3] / "yamls" / "smoke.yaml")
    return make_run(replace(base, name="dense", model=DENSE))


def _loss(decoder: Decoder) -> torch.Tensor:
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    output = decoder(ids[:, :-1], targets_BS=ids[:, 1:])
    loss: torch.Tensor = output.loss_sum / output.target_tokens
    return loss


@pytest.mark.parametrize(
    ("experts", "top_k", "granularity", "shared", "balance"),
    [
        *((4, 1, 1, 0, "loss"), (4, 2, 1, 0, "bias"), (16, 4, 4, 0, "loss")),
        *((12, 6, 3, 0, "loss"), (8, 8, 2, 0, "bias"), (12, 3, 4, 1, "loss"), (15, 10, 8, 3, "bias")),
    ],
)
def test_the_mixture_computes_what_the_dense_model_does(
    experts: int, top_k: int, granularity: int, shared: int, balance: str, dense: tuple[Path, Decoder]
) -> None:
    run, decoder = dense
    out = run / "mixture"
    numbers = ["--experts", str(experts), "--top-k", str(top_k), "--granularity", str(granularity)]
    numbers += ["--shared", str(shared)] if shared else []
    assert main(["upcycle", str(run), str(out), *numbers, "--balance", balance]) == 0
    model = read_model(out / "model.yaml")
    assert model.moe is not None and (model.moe.experts, model.moe.top_k) == (experts, top_k)
    assert model.moe.balance is Balance(balance) and model.ffn_hidden_size == 96 // granularity
    mixture = Decoder(model, device="cpu")
    for buffer in mixture.buffers():
        buffer.zero_()
    load_initial_weights(mixture, out)
    expected = _loss(decoder)
    torch.testing.assert_close(_loss(mixture), expected, atol=1e-5, rtol=1e-6)
    ids = torch.randint(0, 300, (4, 32))
    torch.testing.assert_close(mixture(ids).logits_BSV, decoder(ids).logits_BSV, atol=1e-5, rtol=1e-5)
    assert model.moe.shared_hidden_size == (shared * 96 // granularity or None)
    chosen = mixture(ids).expert_tokens_LE
    whole_copies = chosen.view(2, -1, granularity - shared)
    assert (whole_copies == whole_copies[:, :, :1]).all(), "copies are selected whole"
    assert (chosen.sum(1) == 4 * 32 * top_k).all()


def test_experts_part_in_training(dense: tuple[Path, Decoder]) -> None:
    run, _ = dense
    assert (
        main(
            [
                "upcycle",
                str(run),
                str(run / "mixture"),
                "--experts",
                "8",
                "--top-k",
                "2",
                "--granularity",
                "2",
            ]
        )
        == 0
    )
    mixture = Decoder(read_model(run / "mixture" / "model.yaml"), device="cpu")
    load_initial_weights(mixture, run / "mixture")
    optimizer = build_optimizer(mixture, Optimizer(learning_rate=1e-2))
    before = _loss(mixture).item()
    for _ in range(3):
        optimizer.zero_grad()
        _loss(mixture).backward()
        optimizer.step()
    assert _loss(mixture).item() < before
    router = mixture.get_parameter("transformer.blocks.0.ffn.router.layer.weight").detach()
    assert not torch.equal(router[0], router[1]), "slices of a copy may diverge"
    w1 = mixture.get_parameter("transformer.blocks.0.ffn.experts.mlp.w1").detach().view(4, 2, 48, 32)
    assert not torch.equal(w1[0], w1[1])


def test_what_does_not_divide_is_a_line(
    dense: tuple[Path, Decoder], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = dense
    for numbers, words in (
        (["--experts", "6", "--granularity", "4"], "experts 6 is not divisible by granularity 4"),
        (["--top-k", "3", "--granularity", "2"], "top-k 3 is not divisible"),
        (["--experts", "5", "--top-k", "5", "--granularity", "5"], "hidden size 96 is not divisible"),
        (["--experts", "2", "--top-k", "4"], "top-k 4 exceeds 2 experts"),
        (["--granularity", "4", "--shared", "4"], "4 shared slices leave none of granularity 4"),
        (
            ["--granularity", "4", "--shared", "1"],
            "experts 16 is not divisible by granularity 4 less 1 shared",
        ),
    ):
        assert main(["upcycle", str(run), str(run / "out"), *numbers]) == 2
        complaint = capsys.readouterr().err.strip().splitlines()[-1]
        assert complaint.startswith("upcycle: ") and words in complaint
    assert main(["upcycle", str(run), str(run / "once"), "--experts", "4"]) == 0
    assert main(["upcycle", str(run / "once"), str(run / "twice"), "--experts", "4"]) == 2
    assert "already" in capsys.readouterr().err


def test_bf16_sources_stay_bf16(dense: tuple[Path, Decoder]) -> None:
    from train.hf.export import write_folder

    run, _ = dense
    source = open_weights(run)
    write_folder(replace(source, recipe=None), run / "hf", torch.bfloat16)
    assert main(["upcycle", str(run / "hf"), str(run / "mixture"), "--experts", "8", "--top-k", "4"]) == 0
    mixture = open_weights(run / "mixture")
    assert {info.dtype for info in mixture.weights.tensors.values()} == {torch.bfloat16}
    w2 = "transformer.blocks.1.ffn.{}w2"
    copies = mixture.weights.read(w2.format("experts.mlp.")).view(8, 96, 32)
    expected = source.weights.read(w2.format("") + ".weight").t().bfloat16()
    assert all(torch.equal(copy, expected) for copy in copies)
