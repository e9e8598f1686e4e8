"""Parity check of our decoder against transformers on exported weights.

Compares a run, a checkpoint or an imported folder with its `python -m train.hf export`; or takes a small
random model of each architecture, exports it, compares, imports and exports it again. In fp32 on the CPU;
both models must fit in memory.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train.hf.architectures import family_for
from train.hf.export import write_folder
from train.hf.folders import CONFIG_FILE
from train.hf.import_hf import import_folder
from train.hf.open_decoder import open_decoder
from train.hf.safetensors_io import TensorInfo
from train.hf.weights import WeightSource, open_weights
from train.model.decoder import Decoder
from train.model.kv_cache import CachedDecoder
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import (
    Balance,
    BalanceScope,
    Ffn,
    GroupScore,
    Latent,
    Model,
    Moe,
    Norm,
    Position,
    QkNormOver,
    Score,
    Yarn,
)
from train.record.log import get_logger, no_bars

log = get_logger(__name__)
TOLERANCE = 1e-5
"""Largest difference of a logit, absolute below 1 and relative above."""
NEW_TOKENS = 16
"""Tokens with which both models continue a text greedily."""

_DBRX = Model(
    d_model=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=96,
    vocab_size=512,
    max_sequence_tokens=128,
    clip_qkv=1.0,
    moe=Moe(experts=16, top_k=4),
)
_LLAMA = replace(_DBRX, norm=Norm.rmsnorm, clip_qkv=None, moe=None)
_MPT = replace(_DBRX, position=Position.alibi, ffn=Ffn.mlp, moe=None, n_kv_heads=4, ffn_hidden_size=256)
_QWEN3 = replace(_LLAMA, head_width=32, qk_norm=True, qk_norm_over=QkNormOver.each_head, norm_eps=1e-6)
_DOTS1 = Moe(
    experts=16,
    top_k=4,
    expert_hidden_size=24,
    shared_hidden_size=48,
    dense_layers=1,
    score=Score.sigmoid,
    weight_scale=2.5,
    groups=4,
    top_groups=2,
    balance=Balance.both,
)
_DEEPSEEK = replace(
    _LLAMA,
    n_kv_heads=4,
    latent=Latent(kv_rank=24, q_rank=40, nope_width=20, rope_width=12, v_width=16),
    norm_eps=1e-6,
    moe=_DOTS1,
)
_DEEPSEEK_V2 = replace(
    _DOTS1,
    score=Score.softmax,
    normalize_weights_p=None,
    group_score=GroupScore.max,
    weight_scale=16.0,
    balance=Balance.loss,
    balance_scope=BalanceScope.sequence,
)
SMALL_MODELS = {
    "DBRX": _DBRX,
    "DBRX, weights not normalised": replace(_DBRX, moe=Moe(experts=16, top_k=4, normalize_weights_p=None)),
    "DBRX of one expert (dense), tied": replace(_DBRX, moe=None, tie_embeddings=True),
    "LLaMA": _LLAMA,
    "LLaMA, YaRN": replace(_LLAMA, yarn=Yarn(factor=4, original_tokens=32)),
    "LLaMA, wide heads": replace(_LLAMA, head_width=24),
    "Mixtral": replace(_LLAMA, moe=Moe(experts=16, top_k=2)),
    "OLMoE": replace(_LLAMA, qk_norm=True, moe=Moe(experts=16, top_k=4, normalize_weights_p=None)),
    "MPT": replace(_MPT, tie_embeddings=True),
    "Qwen2": replace(_LLAMA, qkv_bias=True),
    "Qwen2-MoE": replace(
        _LLAMA, qkv_bias=True, moe=Moe(experts=16, top_k=4, shared_hidden_size=40, shared_gate=True)
    ),
    "Qwen3": _QWEN3,
    "Qwen3, tied, YaRN": replace(
        _QWEN3, tie_embeddings=True, yarn=Yarn(8, 16, beta_fast=4, beta_slow=0.5, attention_factor=1.1)
    ),
    "Qwen3-MoE": replace(_QWEN3, moe=Moe(experts=16, top_k=4)),
    "Qwen3-MoE, dense layers": replace(
        _QWEN3,
        n_layers=4,
        moe=Moe(experts=16, top_k=4, expert_hidden_size=24, dense_layers=1, every_n_layers=2),
    ),
    "Qwen3-MoE, weights not normalised": replace(
        _QWEN3, moe=Moe(experts=16, top_k=4, normalize_weights_p=None)
    ),
    "DeepSeek-V3": _DEEPSEEK,
    "DeepSeek-V3, YaRN": replace(_DEEPSEEK, yarn=Yarn(factor=4, original_tokens=32)),
    "DeepSeek-V3, multi-token prediction": replace(_DEEPSEEK, mtp=True),
}
"""Models with which each architecture is tested."""
NEWER_MODELS = {
    "dots.llm1": replace(_QWEN3, moe=_DOTS1),
    "dots.llm1, no groups, no bias": replace(
        _QWEN3,
        moe=replace(_DOTS1, normalize_weights_p=None, groups=1, top_groups=1, balance=Balance.loss),
    ),
    "GLM-4.5": replace(_QWEN3, moe=_DOTS1, qkv_bias=True, rope_share=0.5),
    "GLM-4.5, multi-token prediction, no bias": replace(
        _QWEN3, moe=replace(_DOTS1, balance=Balance.loss), rope_share=0.5, mtp=True
    ),
    "GLM-4.5-Air, YaRN": replace(
        _LLAMA,
        head_width=24,
        moe=replace(_DOTS1, groups=1, top_groups=1),
        qkv_bias=True,
        rope_share=0.5,
        yarn=Yarn(factor=4, original_tokens=32),
    ),
    "DeepSeek-V2, YaRN": replace(
        _DEEPSEEK, moe=_DEEPSEEK_V2, yarn=Yarn(factor=4, original_tokens=32, attention_factor=1.1)
    ),
    "DeepSeek-V2-Lite": replace(
        _DEEPSEEK,
        latent=Latent(kv_rank=24, nope_width=20, rope_width=12, v_width=16),
        moe=replace(_DEEPSEEK_V2, groups=1, top_groups=1, weight_scale=1.0),
    ),
}
"""The same, of architectures that transformers has from 4.53 (dots.llm1), 4.54 (GLM-4.5, DeepSeek-V2) on."""


@dataclass(frozen=True)
class Parity:
    """The comparison of one model."""

    model: str
    architecture: str
    largest_logit: float
    largest_difference: float
    """Between two logits."""
    excess: float
    """The largest difference relative to the tolerance for that logit."""
    same_tokens: int
    """Number of generated tokens that agree before the first that differs."""
    same_bytes: bool | None
    """True if import and export reproduced the files; None if not tested."""

    @property
    def passed(self) -> bool:
        """True if logits, tokens and files all agree."""
        return self.excess <= 1 and self.same_tokens == NEW_TOKENS and self.same_bytes is not False


def compare_all() -> Iterator[Parity]:
    """Exports, compares, imports and exports again a small random model for each architecture."""
    types = {name: family_for(model).model_type for name, model in NEWER_MODELS.items()}
    lacking = [name for name, each in types.items() if find_spec(f"transformers.models.{each}") is None]
    if lacking:
        log.info("%s: not compared, as this transformers lacks the architecture", ", ".join(lacking))
    models = SMALL_MODELS | {name: each for name, each in NEWER_MODELS.items() if name not in lacking}
    for name, model in tqdm(models.items(), desc="architectures", leave=False):
        # One bar is enough.
        with no_bars(), tempfile.TemporaryDirectory(prefix="parity-") as root:
            ours, theirs, back = (Path(root) / part for part in ("ours", "theirs", "back"))
            decoder = export_random(model, theirs)
            row = _compare(name, decoder, theirs)
            import_folder(theirs, ours)
            write_folder(open_weights(ours), back)
            files = sorted(file.name for file in theirs.glob("*.safetensors"))
            same = all((theirs / file).read_bytes() == (back / file).read_bytes() for file in files)
        yield replace(row, same_bytes=same and len(files) > 1)


def export_random(model: Model, folder: Path) -> Decoder:
    """Writes a random model as a Hugging Face folder of several files, and returns it."""
    decoder = _random_decoder(model)
    source = WeightSource(Path("random"), model, _DecoderWeights(decoder))
    write_folder(source, folder, shard_bytes=100_000)
    return decoder


def open_theirs(folder: Path) -> Any:
    """Loads a Hugging Face folder in transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    # The option for a data type is called torch_dtype before transformers 4.56, dtype from there on.
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float()


def compare(source: Path, folder: Path) -> Parity:
    """Compares our decoder with the weights of ``source`` to transformers' with those of ``folder``.

    Raises:
        UserError: if either contains no model.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: is not an export; {CONFIG_FILE} is missing")
    decoder, _ = open_decoder(source, device="cpu")
    return _compare(source.name, decoder, folder)


def _compare(name: str, decoder: Decoder, folder: Path) -> Parity:
    theirs = open_theirs(folder)
    length = min(64, decoder.cfg.max_sequence_tokens - NEW_TOKENS)
    ids_BS = torch.randint(0, decoder.cfg.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    cached, fed_BS = CachedDecoder(decoder), ids_BS[:1]
    with torch.no_grad():
        ours_BSV, theirs_BSV = decoder(ids_BS).logits_BSV, theirs(ids_BS).logits
    assert ours_BSV is not None
    for _ in range(NEW_TOKENS):
        fed_BS = cached.feed(fed_BS).argmax(-1, keepdim=True)
    difference_BSV = (theirs_BSV - ours_BSV).abs()
    generated = theirs.generate(
        ids_BS[:1],
        attention_mask=torch.ones_like(ids_BS[:1]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert cached.tokens_BN is not None
    differing = (generated != torch.cat([cached.tokens_BN, fed_BS], dim=1)).flatten().nonzero()
    return Parity(
        name,
        type(theirs).__name__,
        float(ours_BSV.abs().max()),
        float(difference_BSV.max()),
        float((difference_BSV / (TOLERANCE * ours_BSV.abs().clamp(min=1))).max()),
        int(differing[0]) - length if len(differing) else NEW_TOKENS,
        None,
    )


def _random_decoder(model: Model) -> Decoder:
    """Builds a decoder with weights large enough that every part of the model affects the logits."""
    decoder = Decoder(model, device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise / 2 if name.endswith(".bias") else 1 + noise / 10)
            else:
                parameter.copy_(noise / model.d_model**0.5)
        for bias in decoder.buffers():
            bias.copy_(torch.randn(bias.shape, generator=generator) / 10)
    return decoder


class _DecoderWeights:
    """A decoder's weights as a source of an export."""

    def __init__(self, decoder: Decoder) -> None:
        self._state = decoder.state_dict()
        self.tensors = {
            weight.name: TensorInfo(weight.name, self._state[weight.name].dtype, weight.shape)
            for weight in (*sizes.weights(decoder.cfg), *sizes.biases(decoder.cfg))
        }

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        return self._state[name][first:last]


def table(rows: list[Parity]) -> str:
    """Formats a Markdown table with one row per model."""
    lines = [
        "| model | transformers' class | largest logit | largest difference | same tokens | same bytes | |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        same = {True: "yes", False: "no", None: ""}[row.same_bytes]
        verdict = "pass" if row.passed else "FAIL"
        lines.append(
            f"| {row.model} | {row.architecture} | {row.largest_logit:.1f} | {row.largest_difference:.1e} "
            f"| {row.same_tokens} of {NEW_TOKENS} | {same} | {verdict} |"
        )
    return "\n".join(lines)
