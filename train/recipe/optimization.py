"""The schema's part for training: batch, numerics, recomputation, optimizer, schedule and layout."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.keys import OnResume, key


class Precision(str, Enum):
    """Precision of matrix products; weights and optimizer state are fp32 in either case."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class ExpertPrecision(str, Enum):
    """Precision of the experts' matrix products."""

    same = "same"
    fp8 = "fp8"
    mxfp8 = "mxfp8"


class Compile(str, Enum):
    """The parts of the model that torch.compile fuses."""

    off = "off"
    blocks = "blocks"
    model = "model"


class Recompute(str, Enum):
    """Grades of recomputation in the backward pass; each includes those before it."""

    nothing = "nothing"
    elementwise = "elementwise"
    gates = "gates"
    ffn = "ffn"
    layer = "layer"

    def includes(self, grade: "Recompute") -> bool:
        """Returns whether this grade computes again what another does."""
        grades = list(Recompute)
        return grades.index(self) >= grades.index(grade)


class Reduction(str, Enum):
    """When gradients are summed over the ranks."""

    every_microbatch = "every_microbatch"
    once_a_batch = "once_a_batch"


class ReducePrecision(str, Enum):
    """Precision in which gradients are summed over the ranks."""

    fp32 = "fp32"
    bf16 = "bf16"


class ExchangePrecision(str, Enum):
    """Precision in which tokens are sent to the experts of other ranks."""

    same = "same"
    fp8 = "fp8"


class OptimizerKind(str, Enum):
    """Update rule; all have decoupled weight decay."""

    adamw = "adamw"
    lion = "lion"
    muon = "muon"


class LossMean(str, Enum):
    """Denominator of a batch's loss."""

    positions = "positions"
    targets = "targets"


class Moments(str, Enum):
    """Precision of AdamW's moments."""

    fp32 = "fp32"
    bf16 = "bf16"


class ScheduleKind(str, Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    wsd = "wsd"


class Decay(str, Enum):
    """Shape of the decay of a schedule with a stable phase."""

    linear = "linear"
    sqrt = "sqrt"
    cosine = "cosine"


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
    """`auto`: bf16 on devices that multiply bf16 in hardware, fp32 elsewhere."""
    expert_precision: ExpertPrecision = key(ExpertPrecision.same, on_resume=OnResume.edit)
    """Precision of the experts' products, forward and backward; all else is as `precision` says. `same`: like
    the others. `fp8`: e4m3 in tiles of 1 x 128, weights in blocks of 128 x 128 (DeepSeek-V3, section 3.3), on
    H100s. `mxfp8`: tiles of 1 x 32 with powers of two, on B200s. Both need bf16 on a GPU; a CPU computes the
    same numbers in fp32, slowly. Weights, moments and what is sent stay as they are."""
    recompute: Recompute = key(Recompute.nothing, on_resume=OnResume.free)
    """Results that layers compute again in the backward pass. `elementwise`: norms, rotations,
    casts and the order of tokens by experts, but no product. `gates`: also the experts' first two products, a
    third to a half of what is kept, and those that make heads with `model.latent`. `ffn`: all after the
    attention, with the exchange of tokens. `layer`: everything, for a third more arithmetic."""
    recompute_layers: Optional[int] = key(None, above=0, on_resume=OnResume.free)
    """Layers, counted from the first, that `recompute` is for; null: all."""
    recompute_rest: Recompute = key(Recompute.nothing, on_resume=OnResume.free)
    """Recomputation in the other layers."""
    offload: bool = key(False, on_resume=OnResume.free)
    """Inputs of layers that recompute `layer` wait in host memory for their backward pass, on a GPU, so that
    the number of layers takes no memory there. No value changes. A last choice: all else first."""
    compile: Compile = key(Compile.off, on_resume=OnResume.edit)
    """The parts that torch.compile fuses: each layer (`blocks`, one compilation for all), or the decoder with
    the loss (`model`). The first batch takes a minute or more; needs a C++ compiler on a CPU, Triton on a
    GPU."""
    deterministic: bool = key(True, on_resume=OnResume.edit)
    """On a GPU: kernels that add in a fixed order, so that a resumed run is the same run bit for bit. False:
    the fastest kernels. On a CPU the order is always fixed."""
    loss_chunk_tokens: Optional[int] = key(None, above=0, on_resume=OnResume.free)
    """Tokens whose logits are in memory at once when the loss is computed; null: 4096 on a GPU, else 1024.
    The output projection's gradient is added up chunk by chunk, so another number rounds it otherwise."""
    profile_batches: list[int] = key(factory=list, above=0, on_resume=OnResume.free)
    """First and last batch, from 1, of which torch's profiler records a trace, and a GPU's memory, into
    `profile/` of the run's folder: `[20, 22]`. Empty: none."""
    profile_ranks: list[int] = key(factory=lambda: [0], at_least=0, on_resume=OnResume.free)
    """Ranks that record it."""
    loss_mean: LossMean = LossMean.positions
    """Mean that a batch's loss is. `positions`: over all places with a next token, as many in every batch.
    `targets`: over the tokens that have a loss, counted over the whole batch of all ranks, for data that has
    it only on some: responses and turns of the assistant."""
    document_masking: bool = True
    """True: tokens attend only within their own document. False: within the whole sequence."""
    frozen: list[str] = key(factory=list)
    """Weights that are not trained, by name with * and ?: `["*.router.*"]` freezes the routers."""


@dataclass(frozen=True)
class Optimizer:
    """Update rule. Decay is decoupled: weights shrink by learning_rate * weight_decay per step."""

    kind: OptimizerKind = key(OptimizerKind.adamw, same_on_fork=True)
    """`adamw` (Loshchilov and Hutter 2019), `lion` (Chen et al. 2023) or `muon` (Jordan et al. 2024; Liu et
    al. 2025): for the matrices of the layers; AdamW for embeddings, output projection, routers, norms."""
    learning_rate: float = key(above=0)
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv
    2502.16982): a rate that is good for AdamW is usable for both."""
    adamw_learning_rate: Optional[float] = key(None, above=0, read_when="optimizer.kind == muon")
    """Peak learning rate of what `muon` leaves to AdamW; null: `learning_rate`."""
    momentum: float = key(0.95, at_least=0, below=1, read_when="optimizer.kind == muon")
    """Decay rate of Muon's momentum."""
    nesterov: bool = key(True, read_when="optimizer.kind == muon")
    """Muon's momentum looks one step ahead."""
    newton_schulz_steps: int = key(5, above=0, read_when="optimizer.kind == muon")
    """Steps by which Muon orthogonalises a matrix; 5: Jordan et al. 2024."""
    betas: list[float] = key(factory=lambda: [0.9, 0.95])
    """Decay rates of the moments. 0.95: common for language models since GPT-3."""
    eps: float = key(1e-8, above=0, read_when="optimizer.kind == adamw or muon")
    """Added to the square root of AdamW's second moment."""
    weight_decay: float = key(0.1, at_least=0)
    """Weight decay of matrices; norms are never decayed. 0.1: GPT-3, LLaMA."""
    moments: Moments = key(Moments.fp32, read_when="optimizer.kind == adamw")
    """Precision of AdamW's moments. `bf16`: half the memory, stochastically rounded (DeepSeek-V3 2024,
    section 3.3)."""
    qk_clip: Optional[float] = key(None, above=0, same_on_fork=True)
    """After each update, scales queries and keys of the heads whose largest attention logit in the batch was
    above this, so that it is this (QK-clip of MuonClip, Kimi K2 2025, arXiv 2507.20534, section 2.1: 100).
    The logits are computed once more for it. null: never."""
    average_decay: Optional[float] = key(None, at_least=0, below=1, same_on_fork=True)
    """Keeps an exponential average of the weights, of which so much stays with each step: 0.999 averages the
    last thousand. fp32, sharded like the weights, saved with the checkpoints; null: none."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over training, as a fraction of the peak."""

    kind: ScheduleKind = ScheduleKind.cosine
    """`cosine` or `wsd`: warm-up, stable, decay (Hu et al. 2024)."""
    warmup_tokens: int = key(0, at_least=0)
    """Tokens over which the rate rises linearly from 0."""
    decay_tokens: int = key(0, at_least=0, read_when="schedule.kind == wsd")
    """Tokens at the end of the run over which `wsd` decays to the final rate."""
    decay: Decay = key(Decay.linear, read_when="schedule.kind == wsd")
    """Shape of that decay: `linear`, `sqrt` (falls with the root of the time, at first fastest; Hägele et al.
    2024, arXiv 2405.18392, section 3.1) or `cosine` (half a cosine)."""
    final_share: float = key(0.1, at_least=0, at_most=1)
    """Final rate as a fraction of the peak. 0.1: GPT-3, LLaMA; 0: decay to zero."""


@dataclass(frozen=True)
class Parallelism:
    """The mesh (replicate, pipeline, shard, expert), whose product is the number of ranks; shard remains."""

    replicate: int = key(1, above=0)
    """Replicas of the sharded model (HSDP). More replicas: less traffic between nodes, more memory."""
    expert: int = key(1, above=0)
    """Expert parallelism: ranks that the experts of a layer are spread over."""
    context: int = key(1, above=0)
    """Context parallelism: neighbouring ranks that share each sequence, for sequences too long for one GPU.
    Each has two chunks of a sequence, one from either end, and gathers keys and values;
    `microbatch_sequences` are then those of the group. Divides half of a sequence's length. A phase may have
    its own, `data.phases[].context`."""
    tensor: int = key(1, above=0)
    """Tensor parallelism: neighbouring ranks, of one node, that share each sequence and the weights of
    attention, dense feed-forward layers and shared experts. Attention and these layers gather whole sequences
    and split their heads and hidden units; all else works on each rank's part of a sequence. Experts stay
    spread by `expert`. `microbatch_sequences` are then those of the group. Divides every phase's sequence
    length, and the model's key-value heads."""
    pipeline: int = key(1, above=0)
    """Pipeline parallelism: stages that the layers are spread over, each on ranks of its own. They run one
    forward, one backward pass in turn, and send activations to the next stage and gradients back. All stages
    of a pipeline work on the same sequences; the batch needs several microbatches for each."""
    pipeline_layers: list[int] = key(factory=list, above=0)
    """Layers of each stage in order, with several chunks those of every chunk of every stage; empty: as even
    as their FLOPs allow, the output projection counted with the last."""
    pipeline_chunks: int = key(1, above=0)
    """Chunks of layers per stage, which are run in turn (interleaved schedule): so many times less idle time
    at a batch's ends, so many times more sends. Then the microbatches divide by the stages."""
    reduce: Reduction = Reduction.every_microbatch
    """When gradients are summed over a replica's ranks: after `every_microbatch`, or `once_a_batch`, with
    less traffic but whole gradients of all layers on every rank until then. Over replicas: once a batch."""
    reduce_precision: ReducePrecision = ReducePrecision.fp32
    """`bf16`: half the bytes; each sum over ranks is then rounded to 8 bits, and where gradients are reduced
    `once_a_batch`, so is the sum over microbatches."""
    gathered_layers: int = key(0, at_least=0)
    """Layers, counted from the last, of a pipeline from each stage's last, whose weights stay gathered
    between forward and backward pass."""
    exchange_precision: ExchangePrecision = ExchangePrecision.same
    """Precision in which tokens are sent to experts on other ranks. `same`: that of the products, bf16.
    `fp8`: e4m3 in tiles of 128 with powers of two, half the bytes (DeepSeek-V3, section 3.3.3); outputs come
    back, and gradients are sent, as with `same`."""
    exchange_node_ranks: Optional[int] = key(None, above=1)
    """Ranks of a node, a divisor of `expert`: where an expert group spans several nodes, a token crosses the
    network once for each node that has experts of its, and back as the sum of their outputs, and is spread
    inside the node (DeepSeek-V3, section 3.2.2). null: once for each expert."""
    interleave: bool = False
    """Compute each layer in two halves of a microbatch, so that the exchange of tokens of one half runs under
    the arithmetic of the other: three quarters of it are hidden, or as much as the arithmetic takes. Helps
    where `expert` spans nodes or `top_k` is large. Costs twice the kernels, of half the rows, and one more
    rounding of each gradient. Needs an even microbatch (phases where it is odd are computed whole), and
    layers that are not compiled."""

    @property
    def sharing(self) -> int:
        """Neighbouring ranks that share each sequence."""
        return self.context * self.tensor

    @property
    def on_each_sequence(self) -> int:
        """Ranks that work on each sequence: those that share it, in every stage of a pipeline."""
        return self.sharing * self.pipeline
