"""Recipes of LLM Foundry (YAML) and torchtitan (TOML) in our keys, as far as they have a counterpart here.

Translated is what trains the same model: widths, batch, optimizer, schedule, length. Whatever is left over is
named with its value, so that nothing is lost without a word. Neither framework is imported.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from train.recipe.aliases import FOUNDRY, TITAN, origin_of
from train.recipe.errors import UserError

Tree = dict[str, Any]


@dataclass
class Translation:
    """A recipe in our keys, and what of the other one has no counterpart."""

    origin: str
    keys: Tree = field(default_factory=dict)
    """By dotted name."""
    notes: list[str] = field(default_factory=list)
    """Assumptions and omissions, a line each."""

    def nested(self) -> Tree:
        """Returns the keys as nested mappings."""
        tree: Tree = {}
        for key, value in self.keys.items():
            *sections, leaf = key.split(".")
            at = tree
            for section in sections:
                at = at.setdefault(section, {})
            at[leaf] = value
        return tree


class Leaves:
    """The values of a recipe, taken one by one; what is not taken is left over."""

    def __init__(self, tree: Tree) -> None:
        self.left = dict(_flat(tree))

    def take(self, *names: str) -> Any:
        """Returns the first of these keys that is there and not null, and takes all of them."""
        found = [self.left.pop(name) for name in names if name in self.left]
        return next((value for value in found if value is not None), None)


def translate(tree: Tree, name: str) -> Translation:
    """Translates a recipe.

    Args:
        tree: the file's content.
        name: the run's name, if the file has none.

    Raises:
        UserError: if it is a recipe of neither, or a value is of another type than theirs.
    """
    leaves = Leaves(tree)
    makers = {FOUNDRY: _foundry, TITAN: _titan}
    origin = origin_of(tree)
    if origin not in makers:
        raise UserError("is a recipe of neither LLM Foundry nor torchtitan")
    try:
        found = makers[origin](leaves)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise UserError(
            f"has a value that {origin} does not take ({error})",
            remedy="correct it; its schema has the types",
        ) from None
    found.keys = {"name": found.keys.pop("name", None) or name} | {
        key: value for key, value in found.keys.items() if value is not None
    }
    found.notes += [
        f"not translated: {key}: {value}" for key, value in leaves.left.items() if value not in (None, {}, [])
    ]
    return found


def _foundry(leaves: Leaves) -> Translation:
    found = Translation(FOUNDRY)
    length = leaves.take("max_seq_len", "variables.max_seq_len", "train_loader.dataset.max_seq_len")
    leaves.take("model.max_seq_len", "eval_loader.dataset.max_seq_len", "tokenizer.kwargs.model_max_length")
    batch = leaves.take("global_train_batch_size", "variables.global_train_batch_size")
    for key, value in (("max_seq_len", length), ("global_train_batch_size", batch)):
        if not isinstance(value, int | None):  # A text times a number would be a long text.
            raise TypeError(f"{key} is {value!r}")
    found.keys |= {
        "name": leaves.take("run_name", "variables.run_name"),
        "seed": leaves.take("seed", "variables.global_seed", "train_loader.dataset.shuffle_seed"),
        "runs_dir": leaves.take("save_folder"),
    }
    _foundry_model(leaves, found, length)
    _foundry_optimizer(leaves, found)
    duration = _tokens(leaves.take("max_duration"), batch, length, "max_duration", found)
    every = leaves.take("save_interval")
    precision = str(leaves.take("precision") or "")
    found.keys |= {
        "data.sequence_tokens": length,
        "data.shards": leaves.take("train_loader.dataset.local", "variables.data_local"),
        "data.remote": leaves.take("train_loader.dataset.remote", "variables.data_remote"),
        "data.workers": leaves.take("train_loader.num_workers"),
        "training.duration_tokens": duration,
        "training.global_batch_sequences": batch,
        "training.microbatch_sequences": _microbatch(leaves.take("device_train_microbatch_size"), found),
        "training.clip_norm": leaves.take("algorithms.gradient_clipping.clipping_threshold"),
        "training.precision": {"amp_bf16": "bf16", "fp32": "fp32"}.get(precision),
        "training.recompute": "layer" if leaves.take("fsdp_config.activation_checkpointing") else "nothing",
        "schedule.kind": _scheduler(leaves.take("scheduler.name"), found),
        "schedule.warmup_tokens": _tokens(
            leaves.take("scheduler.t_warmup"), batch, length, "t_warmup", found
        ),
        "schedule.final_share": leaves.take("scheduler.alpha_f"),
        "checkpoint.interval_batches": _batches(every, "save_interval", found),
        "checkpoint.keep_last": _positive(leaves.take("save_num_checkpoints_to_keep")),
        "evaluation.interval_batches": _batches(leaves.take("eval_interval"), "eval_interval", found),
    }
    found.notes.append(
        "data: name your domains and their shares in data.domains; see docs/data.md for shards"
    )
    return found


def _foundry_model(leaves: Leaves, found: Translation, length: int | None) -> None:
    width = leaves.take("model.d_model")
    heads = leaves.take("model.n_heads")
    ffn = str(leaves.take("model.ffn_config.ffn_type") or "mptmlp")
    ratio, hidden = leaves.take("model.expansion_ratio"), leaves.take("model.ffn_config.ffn_hidden_size")
    norm = str(leaves.take("model.norm_type") or "low_precision_layernorm")
    has_rope, has_alibi = leaves.take("model.attn_config.rope"), leaves.take("model.attn_config.alibi")
    found.keys |= {
        "model.d_model": width,
        "model.n_layers": leaves.take("model.n_layers"),
        "model.n_heads": heads,
        "model.n_kv_heads": leaves.take("model.attn_config.kv_n_heads") or heads,
        "model.ffn_hidden_size": hidden or (int((ratio or 4) * width) if width else None),
        "model.vocab_size": leaves.take("model.vocab_size"),
        "model.max_sequence_tokens": length,
        "model.ffn": "mlp" if ffn == "mptmlp" else "glu",
        "model.norm": "rmsnorm" if "rmsnorm" in norm else "layernorm",
        "model.norm_eps": leaves.take("model.norm_eps"),
        "model.clip_qkv": leaves.take("model.attn_config.clip_qkv"),
        "model.rope_theta": leaves.take("model.attn_config.rope_theta") if has_rope else None,
        "model.tie_embeddings": leaves.take("model.tie_word_embeddings") is not False,
        "model.init_std": leaves.take("model.init_config.init_std", "model.init_config.emb_init_std"),
    }
    if has_alibi:
        found.keys["model.position"] = "alibi"
    elif not has_rope:
        found.notes.append("model.position: learned positions have no counterpart; rope is taken")
    if leaves.take("model.attn_config.qk_ln"):
        found.notes.append("model.qk_norm: LayerNorm of queries and keys has no counterpart, only RMSNorm")
    if leaves.take("model.no_bias") is not True:
        found.notes.append("model.no_bias: biases have no counterpart; there are none here")
    experts = leaves.take("model.ffn_config.moe_num_experts")
    if experts:
        found.keys |= {
            "model.moe.experts": experts,
            "model.moe.top_k": leaves.take("model.ffn_config.moe_top_k"),
            "model.moe.balance_loss_weight": leaves.take("model.ffn_config.moe_loss_weight"),
            "model.moe.jitter_eps": leaves.take("model.ffn_config.moe_jitter_eps"),
            "model.moe.normalize_weights_p": leaves.take("model.ffn_config.moe_normalize_expert_weights"),
            "parallelism.expert": leaves.take("model.ffn_config.moe_world_size"),
        }
    kind = leaves.take("model.ffn_config.mlp_type")
    if experts and kind not in (None, "glu"):
        found.notes.append(f"model.ffn: experts of the type {kind} have no counterpart; ours are GLUs")
    attention = ("model.attn_config.attn_type", "model.attn_config.attn_impl")
    leaves.take("model.name", "model.init_device", *attention)


def _foundry_optimizer(leaves: Leaves, found: Translation) -> None:
    kind, rate = str(leaves.take("optimizer.name") or ""), leaves.take("optimizer.lr")
    decay = leaves.take("optimizer.weight_decay")
    is_lion = "lion" in kind
    if decay and rate and kind.startswith("decoupled"):
        # Composer's decoupled optimizers shrink weights by decay * lr / initial lr.
        found.notes.append(f"optimizer.weight_decay: {kind} decays by {decay} at the peak, we by lr x this")
        decay = float(f"{decay / rate:.6g}")
    if kind and not is_lion and "adamw" not in kind:
        found.notes.append(f"optimizer.kind: {kind} has no counterpart; adamw is taken")
    found.keys |= {
        "optimizer.kind": "lion" if is_lion else "adamw",
        "optimizer.learning_rate": rate,
        "optimizer.betas": leaves.take("optimizer.betas"),
        "optimizer.eps": leaves.take("optimizer.eps") if not is_lion else None,
        "optimizer.weight_decay": decay,
    }


def _titan(leaves: Leaves) -> Translation:
    found = Translation(TITAN)
    length, steps = leaves.take("training.seq_len"), leaves.take("training.steps")
    batch = _positive(leaves.take("training.global_batch_size"))
    local = leaves.take("training.local_batch_size", "training.batch_size")
    warmup = leaves.take("lr_scheduler.warmup_steps")
    kind = str(leaves.take("optimizer.name") or "AdamW")
    betas = [leaves.take("optimizer.beta1"), leaves.take("optimizer.beta2")]
    ratio = leaves.take("lr_scheduler.decay_ratio")
    is_cosine = str(leaves.take("lr_scheduler.decay_type") or "linear") == "cosine" and ratio is None
    tokens = batch * length if batch and length else None
    found.keys |= {
        "seed": leaves.take("training.seed", "debug.seed"),
        "model.max_sequence_tokens": length,
        "data.sequence_tokens": length,
        "training.duration_tokens": steps * tokens if tokens and steps else None,
        "training.global_batch_sequences": batch,
        "training.microbatch_sequences": local,
        "training.clip_norm": leaves.take("training.max_norm"),
        "training.recompute": "nothing"
        if leaves.take("activation_checkpoint.mode") in (None, "none")
        else "layer",
        "training.compile": "blocks" if leaves.take("compile.enable", "training.compile") else None,
        "optimizer.kind": "adamw",
        "optimizer.learning_rate": leaves.take("optimizer.lr"),
        "optimizer.betas": betas if None not in betas else None,
        "optimizer.eps": leaves.take("optimizer.eps"),
        "optimizer.weight_decay": leaves.take("optimizer.weight_decay"),
        "schedule.kind": "cosine" if is_cosine else "wsd",
        "schedule.warmup_tokens": warmup * tokens if tokens and warmup is not None else None,
        "schedule.final_share": leaves.take("lr_scheduler.min_lr_factor", "lr_scheduler.lr_min"),
        "parallelism.replicate": leaves.take("parallelism.data_parallel_replicate_degree"),
        "parallelism.expert": leaves.take("parallelism.expert_parallel_degree"),
        "checkpoint.interval_batches": leaves.take("checkpoint.interval"),
        "checkpoint.keep_last": _positive(leaves.take("checkpoint.keep_latest_k")),
        "runs_dir": leaves.take("job.dump_folder"),
    }
    if not is_cosine and tokens and steps:
        share = ratio if ratio is not None else 1 - (warmup or 0) / steps
        found.keys["schedule.decay_tokens"] = round(share * steps) * tokens
    if kind.lower() != "adamw":
        found.notes.append(f"optimizer.kind: {kind} has no counterpart; adamw is taken")
    if batch is None:
        found.notes.append(
            "training.global_batch_sequences: the file leaves it to the number of ranks; set it, and "
            f"training.duration_tokens to {steps} batches"
        )
    model = " ".join(str(leaves.take(f"model.{key}") or "") for key in ("name", "flavor")).strip()
    found.notes.append(f"model: the sizes of {model} are in torchtitan's code, not in its file; set model.*")
    return found


def _flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _scheduler(name: str | None, found: Translation) -> str | None:
    if name not in (None, "cosine_with_warmup"):
        found.notes.append(f"schedule.kind: {name} has no counterpart; cosine is taken")
    return "cosine" if name else None


def _tokens(time: Any, batch: int | None, length: int | None, key: str, found: Translation) -> int | None:
    """Returns a time of Composer's, such as 100ba or 2e9tok, in tokens."""
    if time in (None, 0, "0ba", "0tok"):
        return None if time is None else 0
    match = re.fullmatch(r"([\d_.e+]+)(ba|tok|sp)", str(time).replace(" ", ""))
    per = {"tok": 1, "ba": (batch or 0) * (length or 0), "sp": length or 0}[match[2]] if match else 0
    if match is None or not per:
        found.notes.append(f"not translated: {key}: {time}")
        return None
    return int(float(match[1])) * per


def _batches(time: Any, key: str, found: Translation) -> int | None:
    match = re.fullmatch(r"([\d_]+)(ba)?", str(time).replace(" ", "")) if time is not None else None
    if time is not None and match is None:
        found.notes.append(f"not translated: {key}: {time}")
    return _positive(int(match[1])) if match else None


def _microbatch(value: Any, found: Translation) -> int | None:
    if value is not None and not isinstance(value, int):
        found.notes.append(f"training.microbatch_sequences: {value} has no counterpart; set it")
    return value if isinstance(value, int) else None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
