"""The schema of a recipe: every key that a run reads, its type, unit and default.

A field's docstring says its unit and the reason of its default. A field that only some other choice
reads says so in its ``read_when``; setting it without that choice is an error, never ignored.
Nothing here imports torch, so that a mistake is reported at once.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from train.recipe.preparation import Preparation, Source
from train.recipe.reliability import Guard, Preflight, Watch


class Balance(str, Enum):
    """How tokens are spread over experts."""

    loss = "loss"
    bias = "bias"


class BalanceScope(str, Enum):
    """Whose tokens an expert's share is counted over in the balance loss."""

    microbatch = "microbatch"
    rank = "rank"
    expert_group = "expert_group"
    global_batch = "global_batch"


class Position(str, Enum):
    """How attention learns of positions."""

    rope = "rope"
    alibi = "alibi"


class Norm(str, Enum):
    """Normalisation before attention and feed-forward."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Ffn(str, Enum):
    """Feed-forward form of a dense layer, or of an expert."""

    glu = "glu"
    mlp = "mlp"


class TokenizerKind(str, Enum):
    """Which tokenizer makes the token ids."""

    cl100k_base = "cl100k_base"
    bpe = "bpe"


class Precision(str, Enum):
    """Precision of matrix products; weights and optimizer state are fp32 in either case."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class OptimizerKind(str, Enum):
    """Update rule, both with decoupled weight decay."""

    adamw = "adamw"
    lion = "lion"


class ScheduleKind(str, Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    wsd = "wsd"


class OptimizerStart(str, Enum):
    """Moments of the optimizer at step 0."""

    fresh = "fresh"
    restored = "restored"


class Registry(str, Enum):
    """Where exported models are registered."""

    mlflow = "mlflow"
    unity_catalog = "unity_catalog"


class Interpolation(str, Enum):
    """How weights go from those of a phase's beginning to those of its end."""

    linear = "linear"
    cosine = "cosine"


class OnExisting(str, Enum):
    """What happens where ``runs_dir/name`` exists already."""

    resume = "resume"
    new = "new"
    overwrite = "overwrite"


def read_when(condition: str, default: Any) -> Any:
    """A field that is read only while ``condition`` (``some.key == value``) holds."""
    return field(default=default, metadata={"read_when": condition})


@dataclass(frozen=True)
class Moe:
    """Mixture of experts in place of each layer's dense feed-forward."""

    experts: int = 16
    """Experts E per layer. DBRX: 16."""
    top_k: int = 4
    """Experts K that each token uses. DBRX: 4."""
    normalize_weights_p: Optional[float] = 1.0
    """Order of the norm that the K chosen weights are divided by; null leaves them. DBRX: 1."""
    jitter_eps: float = 0.0
    """Router inputs are multiplied by noise from [1 - eps, 1 + eps] in training. 0: none, as DBRX."""
    balance: Balance = Balance.loss
    """`loss` (Shazeer et al. 2017; Fedus et al. 2021, eq. 4) or `bias`: no loss but a bias on the
    choice of experts (Wang et al. 2024, DeepSeek-V3, section 2.1.2)."""
    balance_loss_weight: float = read_when("model.moe.balance == loss", 0.05)
    """Weight of the balance loss, averaged over layers. DBRX: 0.05."""
    balance_scope: BalanceScope = read_when(  # noqa: RUF009  (a field, which ruff cannot see)
        "model.moe.balance == loss", BalanceScope.microbatch
    )
    """Tokens over which experts' shares are counted: `microbatch` of one rank (MegaBlocks' and so, as far
    as is known, DBRX's: the result depends on the microbatch), `rank` (its whole batch), `expert_group` (a
    microbatch of every rank that shares experts) or `global_batch`, the same under every layout and split,
    which lets experts specialise by domain (Qiu et al. 2025, arXiv 2501.11873). `rank` and `global_batch`
    cost one more forward pass where gradients are accumulated."""
    bias_update_rate: float = read_when("model.moe.balance == bias", 0.001)
    """Step of the balancing bias per optimizer step. DeepSeek-V3: 0.001."""
    z_loss_weight: float = 0.0
    """Weight of the router z-loss (Zoph et al. 2022, eq. 5), averaged over layers. ST-MoE: 0.001."""


@dataclass(frozen=True)
class Model:
    """The decoder. Names follow Hugging Face's DBRX."""

    d_model: int = MISSING
    """Width D of the residual stream."""
    n_layers: int = MISSING
    """Decoder layers L."""
    n_heads: int = MISSING
    """Attention heads; the head width is d_model / n_heads."""
    n_kv_heads: int = MISSING
    """Key-value heads (Ainslie et al. 2023); n_heads means plain multi-head attention."""
    ffn_hidden_size: int = MISSING
    """Hidden size F of a dense feed-forward, or of each expert. DBRX: 1.75 d_model per expert."""
    vocab_size: int = MISSING
    """Rows of the embedding. At least the tokenizer's; DBRX pads 100,278 to 100,352."""
    max_sequence_tokens: int = MISSING
    """Longest sequence that the model is meant for; exported, and an upper bound of data's."""
    ffn: Ffn = Ffn.glu
    """`glu`: w2(silu(w1 x) * v1 x) (Shazeer 2020). `mlp`: w2 gelu(w1 x), for MPT; dense only."""
    position: Position = Position.rope
    """`rope` (Su et al. 2021) or `alibi` (Press et al. 2021), for MPT."""
    rope_theta: float = read_when("model.position == rope", 500000.0)
    """Base of RoPE's wavelengths. DBRX: 500,000."""
    norm: Norm = Norm.layernorm
    """`layernorm` without bias (DBRX, MPT) or `rmsnorm` (LLaMA)."""
    norm_eps: float = 1e-5
    """Added to the variance. DBRX, MPT, LLaMA 2: 1e-5."""
    clip_qkv: Optional[float] = None
    """Queries, keys and values are clipped to [-c, c]. DBRX: 8. null: not clipped."""
    qk_norm: bool = False
    """Queries and keys are RMS-normalised over all their heads, before clipping (Muennighoff et al. 2024,
    OLMoE, section 4.2.5). DBRX: false."""
    tie_embeddings: bool = False
    """Output projection shares the embedding's weights. DBRX: false; MPT: true."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream are divided by
    sqrt(2 n_layers) (Radford et al. 2019)."""
    moe: Optional[Moe] = None
    """Mixture of experts; null for a dense model."""


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer; its fingerprint is stored with the shards and must equal the recipe's."""

    kind: TokenizerKind = TokenizerKind.cl100k_base
    """`cl100k_base` (GPT-4's, DBRX's) or `bpe`: a byte-level BPE trained on the corpus."""
    vocab_size: int = read_when("tokenizer.kind == bpe", 8192)
    """Size of the trained BPE, its end-of-text token included."""


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum. Domains go on through all phases where the phase before left them."""

    tokens: int = MISSING
    """Length in tokens; the phase ends with the batch in which they are reached."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the phase's tokens per domain, at its beginning where end_weights are given; adds up to 1."""
    end_weights: dict[str, float] = field(default_factory=dict)
    """Shares at the phase's end; empty: the weights are constant. A domain that is left out has 0 there."""
    interpolation: Interpolation = Interpolation.linear
    """`linear` or `cosine` (half a cosine) from weights to end_weights."""
    stop_after_tokens: Optional[int] = None
    """Ends the phase earlier, with its weights as they are by then: for an edit in the middle of it."""
    sequence_tokens: Optional[int] = None
    """Length of a sequence, a multiple of data.sequence_tokens; null: as in the phase before."""
    global_batch_sequences: Optional[int] = None
    """Sequences per optimizer step; null: as many tokens as training.global_batch_sequences has."""
    microbatch_sequences: Optional[int] = None
    """Sequences per pass of a rank; null: as many tokens as training.microbatch_sequences has, at least
    one sequence."""
    learning_rate_scale: float = 1.0
    """Factor of the scheduled learning rate during the phase."""
    rope_theta: Optional[float] = None
    """Base of RoPE's wavelengths from this phase on; null: as in the phase before, at first the model's."""


@dataclass(frozen=True)
class DataSkip:
    """Positions of training that are left out, as `alarms.jsonl`, the data log and `data.audit` name them."""

    first_position: int = MISSING
    """A position is one sequence of data.sequence_tokens; every batch that holds one of these is left out."""
    end_position: int = MISSING
    """Position after the last."""
    reason: str = "declared by the recipe"
    """Kept with the run's records."""


@dataclass(frozen=True)
class Data:
    """Where tokens come from and in what proportion."""

    shards: str = MISSING
    """Folder with one folder per domain of MDS shards: DOMAIN/train and DOMAIN/validation."""
    remote: Optional[str] = None
    """Address of the shards in a store that Streaming reads (s3://, gs://, azure://, hf://,
    dbfs:/Volumes/..., a path); `shards` is then their cache on each node. null: they lie in `shards`."""
    cache_bytes: Optional[int] = None
    """Bound on the shards that a node's cache keeps of `remote`; those read longest ago go first. null: as
    many as the disk holds."""
    domains: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens per domain; must add up to 1. For one phase; else `phases`."""
    phases: list[Phase] = field(default_factory=list)
    """The curriculum, phase by phase, in place of `domains`; in all they are training.duration_tokens."""
    skips: list[DataSkip] = field(default_factory=list)
    """Batches that are passed over, not trained: steps, positions and the learning rate go on over them. In a
    run that has trained on them already, it goes back to a checkpoint from before."""
    max_epochs: float = 4.0
    """How often a domain may be read; the run is refused where it would be more. Four epochs are nearly
    as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""
    domain_max_epochs: dict[str, float] = field(default_factory=dict)
    """The same for single domains, by name."""
    window_shards: int = 32
    """Shards of a domain whose samples are shuffled among each other. A node's cache needs two windows of
    each domain; 32 shards of 64 MB hold 262,144 samples of 2048 tokens, as many as Streaming's py1e mixes."""
    corpus: Optional[str] = None
    """`installed`: builds the shards, where missing, from the text that every installation has (code
    and prose of the standard library and the installed packages). null: the shards must exist."""
    corpus_bytes: int = read_when("data.corpus == installed", 64_000_000)
    """Upper bound of the text, in bytes per domain, that the corpus takes."""
    sources: list[Source] = field(default_factory=list)
    """Text that `python -m data.write_shards` makes the shards of; empty: the installed corpus, or shards
    that exist."""
    preparation: Preparation = field(default_factory=Preparation)
    """How."""
    sequence_tokens: int = MISSING
    """Length S of the shards' sequences in tokens; documents are packed and masked from each other."""
    validation_domains: list[str] = field(default_factory=list)
    """Domains that are validated though nothing of them is trained on: the old ones of continued
    pretraining, say, whose loss shows what is forgotten. Those of `domains` are validated in any case."""
    validation_sequences: int = 64
    """Validation sequences per domain that each evaluation reads."""
    workers: int = 1
    """Loader processes per rank. One keeps up with far more than a CPU can train on."""


@dataclass(frozen=True)
class Training:
    """Length, batch and numerics of the run."""

    duration_tokens: int = MISSING
    """Length of the run in tokens; rounded up to whole batches."""
    global_batch_sequences: int = MISSING
    """Sequences per optimizer step, over all ranks."""
    microbatch_sequences: int = MISSING
    """Sequences per forward and backward pass of one rank; gradients are accumulated over them."""
    clip_norm: Optional[float] = 1.0
    """Gradients are scaled to at most this global L2 norm; null: never."""
    precision: Precision = Precision.auto
    """`auto` is bf16 where the device multiplies bf16 in hardware and fp32 elsewhere."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: memory for a third more arithmetic."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits are held at once when the loss is computed."""
    document_masking: bool = True
    """Tokens attend within their own document alone. False: within the whole sequence."""
    frozen: list[str] = field(default_factory=list)
    """Weights that stay as they are, by name with * and ?: `["*.router.*"]` freezes the routers."""


@dataclass(frozen=True)
class Start:
    """Step 0 from weights that exist. A run that is resumed goes on from its own checkpoint instead."""

    weights: Optional[str] = None
    """Folder of a run (its newest checkpoint), of one checkpoint, of `train.hf import` or
    `train.hf upcycle`, or in Hugging Face's form; null: weights are drawn from the seed. The layout may be
    any."""
    optimizer: OptimizerStart = OptimizerStart.fresh
    """`fresh`: moments of zero. `restored`: those of the run's checkpoint; rates and decay are always
    this recipe's."""


@dataclass(frozen=True)
class Optimizer:
    """Update rule. Decay is decoupled: weights shrink by learning_rate * weight_decay a step."""

    kind: OptimizerKind = OptimizerKind.adamw
    """`adamw` (Loshchilov and Hutter 2019) or `lion` (Chen et al. 2023)."""
    learning_rate: float = MISSING
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the moments. 0.95: usual for language models since GPT-3."""
    eps: float = read_when("optimizer.kind == adamw", 1e-8)
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; norms are never decayed. 0.1: GPT-3, LLaMA."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over training, as a share of the peak."""

    kind: ScheduleKind = ScheduleKind.cosine
    """`cosine` or `wsd`: warm-up, stable, decay (Hu et al. 2024; linear decay)."""
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0."""
    decay_tokens: int = read_when("schedule.kind == wsd", 0)
    """Last tokens of the run, over which `wsd` falls linearly to the final rate."""
    final_share: float = 0.1
    """Rate at the end as a share of the peak. 0.1: GPT-3, LLaMA."""


@dataclass(frozen=True)
class Parallelism:
    """The mesh (replicate, shard, expert); its product is the number of ranks."""

    replicate: int = 1
    """Copies of the sharded model (HSDP). More copies: less traffic between nodes, more memory."""
    expert: int = 1
    """Ranks that the experts of a layer are spread over."""


@dataclass(frozen=True)
class Evaluation:
    """Validation loss, and a suite of tasks, during and after training."""

    interval_batches: Optional[int] = None
    """Batches between evaluations; null: only at the end."""
    suite: Optional[str] = None
    """Suite of in-context-learning tasks, for example yamls/suites/gauntlet.yaml; null: none."""
    suite_data: Optional[str] = None
    """Folder of the suite's task files."""
    suite_tasks: list[str] = field(default_factory=list)
    """Tasks of the suite that are put to the model; empty: all."""
    suite_questions: Optional[int] = None
    """Questions per task, the first of its file; null: all."""
    suite_interval_batches: Optional[int] = None
    """Batches between evaluations of the suite, a multiple of interval_batches; null: only at the end."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving; the same command resumes from the newest checkpoint."""

    interval_batches: Optional[int] = None
    """Batches between checkpoints; null: none by count. The end of a run is always saved."""
    interval_minutes: Optional[float] = None
    """Minutes between checkpoints; null: none by time."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed after a newer one is whole."""


@dataclass(frozen=True)
class Tracking:
    """MLflow. A server that is down never stops training: records wait on disk."""

    mlflow: bool = True
    """Send the run to MLflow; metrics.jsonl and the report are written in either case."""
    uri: Optional[str] = None
    """Tracking server; null: $MLFLOW_TRACKING_URI, or SQLite in runs_dir/mlflow.db."""
    experiment: str = "finegrain"
    """MLflow experiment that the run is put in."""
    console_interval_batches: int = 10
    """Batches between lines on the console."""
    registry: Registry = Registry.mlflow
    """Where `python -m train.tracking.registry` puts exported models: `mlflow`, the tracking server's
    registry, or `unity_catalog`, Databricks'."""
    registered_model: Optional[str] = None
    """Name in the registry; Unity Catalog's has three parts, `catalog.schema.model`. null: the run's."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = MISSING
    """Name of the run and of its folder."""
    seed: int = 17
    """Seed of initial weights, sample order, jitter."""
    runs_dir: str = "runs"
    """Folder that holds the folder of the run."""
    on_existing: OnExisting = OnExisting.resume
    """Where the run's folder exists: `resume` goes on with it (a complete run is left as it is), `new`
    resumes an unfinished one and never touches a complete one (a number is added to the name),
    `overwrite` removes it and starts again."""
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    start: Start = field(default_factory=Start)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallelism: Parallelism = field(default_factory=Parallelism)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    preflight: Preflight = field(default_factory=Preflight)
    guard: Guard = field(default_factory=Guard)
    watch: Watch = field(default_factory=Watch)
