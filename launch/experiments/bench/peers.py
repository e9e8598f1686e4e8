"""Peers of the benchmark: the same architecture in other libraries."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model import megablocks_ops
from train.recipe.schema import Model

# Shapes: B sequences, S tokens, D model, F expert hidden, E experts, K experts per token.

LossOf = Callable[[Tensor], Tensor]
"""Training loss of input ids [B, S], including the balance loss."""


def hugging_face_dbrx(cfg: Model) -> tuple[nn.Module, LossOf]:
    """Builds the DbrxForCausalLM of transformers, with sdpa attention and its own loss with router logits."""
    from transformers import DbrxConfig, DbrxForCausalLM

    assert cfg.moe is not None
    config = DbrxConfig(
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_layers=cfg.n_layers,
        max_seq_len=cfg.max_sequence_tokens,
        vocab_size=cfg.vocab_size,
        resid_pdrop=0.0,
        emb_pdrop=0.0,
        attn_config={"clip_qkv": cfg.clip_qkv, "kv_n_heads": cfg.n_kv_heads, "rope_theta": cfg.rope_theta},
        ffn_config={
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": cfg.ffn_hidden_size,
            "moe_num_experts": cfg.moe.experts,
            "moe_top_k": cfg.moe.top_k,
            "moe_loss_weight": cfg.moe.balance_loss_weight,
            "moe_normalize_expert_weights": cfg.moe.normalize_weights_p,
        },
        use_cache=False,
        output_router_logits=True,
        router_aux_loss_coef=cfg.moe.balance_loss_weight,
        attn_implementation="sdpa",
    )
    model = DbrxForCausalLM(config).train()
    _like_ours(model)

    def loss_of(ids_BS: Tensor) -> Tensor:
        return model(input_ids=ids_BS, labels=ids_BS).loss

    return model, loss_of


def llm_foundry_mpt(cfg: Model) -> tuple[nn.Module, LossOf]:
    """Builds LLM Foundry's MPT with `torch_dmoe`, its only mixture of experts that runs on a CPU."""
    megablocks_ops.install()
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

    assert cfg.moe is not None
    config = MPTConfig(
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_layers=cfg.n_layers,
        max_seq_len=cfg.max_sequence_tokens,
        vocab_size=cfg.vocab_size,
        no_bias=True,
        norm_type="low_precision_layernorm",
        learned_pos_emb=False,
        tie_word_embeddings=False,
        attn_config={
            "attn_type": "grouped_query_attention",
            "attn_impl": "torch",
            "kv_n_heads": cfg.n_kv_heads,
            "clip_qkv": cfg.clip_qkv,
            "rope": True,
            "rope_theta": cfg.rope_theta,
            "rope_impl": "hf",
        },
        ffn_config={
            "ffn_type": "torch_dmoe",
            "ffn_hidden_size": cfg.ffn_hidden_size,
            "ffn_act_fn": {"name": "silu"},
            "mlp_type": "glu",
            "moe_num_experts": cfg.moe.experts,
            "moe_top_k": cfg.moe.top_k,
            "moe_normalize_expert_weights": cfg.moe.normalize_weights_p,
            "moe_jitter_eps": None,
            "uniform_expert_assignment": False,
        },
        init_config={"name": "baseline_", "init_std": cfg.init_std, "init_nonlinearity": "relu"},
        use_cache=False,
    )
    model = MPTForCausalLM(config).train()

    def loss_of(ids_BS: Tensor) -> Tensor:
        logits_BSV = model(input_ids=ids_BS).logits
        return functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())

    return model, loss_of


def _like_ours(model: nn.Module) -> None:
    """Replaces Hugging Face's initialisation, which draws norm weights around 0, by one that trains."""
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
