"""The metrics of a run: every key once, with its unit and meaning.

Callbacks log under these keys, the run's record keeps no others, and console, MLflow and report read
them. A part in capitals is a placeholder for a name or number: ``loss/validation/DOMAIN``.
"""

import math
import re
from dataclasses import dataclass

LOSS = "loss/train"
LOSS_TOTAL = "loss/total"
LOSS_BALANCE = "loss/balance"
LOSS_Z = "loss/z"
LOSS_LOGIT_Z = "loss/logit_z"
LOSS_MTP = "loss/mtp"
LOSS_VALIDATION = "loss/validation/DOMAIN"
BITS_PER_BYTE = "bits_per_byte/validation/DOMAIN"
EVALUATION_TASK = "evaluation/task/TASK"
EVALUATION_CATEGORY = "evaluation/category/CATEGORY"
EVALUATION_AVERAGE = "evaluation/average"
LOSS_DOMAIN = "loss/domain/DOMAIN"
BITS_PER_BYTE_DOMAIN = "bits_per_byte/domain/DOMAIN"
DOMAIN_TOKENS = "data/DOMAIN/tokens"
DOMAIN_TARGETS = "data/DOMAIN/targets"
DOMAIN_SAMPLES = "data/DOMAIN/samples"
DOMAIN_EPOCHS = "data/DOMAIN/epochs"
LEARNING_RATE = "learning_rate"
PHASE = "phase"
GRADIENT_NORM = "gradient_norm"
LARGEST_LOGIT = "largest_logit"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
TRAINED_TOKENS = "throughput/trained_tokens"
FLOP_UTILISATION = "throughput/flop_utilisation"
TIME_STEP = "time/step"
TIME_LOADER = "time/loader"
TIME_FORWARD = "time/forward"
TIME_BACKWARD = "time/backward"
TIME_OPTIMIZER = "time/optimizer"
TIME_OTHER = "time/other"
TIME_EVALUATION = "time/evaluation"
TIME_CHECKPOINT = "time/checkpoint"
SLOWEST_RANK = "time/slowest_rank"
GPU_MEMORY_PEAK = "system/gpu_memory_peak"
GPU_MEMORY_RESERVED = "system/gpu_memory_reserved"
PROCESS_MEMORY = "system/process_memory"
HOST_MEMORY = "system/host_memory"
GPU_POWER = "system/gpu_power"
GPU_TEMPERATURE = "system/gpu_temperature"
LAYER_GRADIENT = "layers/LAYER/gradient_norm"
LAYER_UPDATE = "layers/LAYER/update_norm"
LAYER_WEIGHTS = "layers/LAYER/weight_norm"
LAYER_ACTIVATION = "layers/LAYER/activation_rms"
EXPERT_BUSIEST = "experts/LAYER/busiest"
EXPERT_IDLEST = "experts/LAYER/idlest"
EXPERT_ENTROPY = "experts/LAYER/entropy"
EXPERT_DEAD = "experts/LAYER/dead"

STEP_PARTS = (TIME_LOADER, TIME_FORWARD, TIME_BACKWARD, TIME_OPTIMIZER, TIME_OTHER)
"""The parts that add up to ``time/step``."""


@dataclass(frozen=True)
class Metric:
    """A metric's key, unit and meaning."""

    key: str
    unit: str
    meaning: str


METRICS = (
    Metric(LOSS, "nats/token", "cross entropy of the training batch"),
    Metric(
        LOSS_TOTAL, "nats/token", "what is minimised: cross entropy and weighted losses of routers and logits"
    ),
    Metric(LOSS_BALANCE, "1", "balance loss of the router, averaged over layers, without its weight"),
    Metric(LOSS_Z, "1", "z-loss of the router, averaged over layers, without its weight"),
    Metric(LOSS_LOGIT_Z, "1", "z-loss of the output logits, without its weight"),
    Metric(LOSS_MTP, "nats/token", "cross entropy of the token after the next one, without its weight"),
    Metric(LOSS_VALIDATION, "nats/token", "cross entropy of a domain's validation set"),
    Metric(BITS_PER_BYTE, "bits/byte", "cross entropy of a domain's validation set, tokenizer-free"),
    Metric(EVALUATION_TASK, "1", "score of a task of the suite: 0 is guessing, 1 is perfect"),
    Metric(EVALUATION_CATEGORY, "1", "mean score of a category's tasks"),
    Metric(EVALUATION_AVERAGE, "1", "mean score of the suite's categories"),
    Metric(LOSS_DOMAIN, "nats/token", "cross entropy of a domain's part of the training batch"),
    Metric(BITS_PER_BYTE_DOMAIN, "bits/byte", "the same, tokenizer-free"),
    Metric(DOMAIN_TOKENS, "tokens", "tokens of a domain trained on so far"),
    Metric(
        DOMAIN_TARGETS, "tokens", "those that had a loss, if it is on some only (training.loss_mean=targets)"
    ),
    Metric(DOMAIN_SAMPLES, "samples", "samples of a domain trained on so far"),
    Metric(DOMAIN_EPOCHS, "epochs", "samples of a domain trained on so far over those that there are"),
    Metric(LEARNING_RATE, "1", "learning rate of the step"),
    Metric(PHASE, "1", "number of the curriculum's phase, from 0"),
    Metric(GRADIENT_NORM, "1", "global L2 norm of the gradients before clipping"),
    Metric(LARGEST_LOGIT, "1", "largest attention logit of the batch, with optimizer.qk_clip"),
    Metric(TOKENS_PER_SECOND, "tokens/s", "tokens of the step over time/step, all ranks together"),
    Metric(TRAINED_TOKENS, "tokens", "tokens trained so far, for the axis of charts"),
    Metric(FLOP_UTILISATION, "1", "the model's FLOP/s over the measured matrix-product peak"),
    Metric(TIME_STEP, "s", "the step from asking for the batch to the end of its update"),
    Metric(TIME_LOADER, "s", "waiting for the batch"),
    Metric(TIME_FORWARD, "s", "forward passes and losses"),
    Metric(TIME_BACKWARD, "s", "backward passes"),
    Metric(TIME_OPTIMIZER, "s", "clipping and update"),
    Metric(TIME_OTHER, "s", "the rest of time/step"),
    Metric(TIME_EVALUATION, "s", "evaluation before the step, outside time/step"),
    Metric(TIME_CHECKPOINT, "s", "checkpoints and records before the step, outside time/step"),
    Metric(SLOWEST_RANK, "1", "the slowest rank's own time per step over the median rank's"),
    Metric(GPU_MEMORY_PEAK, "bytes", "rank 0's GPU: most memory that the step's tensors took"),
    Metric(GPU_MEMORY_RESERVED, "bytes", "rank 0's GPU: most memory that its allocator held in the step"),
    Metric(PROCESS_MEMORY, "bytes", "resident host memory of rank 0, without its loader's processes"),
    Metric(HOST_MEMORY, "bytes", "host memory in use on rank 0's node, caches left out"),
    Metric(GPU_POWER, "W", "power of rank 0's GPU, every 10 s"),
    Metric(GPU_TEMPERATURE, "°C", "temperature of rank 0's GPU, every 10 s"),
    Metric(LAYER_GRADIENT, "1", "L2 norm of the layer's gradient after clipping"),
    Metric(LAYER_UPDATE, "1", "L2 norm of the change of the layer's weights in the step"),
    Metric(LAYER_WEIGHTS, "1", "L2 norm of the layer's weights after the step"),
    Metric(LAYER_ACTIVATION, "1", "root mean square of the residual stream after the layer, on rank 0"),
    Metric(EXPERT_BUSIEST, "1", "share of the layer's token assignments that its busiest expert took"),
    Metric(EXPERT_IDLEST, "1", "share of the layer's token assignments that its idlest expert took"),
    Metric(EXPERT_ENTROPY, "1", "entropy of the layer's shares over that of equal shares: 1 is balanced"),
    Metric(EXPERT_DEAD, "experts", "experts of the layer that took no token of the batch"),
)

MEASURED = ("time/", "throughput/", "system/")
"""Beginnings of the keys that measure the machine, and so differ between runs of the same recipe."""

_FROM_COMPOSER = {
    "loss/train/total": LOSS_TOTAL,
    "loss/train/language": LOSS,
    "loss/train/balance": LOSS_BALANCE,
    "loss/train/z": LOSS_Z,
    "loss/train/logit_z": LOSS_LOGIT_Z,
    "loss/train/mtp": LOSS_MTP,
}
_COMPOSER_VALIDATION = re.compile(r"metrics/validation/([^/]+)/token_loss")
_PATTERNS = [
    (re.compile(re.sub(r"\b[A-Z]+\b", "([^/]+)", re.escape(metric.key))), metric) for metric in METRICS
]


def validation_loss(domain: str) -> str:
    """Returns the key of a domain's validation loss."""
    return of_domain(LOSS_VALIDATION, domain)


def bits_per_byte(domain: str) -> str:
    """Returns the key of a domain's validation loss in bits per byte."""
    return of_domain(BITS_PER_BYTE, domain)


def of_domain(key: str, domain: str) -> str:
    """Fills in the DOMAIN of a key."""
    return key.replace("DOMAIN", domain)


def in_bits_per_byte(token_loss: float, bytes_per_token: float) -> float:
    """Converts a loss in nats per token to bits per byte of text, which is comparable across tokenizers."""
    return token_loss / math.log(2) / bytes_per_token


def of_layer(key: str, layer: int) -> str:
    """Fills in the LAYER of an ``experts/LAYER/...`` key, counted from 0."""
    return key.replace("LAYER", str(layer))


def find_metric(key: str) -> Metric | None:
    """Returns the metric of a key; None if it is not one of ours."""
    return next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(key)), None)


def match_names(template: str, keys: list[str]) -> dict[str, str]:
    """Returns the keys that match a template, by placeholder value: ``{"code": "loss/validation/code"}``."""
    pattern = next(pattern for pattern, metric in _PATTERNS if metric.key == template)
    return {found.group(1): key for key in keys if (found := pattern.fullmatch(key))}


def translate(composer_key: str) -> str | None:
    """Returns our key for one that Composer logs; None for keys that the record does not keep."""
    if validation := _COMPOSER_VALIDATION.fullmatch(composer_key):
        return validation_loss(validation.group(1))
    key = _FROM_COMPOSER.get(composer_key, composer_key)
    return key if find_metric(key) else None
