"""Summary of a run, in `summary.json`; a run with a summary is complete."""

import dataclasses
import json
from pathlib import Path

from train.recipe.errors import UserError
from train.record.files import write_json
from train.record.run_folder import SUMMARY_FILE


@dataclasses.dataclass(frozen=True)
class DatasetInput:
    """A dataset that a run read, one domain's split of the shards."""

    name: str
    """For example `code/train`."""
    digest: str
    """SHA-256 of its content, from the manifest of the shards."""
    source: str
    """Folder or address of the shards."""
    tokens: int
    """Number of tokens."""
    context: str = "training"
    """`training` or `validation`."""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Facts for data governance: dataset, version, origin, licence, transformation."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The key figures of a complete run."""

    name: str
    batches: int
    tokens: int
    seconds: float
    """Total training time, over all resumptions."""
    validation_loss: dict[str, float]
    """Final validation loss by domain, in nats per token."""
    unigram_entropy: dict[str, float]
    """Entropy of the token frequencies of the same validation sets: the loss of a model without context."""
    parameters_total: int
    parameters_active: int
    """Active parameters per token, without the input embedding."""
    flops_per_token: float
    """Training FLOPs per token, averaged over the run: longer sequences need more."""
    peak_flops: float
    """Measured matrix-product peak of one device in the run's precision, FLOP/s."""
    precision: str
    devices: int
    hardware: str
    git_commit: str
    packages: dict[str, str]
    datasets: list[DatasetInput] = dataclasses.field(default_factory=list)

    @property
    def mean_validation_loss(self) -> float:
        """Mean over domains with equal weights; NaN if nothing was validated."""
        return _mean(self.validation_loss)

    @property
    def mean_unigram_entropy(self) -> float:
        """Mean over domains with equal weights; NaN if nothing was validated."""
        return _mean(self.unigram_entropy)


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Writes `summary.json`, atomically."""
    return write_json(run_dir / SUMMARY_FILE, dataclasses.asdict(summary))


def read_summary(run_dir: Path) -> Summary | None:
    """Reads the summary of a run; None while the run is not complete.

    Raises:
        UserError: if it is damaged.
    """
    path = run_dir / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_bytes())
        datasets = [DatasetInput(**dataset) for dataset in tree.pop("datasets")]
        return Summary(**tree, datasets=datasets)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__})",
            remedy="remove it: starting the run again writes it from the last checkpoint",
        ) from None


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values) if values else float("nan")
