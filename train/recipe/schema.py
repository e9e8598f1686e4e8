"""The schema of a recipe: every key that a run reads, its type, unit and default.

A field's docstring, shown by ``--help``, gives its unit and the reason for its default.
:func:`train.recipe.keys.key` declares the rest: its range, the choice that reads it (setting it without that
choice is an error, never ignored), and whether it may change on resume. Four parts have their own files:
:mod:`train.recipe.architecture`, :mod:`train.recipe.optimization`, :mod:`train.recipe.preparation` and
:mod:`train.recipe.reliability`.
Nothing here imports torch, so mistakes are reported immediately.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.architecture import (
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
    TransferBase,
    Yarn,
)
from train.recipe.keys import OnResume, key
from train.recipe.optimization import (
    Compile,
    Decay,
    ExchangePrecision,
    ExpertPrecision,
    LossMean,
    Moments,
    Optimizer,
    OptimizerKind,
    Parallelism,
    Precision,
    Recompute,
    ReducePrecision,
    Reduction,
    Schedule,
    ScheduleKind,
    Training,
)
from train.recipe.preparation import Preparation, Source
from train.recipe.reliability import Guard, Preflight, Watch

__all__ = [
    "Balance",
    "BalanceScope",
    "Checkpoint",
    "Compile",
    "Data",
    "DataSkip",
    "Decay",
    "Evaluation",
    "ExchangePrecision",
    "ExpertPrecision",
    "Ffn",
    "FillInMiddle",
    "GroupScore",
    "Interpolation",
    "Latent",
    "LossMean",
    "Model",
    "Moe",
    "Moments",
    "Norm",
    "OnExisting",
    "Optimizer",
    "OptimizerKind",
    "OptimizerStart",
    "Parallelism",
    "Phase",
    "Position",
    "Precision",
    "QkNormOver",
    "Recipe",
    "Recompute",
    "ReducePrecision",
    "Reduction",
    "Registry",
    "Schedule",
    "ScheduleKind",
    "Score",
    "Start",
    "Tokenizer",
    "TokenizerKind",
    "Tracking",
    "Training",
    "TransferBase",
    "Yarn",
]


class TokenizerKind(str, Enum):
    """The tokenizer that makes the token ids."""

    cl100k_base = "cl100k_base"
    bpe = "bpe"
    hf = "hf"


class OptimizerStart(str, Enum):
    """Optimizer moments at step 0."""

    fresh = "fresh"
    restored = "restored"


class Registry(str, Enum):
    """Registry for exported models."""

    mlflow = "mlflow"
    unity_catalog = "unity_catalog"


class Interpolation(str, Enum):
    """Interpolation between a phase's weights and its end_weights."""

    linear = "linear"
    cosine = "cosine"


class OnExisting(str, Enum):
    """Treatment of a folder ``runs_dir/name`` that already exists."""

    resume = "resume"
    new = "new"
    overwrite = "overwrite"


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer; its fingerprint is stored with the shards and must match the recipe's."""

    kind: TokenizerKind = TokenizerKind.cl100k_base
    """`cl100k_base` (GPT-4, DBRX), `bpe`, a byte-level BPE trained on the corpus, or `hf`, any other."""
    vocab_size: int = key(
        8192,
        at_least=258,
        remedy="256 bytes and 2 special tokens need 258",
        read_when="tokenizer.kind == bpe",
    )
    """Vocabulary size of the trained BPE, including its end-of-text token."""
    path: Optional[str] = key(None, is_path=True, read_when="tokenizer.kind == hf or bpe")
    """`hf`: a local Hugging Face folder, a `tokenizer.json`, or a SentencePiece model. `bpe`: a folder of
    shards whose trained tokenizer is used again instead of training one. The shards keep a copy, which is
    read if this is null."""
    eos_token: Optional[str] = key(None, read_when="tokenizer.kind == hf")
    """Name of the token that ends a document; null: the one that the tokenizer's folder names."""
    chat_template: Optional[str] = key(None, is_path=True)
    """Jinja file that renders the chats of `data.sources` and goes with exports; null: the tokenizer's
    own."""
    special_tokens: list[str] = key(factory=list, read_when="tokenizer.kind == bpe")
    """Names of special tokens that the trained BPE reserves, besides those that end and pad; they are part of
    `vocab_size`."""
    fill_in_middle_tokens: list[str] = key(factory=list)
    """Names of the tokens before prefix, suffix and middle, in this order, for `fill_in_middle` of a phase;
    empty: the first known three that the tokenizer has."""


@dataclass(frozen=True)
class FillInMiddle:
    """Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): as they are read, some documents are cut
    in three, and come in the order prefix, suffix, middle.
    """

    share: float = key(0.0, at_least=0, at_most=1)
    """Share of the documents that are rearranged, in every domain ..."""
    domain_shares: dict[str, float] = key(factory=dict, at_least=0, at_most=1)
    """... but these, by name."""
    spm: float = key(0.5, at_least=0, at_most=1)
    """Share of the rearranged documents that are read in the order suffix, prefix, middle."""


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum. Each domain continues where the previous phase stopped reading it."""

    tokens: int = key(above=0)
    """Length in tokens; the phase ends with the batch that reaches it."""
    weights: dict[str, float] = key(factory=dict)
    """Share of the phase's tokens per domain; must add up to 1. With end_weights, the shares at its start."""
    end_weights: dict[str, float] = key(factory=dict)
    """Shares at the phase's end; an omitted domain has 0. Empty: the weights are constant."""
    interpolation: Interpolation = Interpolation.linear
    """`linear` or `cosine` (half a cosine) from weights to end_weights."""
    stop_after_tokens: Optional[int] = key(None, above=0)
    """Ends the phase early, with its weights as they are by then: for an edit in the middle of a phase."""
    sequence_tokens: Optional[int] = key(None, above=0)
    """Sequence length, a multiple of data.sequence_tokens; null: same as the previous phase."""
    global_batch_sequences: Optional[int] = key(None, above=0)
    """Sequences per optimizer step; null: as many tokens as with training.global_batch_sequences."""
    microbatch_sequences: Optional[int] = key(None, above=0)
    """Sequences per forward and backward pass of one rank; null: as many tokens as with
    training.microbatch_sequences, at least one sequence."""
    learning_rate_scale: float = key(1.0, above=0)
    """Multiplies the scheduled learning rate during the phase."""
    rope_theta: Optional[float] = key(None, above=0)
    """Base of RoPE's wavelengths from this phase on; null: same as the previous phase, at first
    model.rope_theta."""
    recompute: Optional[Recompute] = None
    """Recomputation in this phase; null: as `training.recompute`, with the two keys below."""
    recompute_layers: Optional[int] = key(None, above=0)
    """In this phase, the first layers to which its `recompute` applies; null: all."""
    recompute_rest: Recompute = Recompute.nothing
    """In this phase, what the other layers recompute."""
    fill_in_middle: Optional[FillInMiddle] = None
    """Fill-in-the-middle in this phase; null: as `data.fill_in_middle`."""
    context: Optional[int] = key(None, above=0, on_resume=OnResume.free)
    """Ranks that share each sequence in this phase; null: `parallelism.context`. Where it changes, the run
    saves and ends with status 75: the supervisor, or the same command, continues it in the phase's layout."""


@dataclass(frozen=True)
class DataSkip:
    """An excluded range of positions, numbered as in `alarms.jsonl`, the data log and `data.audit`."""

    first_position: int = key()
    """First excluded position. A position is one sequence of data.sequence_tokens; every batch that contains
    an excluded position is skipped."""
    end_position: int = key()
    """Position after the last excluded one."""
    reason: str = "declared by the recipe"
    """Kept in the run's records."""


@dataclass(frozen=True)
class Data:
    """Training data: shards, mixture or curriculum, and validation."""

    shards: str = key(on_resume=OnResume.edit, is_path=True)
    """Folder of MDS shards, with one folder per domain: DOMAIN/train and DOMAIN/validation."""
    remote: Optional[str] = key(None, on_resume=OnResume.free, is_path=True)
    """Address of the shards in a store that Streaming supports (s3://, gs://, azure://, hf://,
    dbfs:/Volumes/..., a path); `shards` is then the cache on each node. null: the shards are in `shards`."""
    cache_bytes: Optional[int] = key(None, above=0, on_resume=OnResume.free)
    """Size limit of a node's cache of `remote`; the least recently read shards are evicted first. null: the
    size of the disk."""
    domains: dict[str, float] = key(
        factory=dict, above=0, remedy="must be above 0, or omit the domain", on_resume=OnResume.edit
    )
    """Share of the training tokens per domain; must add up to 1. For a curriculum, use `phases` instead."""
    phases: list[Phase] = key(factory=list, on_resume=OnResume.edit)
    """The curriculum, phase by phase, in place of `domains`; the phases must add up to
    training.duration_tokens."""
    skips: list[DataSkip] = key(factory=list, on_resume=OnResume.edit)
    """Excluded ranges, whose batches are skipped: steps, positions and the learning rate count on over them.
    A run that has already trained on them goes back to an earlier checkpoint."""
    fill_in_middle: FillInMiddle = key(factory=FillInMiddle, on_resume=OnResume.edit)
    """Fill-in-the-middle in every phase without its own."""
    max_epochs: float = key(4.0, above=0, on_resume=OnResume.edit)
    """Epochs that a domain may be read for; a run that needs more is refused. Four epochs are nearly as good
    as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""
    domain_max_epochs: dict[str, float] = key(factory=dict, above=0, on_resume=OnResume.edit)
    """The same for individual domains, by name."""
    window_shards: int = key(32, above=0, same_on_fork=True)
    """Shuffle window: shards of a domain whose samples are shuffled together. A node's cache needs two
    windows per domain; 32 shards of 64 MB hold 262,144 samples of 2048 tokens, as many as Streaming's py1e
    mixes."""
    corpus: Optional[str] = None
    """`installed`: builds missing shards from text that every installation has (code and prose of the
    standard library and the installed packages; `messages`, if the mixture names it, of programs in five
    languages, from the system's message catalogues). null: the shards must exist."""
    corpus_bytes: int = key(64_000_000, above=0, read_when="data.corpus == installed")
    """Maximum size of the installed corpus, in bytes of text per domain."""
    sources: list[Source] = key(factory=list)
    """Text from which `python -m data.write_shards` makes the shards; empty: the installed corpus, or
    existing shards."""
    preparation: Preparation = key(factory=Preparation)
    """Preparation of the documents of `sources`."""
    sequence_tokens: int = key(at_least=2, remedy="next-token prediction needs at least 2", same_on_fork=True)
    """Length S of the shards' sequences in tokens; documents are packed and masked from each other."""
    validation_domains: list[str] = key(factory=list, on_resume=OnResume.free)
    """Additional domains to validate without training on them, such as the old domains in continued
    pretraining, whose loss shows forgetting. Training domains are always validated."""
    validation_sequences: int = key(64, above=0, on_resume=OnResume.free)
    """Validation sequences per domain in each evaluation."""
    workers: int = key(1, at_least=0, on_resume=OnResume.free)
    """Loader processes per rank. One supplies far more than a CPU can train on."""


@dataclass(frozen=True)
class Start:
    """Start of training from existing weights. A resumed run continues from its own checkpoint instead."""

    run: Optional[str] = key(None, is_path=True)
    """Folder of another run to fork: training continues from its checkpoint, with its weights, optimizer
    moments, place in data and schedule, and step count, under this recipe; the run itself is only read.
    Tokens and batches count from its beginning."""
    batch: Optional[int] = key(None, above=0)
    """Batch of the checkpoint of `run` to continue from; null: its newest."""
    weights: Optional[str] = key(None, is_path=True)
    """Folder of a run (its newest checkpoint), of one checkpoint, of `train.hf import` or
    `train.hf upcycle`, or of a Hugging Face model, in any layout; null: weights are drawn from the seed."""
    optimizer: OptimizerStart = OptimizerStart.fresh
    """`fresh`: zero moments. `restored`: the moments of the run's checkpoint; learning rate and decay are
    always this recipe's."""


@dataclass(frozen=True)
class Evaluation:
    """Validation loss and a task suite, during and after training."""

    interval_batches: Optional[int] = key(None, above=0)
    """Batches between evaluations; null: only at the end."""
    suite: Optional[str] = key(None, is_path=True)
    """Suite of in-context learning tasks, for example yamls/suites/gauntlet.yaml; null: none."""
    suite_data: Optional[str] = key(None, is_path=True)
    """Folder of the suite's task files."""
    suite_tasks: list[str] = key(factory=list)
    """Tasks of the suite to evaluate; empty: all."""
    suite_questions: Optional[int] = key(None, above=0)
    """Number of questions per task, from the start of its file; null: all."""
    suite_interval_batches: Optional[int] = key(None, above=0)
    """Batches between evaluations of the suite, a multiple of interval_batches; null: only at the end."""


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints; the same command resumes from the newest one."""

    interval_batches: Optional[int] = key(None, above=0)
    """Batches between checkpoints; null: none by count. The end of a run is always saved."""
    interval_minutes: Optional[float] = key(None, above=0)
    """Minutes between checkpoints; null: none by time."""
    keep_last: int = key(2, above=0)
    """Number of checkpoints to keep; older ones are removed once a newer one is complete."""
    memory_interval_batches: Optional[int] = key(None, above=0)
    """Batches between copies of each rank's state in its host's memory (`/dev/shm`), and in another host's if
    there are several: a restart resumes from them if no checkpoint is newer. null: none."""


@dataclass(frozen=True)
class Tracking:
    """MLflow. If the server is down, training continues and the records wait on disk."""

    mlflow: bool = True
    """Log the run to MLflow; metrics.jsonl and the report are written in either case."""
    uri: Optional[str] = None
    """Tracking server; null: $MLFLOW_TRACKING_URI, or SQLite in runs_dir/mlflow.db."""
    experiment: str = "finegrain"
    """MLflow experiment of the run."""
    console_interval_batches: int = key(10, above=0)
    """Batches between progress lines on the console."""
    layer_norms_interval_batches: Optional[int] = key(None, above=0)
    """Batches between measurements of each layer: norms of its gradient, update and weights, and the root
    mean square of the residual stream after it. null: none."""
    tensorboard: bool = False
    """Also log to TensorBoard, into `tensorboard/` of the run's folder; needs the package tensorboard."""
    wandb_project: Optional[str] = None
    """Also log to this project of Weights & Biases; needs the package wandb, and `WANDB_API_KEY` or
    `wandb login`. null: not."""
    registry: Registry = Registry.mlflow
    """Registry in which `python -m train.tracking.registry` registers exported models: `mlflow` (the tracking
    server's) or `unity_catalog` (Databricks)."""
    registered_model: Optional[str] = None
    """Name in the registry; in Unity Catalog it has three parts, `catalog.schema.model`. null: the run's
    name."""


@dataclass(frozen=True)
class Recipe:
    """A complete run."""

    name: str = key(on_resume=OnResume.free)
    """Name of the run and of its folder."""
    seed: int = key(17, at_least=0, at_most=4_000_000_000, same_on_fork=True)
    """Seed of initial weights, sample order and router jitter."""
    runs_dir: str = key("runs", on_resume=OnResume.free, is_path=True)
    """Parent folder of the run's folder."""
    on_existing: OnExisting = key(OnExisting.resume, on_resume=OnResume.free)
    """If the run's folder exists: `resume` continues the run (a complete one is left unchanged), `new`
    resumes an unfinished run but starts another next to a complete one (with a number added to the name),
    `overwrite` moves it aside, to NAME.replaced-1, and starts again."""
    model: Model = key(factory=Model)
    tokenizer: Tokenizer = key(factory=Tokenizer)
    data: Data = key(factory=Data)
    start: Start = key(factory=Start)
    training: Training = key(factory=Training)
    optimizer: Optimizer = key(factory=Optimizer)
    schedule: Schedule = key(factory=Schedule)
    parallelism: Parallelism = key(factory=Parallelism, on_resume=OnResume.free)
    evaluation: Evaluation = key(factory=Evaluation, on_resume=OnResume.free)
    checkpoint: Checkpoint = key(factory=Checkpoint, on_resume=OnResume.free)
    tracking: Tracking = key(factory=Tracking, on_resume=OnResume.free)
    preflight: Preflight = key(factory=Preflight, on_resume=OnResume.free)
    guard: Guard = key(factory=Guard, on_resume=OnResume.free)
    watch: Watch = key(factory=Watch, on_resume=OnResume.free)
