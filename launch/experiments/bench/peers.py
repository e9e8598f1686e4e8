"""Peers of the benchmark: the same architecture in other libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model import megablocks_ops
from train.recipe.schema import Model

# Shapes: B sequences, S tokens, D model, F expert hidden, E experts, K experts per token.

LossOf = Callable[[Tensor], Tensor]
"""Training loss of input ids [B, S], including the balance loss."""


def hugging_face_dbrx(cfg: Model) -> tuple[nn.Module, LossOf]:
    """Builds the DbrxForCausalLM of transformers, with sdpa attention and its own loss.

    Its balance loss is included where it works: transformers 5 records no router logits of this model.
    """
    from transformers import DbrxConfig, DbrxForCausalLM, __version__

    assert cfg.moe is not None
    # transformers 4 reads rope_theta from the attention's settings, 5 reads rope_parameters.
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    config = DbrxConfig(
        rope_parameters=rope,
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
        output_router_logits=__version__ < "5",
        router_aux_loss_coef=cfg.moe.balance_loss_weight,
        attn_implementation="sdpa",
    )
    return _trained_by_its_own_loss(DbrxForCausalLM(config))


def hugging_face_mixtral(cfg: Model) -> tuple[nn.Module, LossOf]:
    """Builds the MixtralForCausalLM of transformers 5 with as many experts, run by torch's grouped product.

    DBRX in transformers 5 still loops over experts; this is the fastest that the library has. It differs from
    our model in what costs next to nothing: RMSNorm, and no clipping.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    assert cfg.moe is not None
    config = MixtralConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.ffn_hidden_size,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        max_position_embeddings=cfg.max_sequence_tokens,
        num_local_experts=cfg.moe.experts,
        num_experts_per_tok=cfg.moe.top_k,
        output_router_logits=True,
        router_aux_loss_coef=cfg.moe.balance_loss_weight,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    return _trained_by_its_own_loss(MixtralForCausalLM(config))


def _trained_by_its_own_loss(model: nn.Module) -> tuple[nn.Module, LossOf]:
    """Draws weights as ours are, since Hugging Face's initialisation draws norms around 0."""
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)

    def loss_of(ids_BS: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids_BS, labels=ids_BS).loss
        return loss

    return model.train(), loss_of


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


TORCHTITAN = "torchtitan==0.3.0 spmd-types==0.2.3 tyro docstring-parser typeguard shtab"
"""torchtitan and what its MoE layer imports; no part of any lock, since nothing else uses them."""


def torchtitan_moe(cfg: Model) -> nn.Module:
    """Builds torchtitan's MoE layer: softmax over the chosen scores' sum, no balance bias, no shared expert.

    Raises:
        ModuleNotFoundError: if it is not installed; see :data:`TORCHTITAN`.
    """
    from torchtitan.models.common import config_utils as configs

    assert cfg.moe is not None
    sizes = {"dim": cfg.d_model, "num_experts": cfg.moe.experts, "top_k": cfg.moe.top_k}
    layer: nn.Module = configs.make_moe_config(
        num_experts=cfg.moe.experts,
        router=configs.make_router_config(
            **sizes, gate_param_init={}, score_func="softmax", route_norm=cfg.moe.normalize_weights_p == 1
        ),
        routed_experts=configs.make_routed_experts_config(
            **sizes, hidden_dim=cfg.ffn_hidden_size, param_init={}, comm_backend="standard"
        ),
        load_balance_coeff=None,
    ).build()
    return layer


@contextmanager
def experts_in_fp32(wanted: bool) -> Iterator[None]:
    """Leaves out torchtitan's cast of experts to bf16, which it makes in every precision."""
    if not wanted:
        yield
        return
    with mock.patch.object(Tensor, "bfloat16", lambda tensor: tensor):
        yield
