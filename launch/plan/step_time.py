"""Step time: arithmetic, memory traffic of a GPU, and traffic between GPUs.

Time = FLOPs / (share x peak) + bytes / (share x bandwidth). Two shares are fitted to published runs and
predict other runs (:mod:`launch.experiments.published`); the rest is counted. Of published runs all kinds are
added, since their times behave that way; how much of our own traffic arithmetic hides follows from the order
in which we send it (:mod:`launch.plan.overlap`).

Legend: T tokens, S tokens of a sequence, D d_model, Q width of all queries, G of all keys, F hidden size,
K experts of a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from launch.plan.hardware import Gpu
from launch.plan.traffic import Collective
from train.recipe import sizes
from train.recipe.schema import Ffn, Model

BF16 = 2
FP32 = 4


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's rates that real runs reach."""

    matrix: float = 0.61
    """Fitted: share of the peak of matrix products."""
    links: float = 1.09
    """Fitted to runs whose traffic is added to their arithmetic: share of a link's rate; above 1 because some
    of it overlaps."""
    collectives: float = 0.85
    """Assumed: share of a link's rate that large collectives reach, where overlap is counted."""
    memory: float = 0.85
    """Assumed: share of memory bandwidth that copies of large tensors reach."""
    attention: float = 0.35
    """Published: share of the peak, FlashAttention-2 on an H100 (Shah et al. 2024, arXiv 2407.08608)."""


FITTED = Efficiency()


@dataclass(frozen=True)
class Work:
    """The computation of one GPU."""

    matrix_flops: float = 0.0
    """FLOPs of products with weights."""
    attention_flops: float = 0.0
    """FLOPs of scores and values, without the masked half."""
    fp8_flops: float = 0.0
    """FLOPs of products with weights in fp8."""
    memory_bytes: float = 0.0
    """Bytes read and written: operands of products, and all elementwise operations."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matrix_flops + other.matrix_flops,
            self.attention_flops + other.attention_flops,
            self.fp8_flops + other.fp8_flops,
            self.memory_bytes + other.memory_bytes,
        )

    def times(self, count: float) -> "Work":
        """The work repeated ``count`` times."""
        return Work(
            self.matrix_flops * count,
            self.attention_flops * count,
            self.fp8_flops * count,
            self.memory_bytes * count,
        )

    def backward(self) -> "Work":
        """Returns the work of the backward pass: gradients of inputs and of weights.

        Attention takes 5 products where the forward pass takes 2, since it recomputes the scores (Dao et
        al. 2022, arXiv 2205.14135, algorithm 4).
        """
        return Work(
            2 * self.matrix_flops, 2.5 * self.attention_flops, 2 * self.fp8_flops, 2 * self.memory_bytes
        )


@dataclass(frozen=True)
class Seconds:
    """Time by kind of work."""

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    idle: float = 0.0
    """A stage of a pipeline waits for others."""

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.matrix + self.attention + self.memory + self.links + self.idle

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.matrix + other.matrix,
            self.attention + other.attention,
            self.memory + other.memory,
            self.links + other.links,
            self.idle + other.idle,
        )

    def times(self, count: float) -> "Seconds":
        """The time repeated ``count`` times."""
        kinds = (self.matrix, self.attention, self.memory, self.links, self.idle)
        return Seconds(*(count * value for value in kinds))


@dataclass(frozen=True)
class Split:
    """The split of a layer's work over GPUs; Finegrain itself has no tensor parallelism."""

    tensor: int = 1
    """GPUs that share each matrix outside the experts."""
    expert: int = 1
    """GPUs that the experts are distributed over."""
    imbalance: float = 1.0
    """Rows of the busiest GPU's experts relative to the mean."""
    has_fp8_experts: bool = False
    """Experts' products are in fp8."""
    context: int = 1
    """GPUs that share each sequence, each of which makes the heads of latent attention of all tokens."""
    crossings: float = 0.0
    """Nodes that a token crosses to, of an exchange once per node; 0: tokens go straight to their experts."""


def layer_work(model: Model, tokens: int, sequence_tokens: int, split: Split = Split()) -> Work:
    """Forward pass of one layer for T tokens of one GPU, or of the GPUs that share its matrices.

    Elementwise passes over memory are counted as written in :mod:`train.model.decoder`: two norms, two
    residual sums and their casts (12 D); clipping and rotation of queries, keys and values (4 Q), after their
    normalisation if there is one (2 Q + 2 G), or the assembly of latent heads (6 Q) and their norms; gate,
    SiLU and product (5 F), or GELU (2 F); gathering and scattering routed rows (6 D each), and where tokens
    cross once to each of C nodes, copying and summing there (2 K + 4 C times D a token in all).

    Args:
        model: the decoder.
        tokens: T.
        sequence_tokens: S.
        split: how many GPUs share the work.
    """
    T, D, F = tokens, model.d_model, model.ffn_hidden_size
    Q = sizes.query_width(model)
    own = T / split.tensor
    work = sum(projections(model, tokens, split.tensor, split.context).values(), Work())
    # Latent attention's values are as wide as its keys to the kernel.
    work += Work(attention_flops=2 * own * sequence_tokens * Q)
    elements = 12 * own * D + turning_elements(model) * own
    gated = model.ffn is Ffn.glu
    if model.moe is None:
        work += matrix_product(T, D, F / split.tensor).times(3 if gated else 2)
        elements += own * F * (5 if gated else 2)
    else:
        # With expert parallelism a GPU has fewer experts, each with the tokens of more GPUs.
        rows = own * model.moe.top_k * split.imbalance
        experts, F = model.moe.experts / split.expert, sizes.expert_width(model)
        work += expert_product(rows / experts, D, F, split).times(3 * experts)
        elements += rows * (6 * D + 5 * F)
        if split.crossings:
            elements += own * D * (2 * model.moe.top_k + 4 * split.crossings)
        if shared := model.moe.shared_hidden_size:
            work += matrix_product(T, D, shared / split.tensor).times(3)
            elements += 5 * own * shared
    return work + Work(memory_bytes=BF16 * elements)


def clipping_work(model: Model, tokens: int, sequence_tokens: int) -> Work:
    """Logits that QK-clip computes once more in each layer, for T tokens of one GPU.

    Half of a product of queries and keys, as all see only earlier keys; each logit is written once in bf16,
    and read and written again to hide what is masked, and read for the largest.
    """
    logits = sizes.layers(model) * model.n_heads * tokens * sequence_tokens / 2
    return Work(matrix_flops=2 * logits * sizes.head_width(model), memory_bytes=4 * BF16 * logits)


def joining_work(model: Model, tokens: int) -> Work:
    """Forward pass of what joins multi-token prediction's layer to the others: a product and three norms."""
    if not model.mtp:
        return Work()
    D = model.d_model
    return matrix_product(tokens, 2 * D, D) + Work(memory_bytes=BF16 * 8 * tokens * D)


def projections(model: Model, tokens: int, tensor: int = 1, context: int = 1) -> dict[str, Work]:
    """Products of a layer's attention with its weights, by module; each GPU of ``tensor`` has some heads.

    Of ``context`` GPUs each has two chunks of a sequence, and makes the heads of latent attention for all
    tokens before the end of each.
    """
    found = {}
    for module, (rows, *columns) in sizes.attention_shapes(model).items():
        if not columns:
            continue
        if module == "out_proj":
            found[module] = matrix_product(tokens, columns[0] / tensor, rows)
        else:  # all heads share the narrow vectors of latent attention
            shared = "_a_" in module
            of_all = context + 0.5 if module == "kv_b_proj" and context > 1 else 1
            found[module] = matrix_product(tokens * of_all, columns[0], rows if shared else rows / tensor)
    return found


def turning_elements(model: Model) -> int:
    """Elements of a token that are read and written between projections and attention."""
    Q, G = sizes.query_width(model), sizes.key_width(model)
    if model.latent is not None:
        return 6 * Q + 2 * (model.latent.kv_rank + (model.latent.q_rank or 0))
    return 4 * Q + (2 * (Q + G) if model.qk_norm else 0)


def head_work(model: Model, tokens: int, split: Split = Split()) -> Work:
    """Forward pass of the output projection and the loss, which passes over the fp32 logits twice."""
    logits = tokens * model.vocab_size / split.tensor
    product = matrix_product(tokens, model.d_model, model.vocab_size / split.tensor)
    return product + Work(memory_bytes=2 * FP32 * logits)


def update_work(elements: float, optimizer_bytes_per_element: float, clips: bool) -> Work:
    """Optimizer step over one GPU's weights: reads and writes weights and moments, reads gradients.

    Args:
        elements: weights of one GPU.
        optimizer_bytes_per_element: bytes of the moments per weight.
        clips: reads gradients for their norm, then reads and writes them to scale them.
    """
    passes = 3 * FP32 + 2 * optimizer_bytes_per_element + (3 * FP32 if clips else 0)
    return Work(memory_bytes=elements * passes)


def compute_seconds(work: Work, gpu: Gpu, efficiency: Efficiency = FITTED) -> Seconds:
    """Returns the time of the work on one GPU."""
    in_fp8 = work.fp8_flops / (gpu.fp8_flops * efficiency.matrix) if work.fp8_flops else 0.0
    return Seconds(
        matrix=work.matrix_flops / (gpu.matrix_flops * efficiency.matrix) + in_fp8,
        attention=work.attention_flops / (gpu.matrix_flops * efficiency.attention),
        memory=work.memory_bytes / (gpu.memory_bandwidth * efficiency.memory),
    )


def link_seconds(
    collectives: Iterable[Collective], gpu: Gpu, efficiency: Efficiency = FITTED, microbatches: int = 1
) -> Seconds:
    """Returns the time that collectives add to a step of so many microbatches."""
    total = sum(each.calls_in_step(microbatches) * each.seconds(gpu) for each in collectives)
    return Seconds(links=total / efficiency.links)


def matrix_product(rows: float, inner: float, columns: float) -> Work:
    """Returns the work of [rows, inner] x [inner, columns] in bf16."""
    operands = rows * inner + inner * columns + rows * columns
    return Work(matrix_flops=2 * rows * inner * columns, memory_bytes=BF16 * operands)


def expert_product(rows: float, inner: float, columns: float, split: Split) -> Work:
    """Returns the work of one expert's product, in bf16 or fp8.

    In fp8 both operands are read in bf16 and written for the product to read: 4 bytes of an element, not 2.
    """
    product = matrix_product(rows, inner, columns)
    if not split.has_fp8_experts:
        return product
    quantising = BF16 * (rows * inner + inner * columns)
    return Work(fp8_flops=product.matrix_flops, memory_bytes=product.memory_bytes + quantising)
