"""Parameters that vLLM and TensorRT-LLM fill from an exported DBRX folder.

A table of each engine's parameters, with names, shapes and source tensors, by which a folder can be checked
without the engine. Taken from vLLM's `model_executor/models/dbrx.py` (its loader of 2024 with `ws` and `w2s`,
and the later one with `experts.w13_weight`) and from TensorRT-LLM's `examples/dbrx/convert_checkpoint.py`
with tensor-parallel experts. Neither engine was run.

Shapes: D d_model, F hidden size of an expert, E experts, H heads, G key-value heads, R head width,
V vocabulary, P tensor-parallel degree.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from train.hf.folders import CONFIG_FILE, model_at, read_json
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Model


@dataclass(frozen=True)
class Slot:
    """A parameter of an engine on one of P ranks."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Tensors of the folder that fill it, in their order within it."""
    copies: float = 1
    """Elements in the engine, over all ranks, per element of the sources."""


def slots(engine: str, model: Model, degree: int) -> list[Slot]:
    """Returns every parameter of an engine.

    Args:
        engine: one of :data:`ENGINES`.
        model: the model of the folder's config.
        degree: tensor-parallel degree P.

    Raises:
        UserError: if the engine cannot split the model this way, or computes another function.
    """
    moe = model.moe
    if moe is not None and moe.normalize_weights_p != 1:
        raise UserError(
            f"{engine} always divides the selected experts' weights by their sum, but this model has "
            f"model.moe.normalize_weights_p={moe.normalize_weights_p}"
        )
    for name, count in (("heads", model.n_heads), ("expert hidden size", sizes.expert_width(model))):
        if count % degree:
            raise UserError(f"{name} {count} is not divisible by tensor-parallel degree {degree}")
    if model.n_kv_heads % degree and degree % model.n_kv_heads:
        raise UserError(
            f"{model.n_kv_heads} key-value heads: degree {degree} is neither a divisor nor a multiple"
        )
    return list(ENGINES[engine](model, degree))


def check_folder(folder: Path, engine: str, degree: int) -> list[Slot]:
    """Checks that a folder fills every slot of an engine exactly, with nothing left over; returns the slots.

    Raises:
        UserError: for the first mismatch.
    """
    from train.hf.safetensors_io import SafetensorsFolder  # Imports torch, which `--help` does without.

    if read_json(folder / CONFIG_FILE).get("model_type") != "dbrx":
        raise UserError(f"{folder}: is not a DBRX model; only DBRX is supported")
    model, _ = model_at(folder)
    shapes = {name: info.shape for name, info in SafetensorsFolder(folder).tensors.items()}
    table = slots(engine, model, degree)
    unused = set(shapes)
    for slot in table:
        missing = [name for name in slot.sources if name not in shapes]
        if missing:
            raise UserError(f"{folder}: {slot.name} needs {missing[0]}, which is missing")
        given = sum(math.prod(shapes[name]) for name in slot.sources)
        if math.prod(slot.shape) * degree != round(given * slot.copies):
            raise UserError(f"{folder}: {slot.sources} do not fill {slot.name} {slot.shape} x {degree}")
        unused -= set(slot.sources)
    if unused:
        raise UserError(f"{folder}: {engine} has no place for {min(unused)}")
    return table


def _vllm(model: Model, degree: int, *, fused: bool) -> Iterator[Slot]:
    D, F, V, P = model.d_model, sizes.expert_width(model), model.vocab_size, degree
    E = model.moe.experts if model.moe else 1
    padded = -(-V // 64) * 64
    if padded % P:
        raise UserError(f"vocabulary {V}, padded to {padded}, is not divisible by degree {P}")
    vocabulary = (padded // P, D)
    yield Slot("transformer.wte.weight", vocabulary, ("transformer.wte.weight",), padded / V)
    for layer in range(model.n_layers):
        block = f"transformer.blocks.{layer}."
        yield from _vllm_attention(model, P, f"{block}norm_attn_norm.")
        router = f"{block}ffn.router.layer.weight"
        yield Slot(router, (E, D), (router,), P)
        experts = f"{block}ffn.experts." if fused else f"{block}ffn."
        gate_up, down = ("w13_weight", "w2_weight") if fused else ("ws", "w2s")
        mlp = f"{block}ffn.experts.mlp."
        yield Slot(f"{experts}{gate_up}", (E, 2 * F // P, D), (f"{mlp}w1", f"{mlp}v1"))
        yield Slot(f"{experts}{down}", (E, D, F // P), (f"{mlp}w2",))
    yield Slot("transformer.norm_f.weight", (D,), ("transformer.norm_f.weight",), P)
    yield Slot("lm_head.weight", vocabulary, ("lm_head.weight",), padded / V)


def _vllm_attention(model: Model, degree: int, prefix: str) -> Iterator[Slot]:
    D, R = model.d_model, sizes.head_width(model)
    kv_heads = max(1, model.n_kv_heads // degree)
    rows = (model.n_heads // degree + 2 * kv_heads) * R
    whole = (model.n_heads + 2 * model.n_kv_heads) * R
    qkv = f"{prefix}attn.Wqkv.weight"
    # With fewer key-value heads than ranks, each head is copied to several ranks.
    yield Slot(qkv, (rows, D), (qkv,), rows * degree / whole)
    yield Slot(
        f"{prefix}attn.out_proj.weight", (D, model.n_heads * R // degree), (f"{prefix}attn.out_proj.weight",)
    )
    for norm in ("norm_1", "norm_2"):
        yield Slot(f"{prefix}{norm}.weight", (D,), (f"{prefix}{norm}.weight",), degree)


def _tensorrt_llm(model: Model, degree: int) -> Iterator[Slot]:
    D, F, V, P = model.d_model, sizes.expert_width(model), model.vocab_size, degree
    E = model.moe.experts if model.moe else 1
    R = sizes.head_width(model)
    if model.n_kv_heads % P or V % P:
        raise UserError(f"the converter must split key-value heads and vocabulary evenly, but cannot by {P}")
    yield Slot("transformer.vocab_embedding.weight", (V, D), ("transformer.wte.weight",), P)
    for layer in range(model.n_layers):
        ours, theirs = f"transformer.blocks.{layer}.", f"transformer.layers.{layer}."
        attn, mlp = f"{ours}norm_attn_norm.attn.", f"{ours}ffn.experts.mlp."
        rows = (model.n_heads + 2 * model.n_kv_heads) * R // P
        yield Slot(f"{theirs}attention.qkv.weight", (rows, D), (f"{attn}Wqkv.weight",))
        yield Slot(
            f"{theirs}attention.dense.weight", (D, model.n_heads * R // P), (f"{attn}out_proj.weight",)
        )
        for name, norm in (("input_layernorm", "norm_1"), ("post_layernorm", "norm_2")):
            yield Slot(f"{theirs}{name}.weight", (D,), (f"{ours}norm_attn_norm.{norm}.weight",), P)
        yield Slot(f"{theirs}mlp.experts_weight_1", (E, 2 * F // P, D), (f"{mlp}v1", f"{mlp}w1"))
        yield Slot(f"{theirs}mlp.experts_weight_2", (E, D, F // P), (f"{mlp}w2",))
        yield Slot(f"{theirs}mlp.router.weight", (E, D), (f"{ours}ffn.router.layer.weight",), P)
    yield Slot("transformer.ln_f.weight", (D,), ("transformer.norm_f.weight",), P)
    yield Slot("lm_head.weight", (V // P, D), ("lm_head.weight",))


ENGINES: dict[str, Callable[[Model, int], Iterator[Slot]]] = {
    "vllm": lambda model, degree: _vllm(model, degree, fused=True),
    "vllm-2024": lambda model, degree: _vllm(model, degree, fused=False),
    "tensorrt-llm": _tensorrt_llm,
}
