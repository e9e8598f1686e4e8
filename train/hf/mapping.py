"""Mapping between our models and Hugging Face's architectures: one table of names each, for both directions.

A rule of a table maps one of our tensors to theirs: the same tensor, the same transposed, its rows in parts
(queries, keys, values), or one tensor per expert. A new architecture needs a table and its requirements on a
model (:mod:`train.hf.architectures`), a reader and a writer of its `config.json` (:mod:`train.hf.config`).

Shapes: D d_model, F ffn_hidden_size, E experts, H heads, G key-value heads, R head width.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from train.hf.config import Config
from train.recipe import sizes
from train.recipe.schema import Model


@dataclass(frozen=True)
class Link:
    """One of their tensors: rows of one of ours, possibly transposed."""

    theirs: str
    shape: tuple[int, ...]
    ours: str | None
    """None: a tensor of zeros that ours does not need."""
    first: int = 0
    """First row in ours."""
    transposed: bool = False
    is_copy: bool = False
    """A second tensor with the values of one that another link reads; an import may lack it."""

    @property
    def rows(self) -> int:
        """Number of rows in ours."""
        return self.shape[1] if self.transposed else self.shape[0]


@dataclass(frozen=True)
class Same:
    """One of their tensors equals one of ours, possibly transposed."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Qkv:
    """The rows of one of our tensors are three of theirs: H x R queries, G x R keys, G x R values."""

    names: tuple[str, str, str]


@dataclass(frozen=True)
class PerExpert:
    """Each expert's rows, [F, D], of one of our tensors are one of theirs, possibly transposed."""

    name: str
    """With `{e}` for the expert's number."""
    transposed: bool = False


Rule = Same | Qkv | PerExpert
Need = tuple[str, Callable[[Model], bool]]
"""A requirement on a model, in words and as a test."""
Table = Mapping[str, Rule]
"""Rules by our name, for layers without the prefix `transformer.blocks.N.`."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of `transformers`."""

    model_type: str
    architecture: str
    layer: str
    """Prefix of a layer's names, with `{n}` for its number."""
    table: Table
    needs: tuple[Need, ...]
    """Requirements on our model to be expressed exactly."""
    to_model: Callable[[Config], Model]
    from_model: Callable[[Model], dict[str, object]]
    extra: Callable[[Model], Iterator[Link]] = lambda model: iter(())
    """Additional tensors of theirs that carry no information."""
    ignored: tuple[str, ...] = ()
    """Name suffixes of entries in old files that are not weights."""
    has_later_layers: bool = False
    """Files may have layers after the model's last, for multi-token prediction: the first of them is
    that of `model.mtp`, any others are left out."""

    def links(self, model: Model) -> Iterator[Link]:
        """Yields every tensor of theirs, in the order of ours."""
        for weight in (*sizes.weights(model), *sizes.biases(model)):
            head, layer, suffix = _take_apart(weight.name, model)
            rule = self.table[suffix]
            prefix = self.layer.format(n=layer) if head else ""
            yield from _apply(rule, weight, prefix, model)
        yield from self.extra(model)

    def later_layer(self, name: str, model: Model) -> int | None:
        """Returns the number of the layer of a tensor of theirs that is beyond the model's, if it is."""
        if not self.has_later_layers:
            return None
        before, after = map(re.escape, self.layer.split("{n}"))
        found = re.match(f"{before}([0-9]+){after}", name)
        return int(found[1]) if found and int(found[1]) >= sizes.layers(model) else None

    def obstacles(self, model: Model) -> list[str]:
        """Returns the requirements that a model does not meet."""
        return [name for name, holds in self.needs if not holds(model)]


def _apply(rule: Rule, weight: sizes.Weight, prefix: str, model: Model) -> Iterator[Link]:
    def link(name: str, first: int, rows: int, transposed: bool = False) -> Link:
        shape = (rows, *weight.shape[1:])
        return Link(prefix + name, shape[::-1] if transposed else shape, weight.name, first, transposed)

    match rule:
        case Same(name, transposed):
            yield link(name, 0, weight.shape[0], transposed)
        case Qkv(names):
            width = sizes.head_width(model)
            first = 0
            for name, heads in zip(names, (model.n_heads, model.n_kv_heads, model.n_kv_heads), strict=True):
                yield link(name, first, heads * width)
                first += heads * width
        case PerExpert(name, transposed):
            assert model.moe is not None
            rows = weight.shape[0] // model.moe.experts
            for e in range(model.moe.experts):
                yield link(name.format(e=e), e * rows, rows, transposed)


def _take_apart(name: str, model: Model) -> tuple[bool, str, str]:
    """Splits a weight's name: True if it is in a layer, the layer's number, and its name in the table."""
    if name.startswith(f"{sizes.MTP}."):
        return True, str(model.n_layers), name.removeprefix(f"{sizes.MTP}.")
    if not name.startswith("transformer.blocks."):
        return False, "", name
    layer, _, suffix = name.removeprefix("transformer.blocks.").partition(".")
    return True, layer, suffix
