"""Keys of LLM Foundry, Composer, torchtitan, Megatron and Hugging Face, answered with ours."""

from collections.abc import Mapping
from typing import Any

FOUNDRY, TITAN = "LLM Foundry", "torchtitan"

ALIASES = {
    "lr": "optimizer.learning_rate",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "epsilon": "optimizer.eps",
    "decoupled_weight_decay": "optimizer.weight_decay",
    "max_duration": "training.duration_tokens, in tokens",
    "train_iters": "training.duration_tokens, in tokens",
    "max_steps": "training.duration_tokens, in tokens",
    "steps": "training.duration_tokens, in tokens",
    "train_tokens": "training.duration_tokens",
    "global_train_batch_size": "training.global_batch_sequences",
    "global_batch_size": "training.global_batch_sequences",
    "batch_size": "training.global_batch_sequences",
    "device_train_microbatch_size": "training.microbatch_sequences",
    "local_batch_size": "training.microbatch_sequences",
    "micro_batch_size": "training.microbatch_sequences",
    "per_device_train_batch_size": "training.microbatch_sequences",
    "gradient_accumulation_steps": "training.global_batch_sequences and training.microbatch_sequences",
    "max_seq_len": "data.sequence_tokens, and at least as large model.max_sequence_tokens",
    "seq_len": "data.sequence_tokens, and at least as large model.max_sequence_tokens",
    "seq_length": "data.sequence_tokens, and at least as large model.max_sequence_tokens",
    "max_position_embeddings": "model.max_sequence_tokens",
    "hidden_size": "model.d_model",
    "dim": "model.d_model",
    "num_layers": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "kv_n_heads": "model.n_kv_heads",
    "num_query_groups": "model.n_kv_heads",
    "intermediate_size": "model.ffn_hidden_size",
    "ffn_hidden_dim": "model.ffn_hidden_size",
    "moe_num_experts": "model.moe.experts",
    "num_experts": "model.moe.experts",
    "num_local_experts": "model.moe.experts",
    "moe_top_k": "model.moe.top_k",
    "num_experts_per_tok": "model.moe.top_k",
    "moe_router_topk": "model.moe.top_k",
    "moe_loss_weight": "model.moe.balance_loss_weight",
    "router_aux_loss_coef": "model.moe.balance_loss_weight",
    "moe_aux_loss_coeff": "model.moe.balance_loss_weight",
    "moe_jitter_eps": "model.moe.jitter_eps",
    "moe_normalize_expert_weights": "model.moe.normalize_weights_p",
    "rope_base": "model.rope_theta",
    "rotary_base": "model.rope_theta",
    "rms_norm_eps": "model.norm_eps",
    "tie_word_embeddings": "model.tie_embeddings",
    "clipping_threshold": "training.clip_norm",
    "max_norm": "training.clip_norm",
    "max_grad_norm": "training.clip_norm",
    "clip_grad": "training.clip_norm",
    "gradient_clip_val": "training.clip_norm",
    "activation_checkpoint": "training.recompute",
    "gradient_checkpointing": "training.recompute",
    "mixed_precision": "training.precision",
    "t_warmup": "schedule.warmup_tokens, in tokens",
    "warmup_steps": "schedule.warmup_tokens, in tokens",
    "lr_warmup_iters": "schedule.warmup_tokens, in tokens",
    "alpha_f": "schedule.final_share",
    "min_lr_factor": "schedule.final_share",
    "min_lr": "schedule.final_share, a fraction of the peak",
    "lr_decay_style": "schedule.kind",
    "scheduler": "schedule.kind",
    "lr_scheduler": "schedule.kind",
    "save_folder": "runs_dir",
    "save_interval": "checkpoint.interval_batches",
    "save_num_checkpoints_to_keep": "checkpoint.keep_last",
    "keep_latest_k": "checkpoint.keep_last",
    "save_steps": "checkpoint.interval_batches",
    "save_overwrite": "on_existing",
    "autoresume": "on_existing: resume",
    "load_path": "start.weights, or start.run",
    "load_weights_only": "start.optimizer: fresh",
    "initial_load_path": "start.weights, or start.run",
    "eval_interval": "evaluation.interval_batches",
    "eval_steps": "evaluation.interval_batches",
    "icl_tasks": "evaluation.suite",
    "run_name": "name",
    "output_dir": "runs_dir",
    "num_workers": "data.workers",
    "dataset_path": "data.shards",
    "expert_parallel_degree": "parallelism.expert",
    "expert_model_parallel_size": "parallelism.expert",
    "moe_world_size": "parallelism.expert",
    "data_parallel_replicate_degree": "parallelism.replicate",
    "expt_name": "tracking.experiment",
    "experiment_name": "tracking.experiment",
    "tracking_uri": "tracking.uri",
}
"""By a key's full name or its last part: a key of ours, with a word on its unit if that differs."""


def origin_of(tree: Mapping[str, Any]) -> str:
    """Returns the framework that a recipe looks like one of; empty if it is none that is known."""
    foundry = ("train_loader", "max_duration", "device_train_microbatch_size", "fsdp_config", "max_seq_len")
    if sum(mark in tree for mark in foundry) >= 2:
        return FOUNDRY
    titan = ("job", "lr_scheduler", "activation_checkpoint", "metrics", "experimental", "profiling")
    training = tree.get("training")
    if isinstance(training, Mapping) and "steps" in training and any(mark in tree for mark in titan):
        return TITAN
    return ""
