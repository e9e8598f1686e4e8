"""Rotary positions in Hugging Face's `config.json`, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta` (DBRX: `attn_config.rope_theta`) and `rope_scaling`, and ignores
`rope_parameters`. transformers 5 writes only `rope_parameters`. Reading an older config, it takes
`rope_theta` where `rope_parameters` has none, `rope_scaling` before `rope_parameters`, and never DBRX's
`attn_config.rope_theta`: such a model silently computes with a base of 10,000.

YaRN's factor is that of its section in transformers 5. transformers 4 takes `max_position_embeddings` over
`original_max_position_embeddings`: where the two differ, no model is the same in both.

YaRN's factor of queries and keys is `attention_factor`, but in DeepSeek's latent attention `mscale_all_dim`,
which multiplies also what is not rotated; what is rotated, `mscale` multiplies by its ratio to that.

The fraction of a head that is rotated is `partial_rotary_factor`, of the config or of a section; transformers
4 reads the former, 5 the latter, and the former where it has none.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from train.recipe.errors import UserError
from train.recipe.schema import Model, Yarn

Config = Mapping[str, Any]

SECTIONS = ("rope_parameters", "rope_scaling")
PLAIN = "default"
"""The type of positions that are not scaled."""
YARN = "yarn"
PARTIAL = "partial_rotary_factor"
MSCALES = ("mscale", "mscale_all_dim")
ATTENTION = "attn_config"
"""DBRX's keys of attention."""


def rope_keys(model: Model) -> dict[str, object]:
    """Returns the keys by which transformers 5 reads a base, and both read YaRN; 4's base is elsewhere."""
    base = {"rope_theta": float(model.rope_theta)}
    yarn, outside = model.yarn, {}
    if model.rope_share != 1:
        outside = {PARTIAL: float(model.rope_share)}
        base |= outside
    if yarn is None:
        return outside | {"rope_parameters": {"rope_type": PLAIN, **base}}
    scaling: dict[str, object] = {
        "rope_type": YARN,
        "factor": float(yarn.factor),
        "original_max_position_embeddings": yarn.original_tokens,
        "beta_fast": float(yarn.beta_fast),
        "beta_slow": float(yarn.beta_slow),
    }
    if model.latent is not None:
        scaling |= dict.fromkeys(MSCALES, _mscale(yarn))
    elif yarn.attention_factor is not None:
        scaling["attention_factor"] = float(yarn.attention_factor)
    return outside | {"rope_parameters": scaling | base, "rope_scaling": scaling}


def _mscale(yarn: Yarn) -> float:
    """Returns the factor in DeepSeek's words: s of 0.1 s ln(factor) + 1."""
    if yarn.attention_factor is None:
        return 1.0
    return (yarn.attention_factor - 1) / (0.1 * math.log(yarn.factor))


def has_mscale(model: Model) -> bool:
    """Returns whether DeepSeek's words can express YaRN's factor: an `mscale_all_dim` of 0 means another."""
    return model.yarn is None or _mscale(model.yarn) != 0


def is_same_yarn_in_both(model: Model) -> bool:
    """Returns whether transformers 4 and 5 read the same factor of YaRN from a model's config."""
    yarn = model.yarn
    return yarn is None or yarn.factor * yarn.original_tokens == model.max_sequence_tokens


def rope_yarn(config: Config, *, latent: bool = False) -> Yarn | None:
    """Reads YaRN from a `config.json` that :func:`rope_base` has accepted with ``scaled``.

    Args:
        config: a `config.json`, of transformers 4 or 5.
        latent: of latent attention, whose factor is `mscale_all_dim`.

    Raises:
        UserError: if it is incomplete, or versions of transformers read different ones.
    """
    sections = {name: config[name] for name in SECTIONS if _type(config.get(name) or {}) == YARN}
    found = {name: _read_yarn(name, section, latent) for name, section in sections.items()}
    if len(set(found.values())) > 1:
        raise UserError(f"{' and '.join(found)} have different {YARN}; they must be the same")
    for name, yarn in found.items():
        longest = config.get("max_position_embeddings")
        if longest != yarn.factor * yarn.original_tokens:
            raise UserError(
                f"{name}.factor is {yarn.factor:g}, but max_position_embeddings={longest} is not that many "
                f"times original_max_position_embeddings={yarn.original_tokens}: transformers 4 and 5 differ"
            )
    return next(iter(found.values()), None)


def _read_yarn(name: str, section: Mapping[str, Any], latent: bool) -> Yarn:
    for key in ("factor", "original_max_position_embeddings"):
        if isinstance(section.get(key), bool) or not isinstance(section.get(key), int | float):
            raise UserError(f"{name}.{key} is {section.get(key)!r}, not a number")
    factor, attention = float(section["factor"]), section.get("attention_factor")
    both = [section.get(key) for key in MSCALES]
    if latent:
        if attention is not None or not both[0] or both[0] != both[1]:
            raise UserError(
                f"{name} has attention_factor={attention}, mscale={both[0]}, mscale_all_dim={both[1]}; "
                "of latent attention only the last two can be expressed, if they are equal and not 0"
            )
        attention = None if both[0] == 1 else 0.1 * both[0] * math.log(factor) + 1
    elif attention is None and all(both):
        upper, lower = (0.1 * scale * math.log(factor) + 1 for scale in both if scale)
        attention = upper / lower
    return Yarn(
        factor=factor,
        original_tokens=int(section["original_max_position_embeddings"]),
        beta_fast=float(section.get("beta_fast") or 32),
        beta_slow=float(section.get("beta_slow") or 1),
        attention_factor=None if attention is None else float(attention),
    )


def _type(section: Mapping[str, Any]) -> object:
    return section.get("rope_type", section.get("type"))


def rope_share(config: Config, default: float) -> float:
    """Reads the fraction of a head that is rotated.

    Raises:
        UserError: if it is no fraction, or places have different ones.
    """
    found = {}
    for name in ("", *SECTIONS):
        section = config.get(name) if name else config
        share = section.get(PARTIAL) if isinstance(section, Mapping) else None
        if share is not None:
            found[f"{name}.{PARTIAL}" if name else PARTIAL] = share
    for name, share in found.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UserError(f"{name} is {share!r}, not a fraction of a head")
    if len(set(found.values())) > 1:
        places = ", ".join(f"{name} is {share!r}" for name, share in found.items())
        raise UserError(f"{places}; they must be the same")
    return float(next(iter(found.values()), default))


def rope_base(config: Config, default: float, *, scaled: bool = False, partial: bool = False) -> float:
    """Reads RoPE's base theta.

    Args:
        config: a `config.json`, of transformers 4 or 5.
        default: base of the architecture's class, for a config that has none.
        scaled: accept YaRN, which :func:`rope_yarn` reads.
        partial: accept that a part of a head is rotated, which :func:`rope_share` reads.

    Raises:
        UserError: if the config has several bases, or scaled or partial positions.
    """
    if not partial:
        for name in ("", *SECTIONS):
            _check_whole(name, config.get(name) if name else config)
    for name in SECTIONS:
        _check_section(name, config.get(name), (PLAIN, YARN) if scaled else (PLAIN,))
    bases = dict(_bases(config))
    if len(set(bases.values())) > 1:
        places = ", ".join(f"{name} is {base!r}" for name, base in bases.items())
        raise UserError(f"{places}; they must be the same")
    return next(iter(bases.values()), default)


def views(config: Config) -> Iterator[Config]:
    """Yields a config without what transformers 4 ignores, and without what transformers 5 ignores."""
    old = _without(config, "rope_parameters")
    if isinstance(old.get("rope_scaling"), Mapping):
        old["rope_scaling"] = _without(old["rope_scaling"], "rope_theta")
    new = dict(config)
    if new.get("rope_scaling"):
        new = _without(new, "rope_parameters")
    if ATTENTION in config:  # A DBRX, or an MPT, which has no base.
        old = _without(old, "rope_theta")
        new[ATTENTION] = _without(config[ATTENTION] or {}, "rope_theta")
    yield old
    yield new


def _check_section(name: str, section: object, types: tuple[str, ...]) -> None:
    """Refuses a section of another type, or one with anything but a base."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise UserError(f"{name} is {section!r}, not a section with rope_type and rope_theta")
    nested = [key for key, value in section.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{name} differs by layer ({', '.join(nested)}), which cannot be expressed")
    for key in ("rope_type", "type"):
        given = section.get(key)
        if given not in (None, *types):
            raise UserError(
                f"{name}.{key} is {given!r}; only {' and '.join(map(repr, types))} can be expressed"
            )
    known = {"rope_type", "type", "rope_theta", PARTIAL}
    if _type(section) == YARN:
        known |= {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
        known |= {"mscale", "mscale_all_dim"}
        if section.get("truncate") is True:
            known |= {"truncate"}
    for key, value in section.items():
        if key not in known and value is not None:
            raise UserError(f"{name}.{key} is {value!r}, which cannot be expressed")


def _check_whole(name: str, section: object) -> None:
    """Refuses positions of a part of a head."""
    factor = section.get(PARTIAL) if isinstance(section, Mapping) else None
    if factor is not None and factor != 1:
        where = f"{name}.{PARTIAL}" if name else PARTIAL
        raise UserError(f"{where} is {factor!r}; only 1, every dimension of a head, can be expressed")


def _bases(config: Config) -> Iterator[tuple[str, float]]:
    """Yields the name and the base of every place that has one."""
    for section in ("", ATTENTION, *SECTIONS):
        keys = config.get(section) if section else config
        base = keys.get("rope_theta") if isinstance(keys, Mapping) else None
        if base is None:
            continue
        name = f"{section}.rope_theta" if section else "rope_theta"
        if isinstance(base, bool) or not isinstance(base, int | float) or not base > 0:
            raise UserError(f"{name} is {base!r}, not a positive number")
        yield name, float(base)


def _without(config: Config, key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}
