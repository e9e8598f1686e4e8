"""Compiled layers and models compute what uncompiled ones do, in one graph; evaluation is not compiled."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from train.model.compiling import compile_decoder
from train.model.decoder import Decoder
from train.model.experts import HAS_GROUPED_MM
from train.model.init import initialize
from train.model.router import Jitter, Router
from train.model.router_noise import noise_key
from train.recipe.schema import Compile, Model, Moe, Recompute

pytestmark = pytest.mark.skipif(
    not HAS_GROUPED_MM, reason="torch before 2.10 has no grouped product: `training.compile` is refused"
)

# Traced and differentiated as for any device, but not made into C++, which takes minutes.
BACKEND = "aot_eager"
MODEL = Model(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=16,
    vocab_size=64,
    max_sequence_tokens=32,
    clip_qkv=8.0,
    moe=Moe(experts=8, top_k=2, jitter_eps=0.1),
)
B, S = 2, 32


def make(recompute: Recompute) -> Decoder:
    decoder = Decoder(MODEL, device="cpu", recompute=recompute, loss_chunk_tokens=24)
    initialize(decoder, MODEL, seed=1)
    for layer, router in enumerate(module for module in decoder.modules() if isinstance(module, Router)):
        router.jitter = Jitter(noise_key(1, layer, torch.device("cpu")), torch.arange(B))
    return decoder


def losses(decoder: Decoder, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, MODEL.vocab_size, (B, S), generator=generator) for _ in range(2))
    targets[:, 5] = -100
    out = decoder(ids, (torch.arange(S) // 10).expand(B, S), targets)
    return out.loss_sum / (B * S) + out.balance_loss + 0.1 * out.z_loss


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compile_for_real(*args, **kw, backend=BACKEND))
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "recompute"), [(Compile.blocks, Recompute.layer), (Compile.model, Recompute.nothing)]
)
def test_compiled_equals_plain_in_one_graph(how: Compile, recompute: Recompute, traced: None) -> None:
    plain, compiled = make(recompute), make(recompute)
    compile_decoder(compiled, how, is_sharded=False)
    for seed in range(3):  # Other tokens, other counts per expert: nothing is compiled again.
        pair = [losses(decoder, seed) for decoder in (plain, compiled)]
        for decoder, loss in zip((plain, compiled), pair, strict=True):
            decoder.zero_grad()
            loss.backward()
        torch.testing.assert_close(*pair)
        for (name, parameter), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None
            error = (parameter.grad - other.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-5, name
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_evaluation_is_not_compiled_and_names_stay(traced: None) -> None:
    plain, compiled = make(Recompute.nothing), make(Recompute.nothing)
    compile_decoder(compiled, Compile.blocks, is_sharded=False)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    ids = torch.arange(7)[None]
    assert torch.equal(plain.eval()(ids).logits_BSV, compiled.eval()(ids).logits_BSV)
    assert not counters["stats"]
