"""The best learning rate of models of several sizes: `python -m launch.experiments.transfer`.

Models of three widths, and of three numbers of experts at equal active width, are trained at several rates
on real text, with and without `model.transfer_base`: loss against rate, and each model's best rate, which
should stay put with it. The decoder, its initial weights, losses, optimizer, schedule and clipping are those
of a run; there is no Trainer around them. Every run is a line of the CSV file; the same command trains only
what is missing in it.
"""

import csv
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Model, Recipe
from train.recipe.topology import Topology
from train.recipe.transfer import transfer_base_of
from train.record.command import command
from train.record.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "yamls/ladder/transfer.yaml"
DOCS = ROOT / "docs"
PAGE, TABLE, PICTURE = "optimizers.md", "transfer.csv", "transfer.png"
BEGIN, END = "<!-- launch.experiments.transfer: begin -->", "<!-- end -->"
RULES = ("transferred", "plain")
BASE = "base"
GROWTH = (2, 4)
"""Factors of the base's width, and of its number of experts."""


@dataclass(frozen=True)
class RateCurve:
    """A model trained by one rule at several rates."""

    axis: str
    """Size that differs from the base's."""
    size: str
    rule: str
    recipe: Recipe
    """At the base's rate."""


@dataclass(frozen=True)
class RateTrial:
    """A line of the CSV file."""

    axis: str
    size: str
    rule: str
    rate: float
    """As a multiple of the recipe's."""
    seed: int
    loss: float
    """Held-out, mean over domains, nats per token; infinite if training was not finite."""


def curves(recipe: Recipe) -> list[RateCurve]:
    """Returns the base, which is the same by either rule, and the models that grow from it."""
    validate(recipe, Topology(), str(RECIPE))
    found = [
        RateCurve(BASE, f"base: d_model {recipe.model.d_model}, {_experts(recipe.model)}", RULES[0], recipe)
    ]
    for axis, grown in (("width", _wider), ("experts", _finer)):
        for times in GROWTH:
            model, size = grown(recipe.model, times)
            for rule in RULES:
                base = transfer_base_of(recipe.model) if rule == RULES[0] else None
                own = replace(recipe, model=replace(model, transfer_base=base))
                validate(own, Topology(), str(RECIPE))
                found.append(RateCurve(axis, size, rule, own))
    return found


def _wider(model: Model, times: int) -> tuple[Model, str]:
    names = ("d_model", "n_heads", "n_kv_heads", "ffn_hidden_size")
    wider = replace(model, **{name: getattr(model, name) * times for name in names})
    return wider, f"d_model {wider.d_model}"


def _finer(model: Model, times: int) -> tuple[Model, str]:
    assert model.moe is not None
    moe = replace(model.moe, experts=model.moe.experts * times, top_k=model.moe.top_k * times)
    finer = replace(model, moe=moe, ffn_hidden_size=model.ffn_hidden_size // times)
    return finer, _experts(finer)


def _experts(model: Model) -> str:
    assert model.moe is not None
    return f"{model.moe.experts} experts of {model.ffn_hidden_size}, top-{model.moe.top_k}"


def train_trial(recipe: Recipe) -> float:
    """Trains a model in this process.

    Returns:
        Mean held-out loss of the domains, in nats per token; infinite if the loss was not finite.
    """
    import torch

    from data.loader import build_train_loader, build_validation_loaders
    from data.opened import OpenedData
    from data.write_shards import ensure_shards
    from train.layout.optim import build_optimizer, clip_gradients, learning_rate_share
    from train.model.decoder import Decoder
    from train.model.init import initialize
    from train.recipe.schema import Precision
    from train.step.microbatch import MicrobatchModel

    opened = OpenedData(recipe)
    ensure_shards(opened)
    decoder = Decoder(recipe.model, device="cpu", loss_chunk_tokens=recipe.training.loss_chunk_tokens)
    initialize(decoder, recipe.model, recipe.seed)
    model = MicrobatchModel(decoder, recipe, Precision.fp32)
    optimizer = build_optimizer(model, recipe.optimizer, recipe.seed)
    tokens = recipe.training.global_batch_sequences * recipe.data.sequence_tokens
    steps, whole = iter(build_train_loader(opened, rank=0, world_size=1)), recipe.training.duration_tokens
    for seen in range(0, whole, tokens):
        batch = next(steps)
        share = learning_rate_share(seen + tokens, whole, recipe.schedule)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.learning_rate * share * group["lr_scale"]
        loss = model.loss(model(batch), batch)["total"]
        if not torch.isfinite(loss):
            return math.inf
        loss.backward()
        clip_gradients(model.parameters(), recipe.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    losses = []
    with torch.no_grad():
        for loader in build_validation_loaders(opened, rank=0, world_size=1).values():
            outputs = [model(batch) for batch in loader]
            losses.append(
                sum(float(o.loss_sum) for o in outputs) / sum(int(o.target_tokens) for o in outputs)
            )
    return mean(losses) if math.isfinite(sum(losses)) else math.inf


def read_trials(file: Path) -> list[RateTrial]:
    """Reads the CSV file; empty if there is none."""
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return [
            RateTrial(
                row["axis"],
                row["size"],
                row["rule"],
                float(row["rate"]),
                int(row["seed"]),
                float(row["loss"]),
            )
            for row in csv.DictReader(stream)
        ]


def losses_of(trials: Sequence[RateTrial], curve: RateCurve) -> dict[float, float]:
    """Mean loss over seeds of each rate of a curve, by rate."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        if (trial.axis, trial.size, trial.rule) == (curve.axis, curve.size, curve.rule):
            found.setdefault(trial.rate, []).append(trial.loss)
    return {rate: mean(found[rate]) for rate in sorted(found)}


def best_rate(losses: dict[float, float]) -> tuple[float, bool]:
    """The minimum of the parabola through the best rate and its neighbours, in log2 of the rate.

    Returns:
        The rate, as a multiple of the recipe's, and whether it lies inside of what was tried; at an edge, or
        next to a rate that diverged, it is the best that was tried.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda n: losses[rates[n]])
    if place in (0, len(rates) - 1):
        return rates[place], False
    left, middle, right = (losses[rates[n]] for n in (place - 1, place, place + 1))
    bend = left - 2 * middle + right
    if not math.isfinite(bend) or bend <= 0:
        return rates[place], True
    step = math.log2(rates[place + 1] / rates[place])
    return float(rates[place] * 2 ** (step * (left - right) / (2 * bend))), True


def rows_of(trials: Sequence[RateTrial], every: Sequence[RateCurve]) -> Iterator[tuple[str, ...]]:
    """Yields the table's rows: a curve's losses, and its best rate."""
    rates = sorted({trial.rate for trial in trials})
    for curve in every:
        losses = losses_of(trials, curve)
        if losses:
            best, inside = best_rate(losses)
            where = f"{best:.2f}" if inside else f"{best:g}, at the edge"
            yield curve.size, curve.rule, *(_loss(losses.get(rate)) for rate in rates), where


def _loss(loss: float | None) -> str:
    if loss is None:
        return ""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def write_page(trials: Sequence[RateTrial], every: Sequence[RateCurve], docs: Path) -> str:
    """Writes the figure, and the table into the page; returns the table."""
    rates = [f"{rate:g}" for rate in sorted({trial.rate for trial in trials})]
    heads = ("model", "rule", *rates, "best rate")
    table = markdown_table(heads, rows_of(trials, every), "<<" + ">" * (len(rates) + 1))
    page = docs / PAGE
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise UserError(f"has no lines {BEGIN!r} and {END!r} for the table", file=str(page))
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    _draw(trials, every, docs / PICTURE)
    return table


def _draw(trials: Sequence[RateTrial], every: Sequence[RateCurve], file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from train.record.page.svg import COLOURS, STYLE

    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(9.0, 4.4), layout="constrained")
        FigureCanvasAgg(picture)
        for axis, panel in zip(("width", "experts"), picture.subplots(1, 2, sharey=True), strict=True):
            of_axis = [curve for curve in every if curve.axis in (BASE, axis)]
            sizes = list(dict.fromkeys(curve.size for curve in of_axis))
            for curve in of_axis:
                losses = losses_of(trials, curve)
                style = "-o" if curve.rule == RULES[0] else "--x"
                colour = COLOURS[sizes.index(curve.size)]
                label = curve.size if curve.rule == RULES[0] else None
                panel.plot(list(losses), list(losses.values()), style, color=colour, label=label, ms=4)
            panel.set_xscale("log", base=2)
            rates = sorted({trial.rate for trial in trials})
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.set_xlabel("learning rate / the base's (dashed: plain)")
            panel.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        picture.axes[0].set_ylabel("held-out loss, nats per token")
        picture.savefig(file, dpi=110)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the base's recipe")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4], help="of the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a curve is the mean over them")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of table, figure and CSV file")


@command(
    "python -m launch.experiments.transfer",
    "Trains models of several sizes at several rates, with and without model.transfer_base; writes table, "
    "figure and CSV file into docs. Run the same command again to continue.",
    add_arguments,
    intermixed=True,
)
def main(options: Namespace) -> int:
    """Trains what is missing, one run at a time, and writes the results."""
    recipe = load_recipe(RECIPE, options.overrides)
    every, file = curves(recipe), options.docs / TABLE
    trials = read_trials(file)
    known = {(trial.axis, trial.size, trial.rule, trial.rate, trial.seed) for trial in trials}
    todo = [
        (curve, rate, seed)
        for seed in options.seeds
        for rate in sorted(options.rates, key=lambda rate: abs(math.log2(rate)))
        for curve in every
        if (curve.axis, curve.size, curve.rule, rate, seed) not in known
    ]
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if not trials:
            writer.writerow(("axis", "size", "rule", "rate", "seed", "loss"))
        for curve, rate, seed in tqdm(todo, unit="run"):
            optimizer = replace(
                curve.recipe.optimizer, learning_rate=curve.recipe.optimizer.learning_rate * rate
            )
            loss = train_trial(replace(curve.recipe, seed=seed, optimizer=optimizer))
            trials.append(RateTrial(curve.axis, curve.size, curve.rule, rate, seed, loss))
            writer.writerow((curve.axis, curve.size, curve.rule, f"{rate:g}", seed, f"{loss:.4f}"))
            stream.flush()
    print(write_page(trials, every, options.docs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
