"""A ladder: families of recipes at several sizes and seeds, and its runs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import OnExisting, Recipe, Tracking
from train.recipe.topology import Topology
from train.recipe.transfer import transfer_base_of


@dataclass(frozen=True)
class Family:
    """Recipes of one architecture at several sizes."""

    recipe: str = MISSING
    """Path relative to the ladder's file; `{size}` is replaced by the size."""
    overrides: list[str] = field(default_factory=list)
    """`key=value` that override the recipe."""
    sizes: Optional[list[str]] = None
    """Sizes at which this family is run; null: all."""
    rate_of: Optional[str] = None
    """Family whose learning rate this one uses; null: its own, from the search."""
    searched: Optional[list[str]] = None
    """Sizes at which its learning rate is searched; null: all of the search's."""


@dataclass(frozen=True)
class Search:
    """Search for each family's learning rate. While the best is at the edge, it continues beyond the edge."""

    multipliers: dict[str, list[float]] = MISSING
    """By size: multipliers of each recipe's own learning rate to try first. The one with the lowest mean
    held-out loss is used, also by the following sizes up to the next one with its own search."""
    seeds: list[int] = field(default_factory=lambda: [100])
    """A rate's loss is the mean over these seeds. They must not be among the ladder's: a run that was
    selected for its loss must not count as a result."""
    by_parabola: bool = False
    """The rate is the lowest point of a parabola fitted to all losses over log2 of the rate, instead of the
    best that was tried."""


@dataclass(frozen=True)
class RunBlock:
    """Runs that answer one question together."""

    families: list[str] = MISSING
    """The first is the one whose FLOPs the others must match."""
    seeds: list[int] = MISSING
    sizes: Optional[list[str]] = None
    """null: all of each family's."""


@dataclass(frozen=True)
class Ladder:
    """A file in `yamls/` that `python -m launch.experiments.ladder` takes."""

    name: str = MISSING
    families: dict[str, Family] = MISSING
    sizes: list[str] = field(default_factory=lambda: ["one"])
    """Size names in the recipes' paths; a single size `one` if the paths have none."""
    seeds: list[int] = field(default_factory=list)
    """Of every family at every size; of a ladder with blocks none, as each block has its own."""
    blocks: dict[str, RunBlock] = field(default_factory=dict)
    """Trained in this order, each after the searches that it needs; within a block seed by seed, so that one
    that is cut short can still be compared. A run that several blocks want is trained once."""
    baseline: str = MISSING
    """Family with which the others are compared."""
    metric: str = "nats"
    """Unit of the comparison: `nats` per token, or `bits_per_byte` if tokenizers differ."""
    matched: Optional[float] = 0.02
    """Maximum relative difference in FLOPs from the baseline at a size; null: not checked."""
    search: Optional[Search] = None
    """null: the recipes' own learning rates."""
    counts_diverged: bool = False
    """A run in which a step is not finite twice is recorded as diverged, and the others follow; false: the
    command ends there. Searches always leave such a rate out."""
    average: Optional[int] = None
    """Losses are those of the mean of a run's last so many checkpoints; null: of its last weights."""


Rates = dict[tuple[str, str], float]
"""Multiplier of the learning rate by family and size of the search."""


@dataclass(frozen=True)
class Run:
    """One training run of the ladder."""

    family: str
    size: str
    seed: int
    multiplier: float
    recipe: Recipe
    is_search: bool

    @property
    def flops(self) -> float:
        """Training FLOPs, including attention."""
        return float(sizes.training_flops(self.recipe).total)


class LadderPlan:
    """The runs of a ladder.

    Args:
        path: the ladder's file.
        scale: factor on every run's length; runs of different scales have different names.
        overrides: `key=value` that override every recipe.
        transfer: family and size, `fine:s`, or a family of a ladder without sizes: the only one whose rate is
            searched. All others are scaled from it (`model.transfer_base`). None: each family has its search.

    Raises:
        UserError: if the ladder or one of its recipes is invalid.
    """

    def __init__(
        self,
        path: Path,
        *,
        scale: float = 1.0,
        overrides: list[str] | None = None,
        transfer: str | None = None,
    ) -> None:
        self.path, self.scale = path, scale
        self.ladder = read_ladder(path)
        self._overrides = overrides or []
        self._recipes: dict[tuple[str, str], Recipe] = {}
        self._transfer = self._base(transfer) if transfer is not None else None
        from_base = "-from-" + "-".join(self._transfer) if self._transfer else ""
        self.label = self.ladder.name + from_base + (f"-x{scale:g}" if scale != 1 else "")
        """Name of the ladder at this scale, and with this base."""
        self._check()

    @property
    def blocks(self) -> dict[str, RunBlock]:
        """The ladder's blocks by name; of one without blocks, a single one of everything."""
        whole = RunBlock(list(self.ladder.families), self.ladder.seeds, self.ladder.sizes)
        return self.ladder.blocks or {self.ladder.name: whole}

    def search_runs(self, block: RunBlock | None = None) -> list[Run]:
        """The initial runs of the search, before any beyond an edge; empty without a search.

        Args:
            block: only those whose rates its runs use; None: all.
        """
        blocks = self.blocks.values() if block is None else (block,)
        needed = {
            (self.ladder.families[family].rate_of or family, near)
            for each in blocks
            for family in each.families
            for size in each.sizes or self._sizes(family)
            if (near := self._near(self.ladder.families[family].rate_of or family, size)) is not None
        }
        if self._transfer is not None:
            needed = {self._transfer}
        return [
            run
            for size in self._searched()
            for family in self.ladder.families
            if (family, size) in needed
            for multiplier in self._searched()[size]
            for run in self.search_of(family, size, multiplier)
        ]

    def search_of(self, family: str, size: str, multiplier: float) -> list[Run]:
        """The runs that try one learning rate, one per seed of the search."""
        seeds = self._search_seeds()
        return [self._run(family, size, seed, multiplier, is_search=True) for seed in seeds]

    def runs(self, rates: Rates | None = None) -> list[Run]:
        """The runs that are compared, the smallest first, or block by block.

        Args:
            rates: from the search; None: the recipes' own.
        """
        if self.ladder.blocks:
            runs = [run for block in self.ladder.blocks.values() for run in self.runs_of(block, rates)]
            return list({run.recipe.name: run for run in runs}.values())
        return [
            self._run(family, size, seed, self._rate(entry.rate_of or family, size, rates or {}))
            for size in self.ladder.sizes
            for seed in self.ladder.seeds
            for family, entry in self.ladder.families.items()
            if size in self._sizes(family)
        ]

    def runs_of(self, block: RunBlock, rates: Rates | None = None) -> list[Run]:
        """The runs of a block, seed by seed."""
        return [
            self._run(family, size, seed, self._rate(entry.rate_of or family, size, rates or {}))
            for seed in block.seeds
            for size in self.ladder.sizes
            for family in block.families
            if size in (block.sizes or self.ladder.sizes) and size in self._sizes(family)
            for entry in (self.ladder.families[family],)
        ]

    def _run(self, family: str, size: str, seed: int, multiplier: float, *, is_search: bool = False) -> Run:
        recipe = self._recipe(family, size)
        place = [self.label, family] + ([size] if size != "one" else [])
        if is_search:
            place.append(f"rate{multiplier:g}")
        # The search's first seed is not in the name, so that seeds can be added to a finished search.
        if not is_search or seed != self._search_seeds()[0]:
            place.append(f"seed{seed}")
        schedule = recipe.schedule
        recipe = dataclasses.replace(
            _scaled(recipe, self.scale),
            name="-".join(place),
            seed=seed,
            on_existing=OnExisting.resume,
            optimizer=dataclasses.replace(
                recipe.optimizer, learning_rate=recipe.optimizer.learning_rate * multiplier
            ),
            schedule=dataclasses.replace(
                schedule,
                warmup_tokens=round(schedule.warmup_tokens * self.scale),
                decay_tokens=round(schedule.decay_tokens * self.scale),
            ),
            # The ladder sends the runs one by one: an uploader per run would take cores from training.
            tracking=_tracking(recipe, self.label),
        )
        return Run(family, size, seed, multiplier, recipe, is_search)

    def _recipe(self, family: str, size: str) -> Recipe:
        """Loads and checks a family's recipe at a size, once."""
        if (family, size) not in self._recipes:
            entry = self.ladder.families[family]
            file = self.path.parent / entry.recipe.format(size=size)
            recipe = load_recipe(file, [*entry.overrides, *self._overrides])
            if self._transfer:
                recipe = self._scaled_from_base(recipe, is_base=(family, size) == self._transfer)
            validate(recipe, Topology(), str(file))
            self._recipes[family, size] = recipe
        return self._recipes[family, size]

    def _scaled_from_base(self, recipe: Recipe, *, is_base: bool) -> Recipe:
        """The recipe with the base's rate, decay and initial scale, from which its own are scaled."""
        assert self._transfer is not None
        base = recipe if is_base else self._recipe(*self._transfer)
        sizes_of_base = transfer_base_of(base.model)
        model = dataclasses.replace(recipe.model, transfer_base=sizes_of_base, init_std=base.model.init_std)
        return dataclasses.replace(recipe, model=model, optimizer=base.optimizer)

    def _base(self, transfer: str) -> tuple[str, str]:
        """The family and the size that rates are transferred from."""
        family, _, size = transfer.partition(":")
        size = size or self.ladder.sizes[0]
        there = ", ".join(self.ladder.families)
        if family not in self.ladder.families:
            raise UserError(
                f"is {transfer}",
                key="--transfer",
                remedy=f"name one of {there}, as in {there.split(',')[0]}:{size}",
            )
        if size not in self._sizes(family) or (self.ladder.search and size not in self._searched()):
            remedy = f"searched sizes are {', '.join(self._searched() or self._sizes(family))}"
            raise UserError(f"is {transfer}", key="--transfer", remedy=remedy)
        return family, size

    def _sizes(self, family: str) -> list[str]:
        sizes = self.ladder.families[family].sizes
        return self.ladder.sizes if sizes is None else sizes

    def _searched(self) -> dict[str, list[float]]:
        """Multipliers to try at each size with a search."""
        tried = self.ladder.search.multipliers if self.ladder.search else {}
        return {size: tried[size] for size in self.ladder.sizes if size in tried}

    def _search_seeds(self) -> list[int]:
        return self.ladder.search.seeds if self.ladder.search else []

    def _rate(self, family: str, size: str, rates: Rates) -> float:
        """The multiplier found at this size, the nearest smaller one, or else the nearest larger one."""
        if self._transfer:
            return rates.get(self._transfer, 1.0)
        near = self._near(family, size)
        return rates.get((family, near), 1.0) if near is not None else 1.0

    def _near(self, family: str, size: str) -> str | None:
        """The size whose search a family takes its rate from: see :meth:`_rate`; None without a search."""
        place = self.ladder.sizes.index(size)
        near = [*reversed(self.ladder.sizes[: place + 1]), *self.ladder.sizes[place + 1 :]]
        entry = self.ladder.families[family]
        own = [at for at in self._searched() if at in self._sizes(family) and at in (entry.searched or [at])]
        return next((at for at in near if at in own), None)

    def _check(self) -> None:
        ladder, file = self.ladder, str(self.path)
        if ladder.baseline not in ladder.families:
            there = ", ".join(ladder.families)
            raise UserError(f"is {ladder.baseline}", key="baseline", remedy=f"name one of {there}", file=file)
        if ladder.average is not None and ladder.average < 2:
            raise UserError(
                f"is {ladder.average}", key="average", remedy="give 2 or more, or null", file=file
            )
        for name, family in ladder.families.items():
            if family.rate_of not in (None, *ladder.families):
                there = ", ".join(ladder.families)
                key = f"families.{name}.rate_of"
                raise UserError(f"is {family.rate_of}", key=key, remedy=f"name one of {there}", file=file)
            _require_among(family.sizes, ladder.sizes, f"families.{name}.sizes", file)
            _require_among(family.searched, ladder.sizes, f"families.{name}.searched", file)
        if ladder.blocks:
            self._check_blocks(ladder.blocks)
        else:
            _require_each_once(ladder.seeds, "seeds", file)
        _require_each_once(ladder.sizes, "sizes", file)
        if ladder.search:
            self._check_search(ladder.search)
        if ladder.matched is not None:
            self._require_matched(ladder.matched)

    def _check_search(self, search: Search) -> None:
        file = str(self.path)
        _require_each_once(search.seeds, "search.seeds", file)
        for seed in set(search.seeds) & {seed for block in self.blocks.values() for seed in block.seeds}:
            raise UserError(
                f"has {seed}, one of the ladder's",
                key="search.seeds",
                remedy="give another: a run that was selected for its loss is a biased sample",
                file=file,
            )
        for size, tried in search.multipliers.items():
            key, there = f"search.multipliers.{size}", ", ".join(self.ladder.sizes)
            if size not in self.ladder.sizes:
                raise UserError("is not a size", key=key, remedy=f"sizes are {there}", file=file)
            _require_each_once(tried, key, file)
            if len(tried) < 2 or min(tried) <= 0:
                raise UserError(f"is {tried}", key=key, remedy="give two or more above 0", file=file)
        for name, family in self.ladder.families.items() if not self._transfer else ():
            if not family.rate_of and not set(self._sizes(name)) & set(self._searched()):
                raise UserError(
                    "has no size with a search",
                    key=f"families.{name}",
                    remedy="give rate_of, or search.multipliers for one of its sizes",
                    file=file,
                )

    def _check_blocks(self, blocks: dict[str, RunBlock]) -> None:
        file = str(self.path)
        if self.ladder.seeds:
            remedy = "remove them: each block has its own"
            raise UserError("are given, and blocks too", key="seeds", remedy=remedy, file=file)
        for name, block in blocks.items():
            _require_each_once(block.seeds, f"blocks.{name}.seeds", file)
            _require_each_once(block.families, f"blocks.{name}.families", file)
            _require_among(block.families, list(self.ladder.families), f"blocks.{name}.families", file)
            _require_among(block.sizes, self.ladder.sizes, f"blocks.{name}.sizes", file)

    def _require_matched(self, most: float) -> None:
        for block in self.blocks.values():
            # A ladder without blocks has its baseline anywhere among its families.
            baseline = block.families[0] if self.ladder.blocks else self.ladder.baseline
            for size in block.sizes or self.ladder.sizes:
                flops = {
                    family: self._run(family, size, block.seeds[0], 1.0).flops
                    for family in block.families
                    if size in self._sizes(family)
                }
                for family in flops if baseline in flops else ():
                    off = flops[family] / flops[baseline] - 1
                    if abs(off) > most:
                        raise UserError(
                            f"trains with {off:+.1%} of {baseline}'s FLOPs at size {size}",
                            key=f"families.{family}",
                            remedy=f"change its hidden size, or matched (now {most:.0%})",
                            file=str(self.path),
                        )


def read_ladder(path: Path) -> Ladder:
    """Reads a ladder's file.

    Raises:
        UserError: if it can't be read or is invalid.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Ladder), OmegaConf.load(path))
        found: Any = OmegaConf.to_object(merged)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=str(path)) from None
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise UserError(what, key=str(error.full_key or ""), file=str(path)) from None
    assert isinstance(found, Ladder)
    return found


def _require_each_once(values: Sequence[float] | Sequence[str], key: str, file: str) -> None:
    """Checks for duplicates: two runs of the same name would share a folder."""
    if not values:
        raise UserError("is empty", key=key, remedy="give one or more", file=file)
    if len(set(values)) < len(values):
        raise UserError(f"is {list(values)}", key=key, remedy="give each once", file=file)


def _require_among(names: Sequence[str] | None, known: Sequence[str], key: str, file: str) -> None:
    """Checks names that a list may hold."""
    for name in names or ():
        if name not in known:
            kind = "families" if key.endswith("families") else "sizes"
            raise UserError(f"has {name}", key=key, remedy=f"{kind} are {', '.join(known)}", file=file)


def _scaled(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with its length and those of its phases multiplied by ``scale``."""
    phases = [dataclasses.replace(phase, tokens=round(phase.tokens * scale)) for phase in recipe.data.phases]
    whole = sum(phase.tokens for phase in phases) or round(recipe.training.duration_tokens * scale)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, phases=phases),
        training=dataclasses.replace(recipe.training, duration_tokens=whole),
    )


def _tracking(recipe: Recipe, experiment: str) -> Tracking:
    return dataclasses.replace(recipe.tracking, mlflow=False, experiment=experiment)
