"""Initial weights depend only on seed, name and index, whatever rows a rank holds."""

import itertools
from dataclasses import replace

import pytest
import torch

from train.model import init
from train.model.decoder import Decoder
from train.model.init import fill_rows, initialize
from train.recipe.schema import Balance, Ffn, Model, Moe

CFG = Model(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    ffn_hidden_size=40,
    vocab_size=300,
    max_sequence_tokens=16,
    moe=Moe(experts=4, top_k=2, balance=Balance.bias),
)


def make(cfg: Model = CFG, seed: int = 17) -> dict[str, torch.Tensor]:
    model = Decoder(cfg, device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    initialize(model, cfg, seed)
    return model.state_dict()


@pytest.mark.parametrize("block_rows", [4096, 64])
def test_slices_equal_the_whole(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK_ROWS", block_rows)
    for name, whole in make().items():
        if name.endswith("expert_bias"):
            continue
        rows = whole.shape[0]
        # Splits at experts, within experts, within blocks of 64, and of a single row.
        cuts = sorted({0, rows, min(rows, 39), min(rows, 40), min(rows, 64), min(rows, 71), rows // 2})
        for first, end in itertools.pairwise(cuts):
            part = torch.full_like(whole[first:end], torch.nan)
            fill_rows(name, part, first_row=first, total_rows=rows, cfg=CFG, seed=17)
            assert torch.equal(part, whole[first:end]), (name, first, end)


def test_every_value_is_set_to_its_distribution() -> None:
    state = make()
    for name, tensor in state.items():
        if "norm_1" in name or "norm_2" in name or "norm_f" in name:
            assert torch.all(tensor == 1)
        elif name.endswith("expert_bias"):
            assert torch.all(tensor == 0)
        else:
            residual = name.endswith(("out_proj.weight", "mlp.w2"))
            std = CFG.init_std / (2.0 if residual else 1.0)  # sqrt(2 * 2 layers)
            sigmas = 4 / tensor.numel() ** 0.5
            assert tensor.std().item() == pytest.approx(std, rel=sigmas), name
            assert abs(tensor.mean().item()) < sigmas * std, name


@pytest.mark.parametrize("ffn", Ffn)
def test_dense_residual_projections_are_drawn_smaller(ffn: Ffn) -> None:
    state = make(replace(CFG, moe=None, ffn=ffn, tie_embeddings=True))
    assert "lm_head.weight" not in state
    assert state["transformer.blocks.0.ffn.w2.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert state["transformer.blocks.0.ffn.w1.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_weights_differ_by_name_expert_and_seed_and_by_nothing_else() -> None:
    state, again, other = make(), make(), make(seed=18)
    seen = set()
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
        if tensor.ndim == 2:
            assert not torch.equal(tensor, other[name])
            blocks = tensor.split(CFG.ffn_hidden_size) if "experts" in name else [tensor]
            seen |= {float(block.abs().sum()) for block in blocks}
    experts = 3 * CFG.n_layers * 4
    matrices = sum(t.ndim == 2 for t in state.values())
    assert len(seen) == matrices - 3 * CFG.n_layers + experts
