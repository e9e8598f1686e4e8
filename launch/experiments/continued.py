"""Gain and forgetting of continued pretraining, by replay share: `python -m launch.experiments.continued`.

For each seed, a model is trained on the old domain. From its weights, one run per replay share continues on
the new domain, with that share of old text in the mixture (Ibrahim et al. 2024, arXiv 2403.08763). Every run
validates both domains. Runs of a seed share the old run and the order of samples, so that shares are compared
in pairs. Run the same command again to continue after an interruption.
"""

import contextlib
import csv
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from scipy import stats
from tqdm import tqdm

from train.hf.start import check_start
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import OnExisting, Recipe
from train.recipe.topology import Topology
from train.record.command import Figures, command
from train.record.run_folder import SUMMARY_FILE
from train.record.summary import read_summary
from train.record.tables import markdown_table

RECIPE = Path(__file__).resolve().parents[2] / "yamls" / "continue-small.yaml"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ReplayComparison:
    """Settings of the comparison."""

    recipe: Recipe
    """Recipe of the old runs, except for the seed."""
    old: str
    new: str
    seeds: int
    shares: tuple[float, ...]
    """Shares of old text in the new mixture."""
    new_tokens: int
    """Length of each new run."""
    rate: float
    """Peak of the new learning rate, as a fraction of the old peak."""

    def old_run(self, seed: int) -> Recipe:
        """The run from which the new runs start."""
        data = replace(self.recipe.data, domains={self.old: 1.0}, validation_domains=[self.new])
        return replace(self.recipe, name=f"old-{seed}", seed=seed, data=data, on_existing=OnExisting.resume)

    def new_run(self, seed: int, share: float) -> Recipe:
        """The run that continues from it: warmed up again over a tenth of its tokens, decayed again."""
        old = self.old_run(seed)
        mixture = {self.new: 1.0 - share} | ({self.old: share} if share else {})
        return replace(
            old,
            name=f"new-{seed}-replay-{share:g}",
            data=replace(old.data, domains=mixture, validation_domains=[] if share else [self.old]),
            start=replace(old.start, weights=str(Path(old.runs_dir) / old.name)),
            training=replace(old.training, duration_tokens=self.new_tokens),
            optimizer=replace(old.optimizer, learning_rate=self.rate * old.optimizer.learning_rate),
            schedule=replace(old.schedule, warmup_tokens=self.new_tokens // 10),
        )

    def runs(self) -> list[Recipe]:
        """All runs, each after the one from which it starts."""
        return [
            run
            for seed in range(1, self.seeds + 1)
            for run in (self.old_run(seed), *(self.new_run(seed, share) for share in self.shares))
        ]


@dataclass(frozen=True)
class ReplayRow:
    """One new run: validation loss of both domains in nats per token, before and after it."""

    seed: int
    replay: float
    old_before: float
    old_after: float
    new_before: float
    new_after: float

    @property
    def forgetting(self) -> float:
        """Increase of the old domain's loss."""
        return self.old_after - self.old_before

    @property
    def gain(self) -> float:
        """Decrease of the new domain's loss."""
        return self.new_before - self.new_after


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with Student's 95% interval of two or more values, one per seed."""
    assert len(values) > 1, values
    mean, error = float(stats.tmean(values)), float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean, mean - half, mean + half)


def against_none(rows: Iterable[ReplayRow], share: float) -> tuple[Estimate, Estimate]:
    """Effect of a share against no replay, paired by seed, on forgetting and on the new domain's loss."""
    by_seed = {(row.seed, row.replay): row for row in rows}
    pairs = [(row, by_seed[seed, 0.0]) for (seed, replay), row in by_seed.items() if replay == share]
    forgetting = estimate([row.forgetting - none.forgetting for row, none in pairs])
    return forgetting, estimate([row.new_after - none.new_after for row, none in pairs])


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the recipe")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"default: yamls/{RECIPE.name}")
    parser.add_argument("--old", default="code", metavar="DOMAIN", help="default: code")
    parser.add_argument("--new", default="prose", metavar="DOMAIN", help="default: prose")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--replay",
        type=float,
        nargs="+",
        default=[0.0, 0.05, 0.25, 0.5],
        metavar="SHARE",
        help="of old text in the new mixture; 0 is always included (default: 0.05 0.25 0.5)",
    )
    parser.add_argument("--new-tokens", type=int, help="of each new run (default: half of the old run's)")
    parser.add_argument(
        "--rate", type=float, default=0.5, help="new peak of the learning rate over the old (default: 0.5)"
    )
    parser.add_argument(
        "--out", default="runs/continued", help="folder of the runs (default: runs/continued)"
    )


@command(
    "python -m launch.experiments.continued",
    "Trains on an old domain, continues on a new one with and without replay, over several seeds, and prints "
    "the gain and the forgetting.",
    add_arguments,
    json="write the rows as JSON too",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Trains the missing runs and prints the table."""
    plan = make_plan(options)
    for run in plan.runs():
        validate(run, Topology(), options.recipe)
    train_missing(plan.runs(), Path(plan.recipe.runs_dir))
    rows = read_rows(plan)
    print(table(plan, rows))
    out = Path(plan.recipe.runs_dir) / "continued.csv"
    write_csv(out, rows)
    print(f"\nevery run: {out}")
    return Figures([asdict(row) for row in rows])


def make_plan(options: Namespace) -> ReplayComparison:
    """Builds the comparison from the command line.

    Raises:
        UserError: if the recipe or the options are invalid.
    """
    recipe = load_recipe(options.recipe, [f"runs_dir={options.out}", *options.overrides])
    if options.old == options.new:
        raise UserError(f"is {options.new}, the same as --old", key="--new", remedy="name another domain")
    if options.seeds < 2:
        raise UserError(
            f"is {options.seeds}", key="--seeds", remedy="give at least 2, which an interval needs"
        )
    if not all(0 <= share < 1 for share in options.replay):
        raise UserError(
            f"is {options.replay}", key="--replay", remedy="give shares of at least 0 and below 1"
        )
    return ReplayComparison(
        recipe,
        options.old,
        options.new,
        options.seeds,
        tuple(sorted({0.0, *options.replay})),
        options.new_tokens or recipe.training.duration_tokens // 2,
        options.rate,
    )


def train_missing(runs: Sequence[Recipe], folder: Path) -> None:
    """Trains the incomplete runs; their output goes to a file beside them."""
    missing = [run for run in runs if not (folder / run.name / SUMMARY_FILE).is_file()]
    if not missing:
        return
    print(f"{len(missing)} of {len(runs)} runs to train; importing torch and Composer", flush=True)
    from train.run import run as train

    folder.mkdir(parents=True, exist_ok=True)
    total = sum(run.training.duration_tokens for run in missing)
    with tqdm(total=total, unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        for run in missing:
            bar.set_description(run.name)
            check_start(run, run.name)
            with (folder / "console.log").open("a") as log, contextlib.redirect_stdout(log):
                train(run, Topology())
            bar.update(run.training.duration_tokens)


def read_rows(plan: ReplayComparison) -> list[ReplayRow]:
    """Reads the new runs' losses, and those of the old run from which each started."""
    rows = []
    for seed in range(1, plan.seeds + 1):
        before = _losses(plan.old_run(seed))
        for share in plan.shares:
            after = _losses(plan.new_run(seed, share))
            losses = before[plan.old], after[plan.old], before[plan.new], after[plan.new]
            rows.append(ReplayRow(seed, share, *losses))
    return rows


def _losses(run: Recipe) -> dict[str, float]:
    summary = read_summary(Path(run.runs_dir) / run.name)
    assert summary is not None, run.name
    return summary.validation_loss


def table(plan: ReplayComparison, rows: Sequence[ReplayRow]) -> str:
    """Formats means over seeds by replay share, then the effect of each share against none."""
    title = (
        f"{plan.old} (old, {plan.recipe.training.duration_tokens:,} tokens) -> {plan.new} (new, "
        f"{plan.new_tokens:,} tokens), {plan.seeds} seeds; validation loss, nats per token"
    )
    old, new = ([f"{name} before", f"{name} after"] for name in (plan.old, plan.new))
    rows_by_share = []
    for share in plan.shares:
        chosen = [row for row in rows if row.replay == share]
        means = [
            f"{stats.tmean([getattr(row, key) for row in chosen]):.3f}"
            for key in ("old_before", "old_after", "new_before", "new_after")
        ]
        forgetting = estimate([row.forgetting for row in chosen])
        gain = estimate([row.gain for row in chosen])
        rows_by_share.append((f"{share:.0%}", *means[:2], forgetting, *means[2:], gain))
    changes = [
        (f"{share:.0%}", *(_verdict(change) for change in against_none(rows, share)))
        for share in plan.shares[1:]
    ]
    parts = [
        title,
        markdown_table(("replay", *old, "forgetting", *new, "gain"), rows_by_share, ">>><>><"),
        "Against no replay, seed by seed (mean [95% interval]):",
        markdown_table(("replay", "forgetting", "loss of the new domain"), changes, "><<"),
    ]
    return "\n\n".join(parts)


def _verdict(change: Estimate) -> str:
    if not change.is_significant:
        return f"{change}, not significant"
    return f"{change}, {'more' if change.mean > 0 else 'less'}"


def write_csv(file: Path, rows: Sequence[ReplayRow]) -> None:
    """Writes one line per new run."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" for k, v in asdict(row).items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
