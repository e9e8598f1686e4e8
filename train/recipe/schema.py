"""The schema of a recipe: every key that a run reads, its type, unit and default.

A field's docstring says its unit and the reason of its default; :func:`train.recipe.keys.key` declares what
else holds for it: its range, the choice that reads it (setting it without that choice is an error, never
ignored), and whether it may differ when a run is resumed. Three parts are files of their own:
:mod:`train.recipe.architecture`, :mod:`train.recipe.preparation` and :mod:`train.recipe.reliability`.
Nothing here imports torch, so that a mistake is reported at once.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.architecture import Balance, BalanceScope, Ffn, Model, Moe, Norm, Position
from train.recipe.keys import OnResume, key
from train.recipe.preparation import Preparation, Source
from train.recipe.reliability import Guard, Preflight, Watch

__all__ = [
    "Balance",
    "BalanceScope",
    "Checkpoint",
    "Data",
    "DataSkip",
    "Evaluation",
    "Ffn",
    "Interpolation",
    "Model",
    "Moe",
    "Norm",
    "OnExisting",
    "Optimizer",
    "OptimizerKind",
    "OptimizerStart",
    "Parallelism",
    "Phase",
    "Position",
    "Precision",
    "Recipe",
    "Registry",
    "Schedule",
    "ScheduleKind",
    "Start",
    "Tokenizer",
    "TokenizerKind",
    "Tracking",
    "Training",
]


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


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer; its fingerprint is stored with the shards and must equal the recipe's."""

    kind: TokenizerKind = TokenizerKind.cl100k_base
    """`cl100k_base` (GPT-4's, DBRX's) or `bpe`: a byte-level BPE trained on the corpus."""
    vocab_size: int = key(
        8192,
        at_least=258,
        remedy="256 bytes and 2 special tokens need 258",
        read_when="tokenizer.kind == bpe",
    )
    """Size of the trained BPE, its end-of-text token included."""


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum. Domains go on through all phases where the phase before left them."""

    tokens: int = key(above=0)
    """Length in tokens; the phase ends with the batch in which they are reached."""
    weights: dict[str, float] = key(factory=dict)
    """Share of the phase's tokens per domain, at its beginning where end_weights are given; adds up to 1."""
    end_weights: dict[str, float] = key(factory=dict)
    """Shares at the phase's end; empty: the weights are constant. A domain that is left out has 0 there."""
    interpolation: Interpolation = Interpolation.linear
    """`linear` or `cosine` (half a cosine) from weights to end_weights."""
    stop_after_tokens: Optional[int] = key(None, above=0)
    """Ends the phase earlier, with its weights as they are by then: for an edit in the middle of it."""
    sequence_tokens: Optional[int] = key(None, above=0)
    """Length of a sequence, a multiple of data.sequence_tokens; null: as in the phase before."""
    global_batch_sequences: Optional[int] = key(None, above=0)
    """Sequences per optimizer step; null: as many tokens as training.global_batch_sequences has."""
    microbatch_sequences: Optional[int] = key(None, above=0)
    """Sequences per pass of a rank; null: as many tokens as training.microbatch_sequences has, at least
    one sequence."""
    learning_rate_scale: float = key(1.0, above=0)
    """Factor of the scheduled learning rate during the phase."""
    rope_theta: Optional[float] = key(None, above=0)
    """Base of RoPE's wavelengths from this phase on; null: as in the phase before, at first the model's."""


@dataclass(frozen=True)
class DataSkip:
    """Positions of training that are left out, as `alarms.jsonl`, the data log and `data.audit` name them."""

    first_position: int = key()
    """A position is one sequence of data.sequence_tokens; every batch that holds one of these is left out."""
    end_position: int = key()
    """Position after the last."""
    reason: str = "declared by the recipe"
    """Kept with the run's records."""


@dataclass(frozen=True)
class Data:
    """Where tokens come from and in what proportion."""

    shards: str = key(on_resume=OnResume.edit)
    """Folder with one folder per domain of MDS shards: DOMAIN/train and DOMAIN/validation."""
    remote: Optional[str] = key(None, on_resume=OnResume.free)
    """Address of the shards in a store that Streaming reads (s3://, gs://, azure://, hf://,
    dbfs:/Volumes/..., a path); `shards` is then their cache on each node. null: they lie in `shards`."""
    cache_bytes: Optional[int] = key(None, above=0, on_resume=OnResume.free)
    """Bound on the shards that a node's cache keeps of `remote`; those read longest ago go first. null: as
    many as the disk holds."""
    domains: dict[str, float] = key(
        factory=dict, above=0, remedy="must be above 0, or leave the domain out", on_resume=OnResume.edit
    )
    """Share of the training tokens per domain; must add up to 1. For one phase; else `phases`."""
    phases: list[Phase] = key(factory=list, on_resume=OnResume.edit)
    """The curriculum, phase by phase, in place of `domains`; in all they are training.duration_tokens."""
    skips: list[DataSkip] = key(factory=list, on_resume=OnResume.edit)
    """Batches that are passed over, not trained: steps, positions and the learning rate go on over them. In a
    run that has trained on them already, it goes back to a checkpoint from before."""
    max_epochs: float = key(4.0, above=0, on_resume=OnResume.edit)
    """How often a domain may be read; the run is refused where it would be more. Four epochs are nearly
    as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""
    domain_max_epochs: dict[str, float] = key(factory=dict, above=0, on_resume=OnResume.edit)
    """The same for single domains, by name."""
    window_shards: int = key(32, above=0)
    """Shards of a domain whose samples are shuffled among each other. A node's cache needs two windows of
    each domain; 32 shards of 64 MB hold 262,144 samples of 2048 tokens, as many as Streaming's py1e mixes."""
    corpus: Optional[str] = None
    """`installed`: builds the shards, where missing, from the text that every installation has (code
    and prose of the standard library and the installed packages). null: the shards must exist."""
    corpus_bytes: int = key(64_000_000, above=0, read_when="data.corpus == installed")
    """Upper bound of the text, in bytes per domain, that the corpus takes."""
    sources: list[Source] = key(factory=list)
    """Text that `python -m data.write_shards` makes the shards of; empty: the installed corpus, or shards
    that exist."""
    preparation: Preparation = key(factory=Preparation)
    """How."""
    sequence_tokens: int = key(at_least=2, remedy="next-token prediction needs at least 2")
    """Length S of the shards' sequences in tokens; documents are packed and masked from each other."""
    validation_domains: list[str] = key(factory=list)
    """Domains that are validated though nothing of them is trained on: the old ones of continued
    pretraining, say, whose loss shows what is forgotten. Those of `domains` are validated in any case."""
    validation_sequences: int = key(64, above=0)
    """Validation sequences per domain that each evaluation reads."""
    workers: int = key(1, at_least=0, on_resume=OnResume.free)
    """Loader processes per rank. One keeps up with far more than a CPU can train on."""


@dataclass(frozen=True)
class Training:
    """Length, batch and numerics of the run."""

    duration_tokens: int = key(above=0, on_resume=OnResume.edit)
    """Length of the run in tokens; rounded up to whole batches."""
    global_batch_sequences: int = key(above=0, on_resume=OnResume.edit)
    """Sequences per optimizer step, over all ranks."""
    microbatch_sequences: int = key(above=0, on_resume=OnResume.edit)
    """Sequences per forward and backward pass of one rank; gradients are accumulated over them."""
    clip_norm: Optional[float] = key(1.0, above=0)
    """Gradients are scaled to at most this global L2 norm; null: never."""
    precision: Precision = Precision.auto
    """`auto` is bf16 where the device multiplies bf16 in hardware and fp32 elsewhere."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: memory for a third more arithmetic."""
    loss_chunk_tokens: int = key(1024, above=0)
    """Tokens whose logits are held at once when the loss is computed."""
    document_masking: bool = True
    """Tokens attend within their own document alone. False: within the whole sequence."""
    frozen: list[str] = key(factory=list)
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
    learning_rate: float = key(above=0)
    """Peak learning rate."""
    betas: list[float] = key(factory=lambda: [0.9, 0.95])
    """Decay rates of the moments. 0.95: usual for language models since GPT-3."""
    eps: float = key(1e-8, above=0, read_when="optimizer.kind == adamw")
    """Added to the square root of the second moment."""
    weight_decay: float = key(0.1, at_least=0)
    """Decay of matrices; norms are never decayed. 0.1: GPT-3, LLaMA."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over training, as a share of the peak."""

    kind: ScheduleKind = ScheduleKind.cosine
    """`cosine` or `wsd`: warm-up, stable, decay (Hu et al. 2024; linear decay)."""
    warmup_tokens: int = key(0, at_least=0)
    """Tokens over which the rate rises linearly from 0."""
    decay_tokens: int = key(0, at_least=0, read_when="schedule.kind == wsd")
    """Last tokens of the run, over which `wsd` falls linearly to the final rate."""
    final_share: float = key(0.1, at_least=0, at_most=1)
    """Rate at the end as a share of the peak. 0.1: GPT-3, LLaMA."""


@dataclass(frozen=True)
class Parallelism:
    """The mesh (replicate, shard, expert); its product is the number of ranks."""

    replicate: int = key(1, above=0)
    """Copies of the sharded model (HSDP). More copies: less traffic between nodes, more memory."""
    expert: int = key(1, above=0)
    """Ranks that the experts of a layer are spread over."""


@dataclass(frozen=True)
class Evaluation:
    """Validation loss, and a suite of tasks, during and after training."""

    interval_batches: Optional[int] = key(None, above=0)
    """Batches between evaluations; null: only at the end."""
    suite: Optional[str] = None
    """Suite of in-context-learning tasks, for example yamls/suites/gauntlet.yaml; null: none."""
    suite_data: Optional[str] = None
    """Folder of the suite's task files."""
    suite_tasks: list[str] = key(factory=list)
    """Tasks of the suite that are put to the model; empty: all."""
    suite_questions: Optional[int] = key(None, above=0)
    """Questions per task, the first of its file; null: all."""
    suite_interval_batches: Optional[int] = key(None, above=0)
    """Batches between evaluations of the suite, a multiple of interval_batches; null: only at the end."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving; the same command resumes from the newest checkpoint."""

    interval_batches: Optional[int] = key(None, above=0)
    """Batches between checkpoints; null: none by count. The end of a run is always saved."""
    interval_minutes: Optional[float] = key(None, above=0)
    """Minutes between checkpoints; null: none by time."""
    keep_last: int = key(2, above=0)
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
    console_interval_batches: int = key(10, above=0)
    """Batches between lines on the console."""
    registry: Registry = Registry.mlflow
    """Where `python -m train.tracking.registry` puts exported models: `mlflow`, the tracking server's
    registry, or `unity_catalog`, Databricks'."""
    registered_model: Optional[str] = None
    """Name in the registry; Unity Catalog's has three parts, `catalog.schema.model`. null: the run's."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = key(on_resume=OnResume.free)
    """Name of the run and of its folder."""
    seed: int = key(17, at_least=0)
    """Seed of initial weights, sample order, jitter."""
    runs_dir: str = key("runs", on_resume=OnResume.free)
    """Folder that holds the folder of the run."""
    on_existing: OnExisting = key(OnExisting.resume, on_resume=OnResume.free)
    """Where the run's folder exists: `resume` goes on with it (a complete run is left as it is), `new`
    resumes an unfinished one and never touches a complete one (a number is added to the name),
    `overwrite` removes it and starts again."""
    model: Model = key(factory=Model)
    tokenizer: Tokenizer = key(factory=Tokenizer)
    data: Data = key(factory=Data)
    start: Start = key(factory=Start)
    training: Training = key(factory=Training)
    optimizer: Optimizer = key(factory=Optimizer)
    schedule: Schedule = key(factory=Schedule)
    parallelism: Parallelism = key(factory=Parallelism, on_resume=OnResume.free)
    evaluation: Evaluation = key(factory=Evaluation)
    checkpoint: Checkpoint = key(factory=Checkpoint, on_resume=OnResume.free)
    tracking: Tracking = key(factory=Tracking, on_resume=OnResume.free)
    preflight: Preflight = key(factory=Preflight, on_resume=OnResume.free)
    guard: Guard = key(factory=Guard)
    watch: Watch = key(factory=Watch, on_resume=OnResume.free)
