"""Our decoder and Hugging Face's DBRX with the same weights: equal logits, gradients and generated tokens."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe.schema import Model, Moe


def random_config(seed: int) -> Model:
    draw = random.Random(seed)
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    experts = draw.choice([4, 8, 16])
    return Model(
        d_model=kv_heads * group * 16,
        n_layers=draw.choice([1, 2, 3]),
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        ffn_hidden_size=draw.choice([32, 56]),
        vocab_size=draw.choice([97, 128]),
        max_sequence_tokens=64,
        rope_theta=draw.choice([1e4, 5e5]),
        clip_qkv=draw.choice([0.3, 0.5]),
        init_std=0.15,
        moe=Moe(
            experts=experts,
            top_k=draw.choice([1, 2, 4]),
            normalize_weights_p=draw.choice([1.0, 2.0, None]),
        ),
    )


def both(cfg: Model) -> tuple[Decoder, Any]:
    from transformers import DbrxConfig, DbrxForCausalLM

    assert cfg.moe is not None
    ours = Decoder(cfg, device="cpu")
    initialize(ours, cfg, seed=3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm_" in name:  # Norms of 1 would hide a missing weight.
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
                parameter.add_(noise, alpha=0.2)
    config = DbrxConfig(
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_layers=cfg.n_layers,
        max_seq_len=cfg.max_sequence_tokens,
        vocab_size=cfg.vocab_size,
        attn_config={"kv_n_heads": cfg.n_kv_heads, "rope_theta": cfg.rope_theta, "clip_qkv": cfg.clip_qkv},
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},  # From transformers 5 on.
        ffn_config={
            "ffn_hidden_size": cfg.ffn_hidden_size,
            "moe_num_experts": cfg.moe.experts,
            "moe_top_k": cfg.moe.top_k,
            "moe_normalize_expert_weights": cfg.moe.normalize_weights_p,
        },
        attn_implementation="sdpa",
    )
    theirs = DbrxForCausalLM(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("seed", range(8))
def test_logits_gradients_and_greedy_tokens_are_equal(seed: int) -> None:
    cfg = random_config(seed)
    ours, theirs = both(cfg)
    ids = torch.randint(0, cfg.vocab_size, (2, 33), generator=torch.Generator().manual_seed(seed))
    expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours(ids).logits_BSV, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1, "near-zero logits would be equal whatever the model"

    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    out = ours(ids, None, targets)
    (out.loss_sum / out.target_tokens).backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, their_grads[name], rtol=1e-3, atol=1e-5, msg=name)

    generated = theirs.generate(ids[:1, :5], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy(ours, ids[:1, :5], generated.shape[1]), generated)


def test_clipping_is_active() -> None:
    cfg = random_config(0)
    ours, _ = both(cfg)
    seen: list[Tensor] = []
    hook = ours.transformer.blocks[0].norm_attn_norm.attn.Wqkv.register_forward_hook(
        lambda _module, _inputs, qkv: seen.append(qkv)
    )
    ours(torch.arange(20)[None])
    hook.remove()
    assert cfg.clip_qkv is not None
    assert (seen[0].abs() > cfg.clip_qkv).float().mean() > 0.1


@torch.no_grad()
def greedy(model: Decoder, ids_BS: Tensor, length: int) -> Tensor:
    while ids_BS.shape[1] < length:
        logits_BSV = model(ids_BS).logits_BSV
        assert logits_BSV is not None
        ids_BS = torch.cat([ids_BS, logits_BSV[:, -1:].argmax(dim=-1)], dim=1)
    return ids_BS
