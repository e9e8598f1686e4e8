"""Rotary positions in Hugging Face's `config.json`, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta` (DBRX: `attn_config.rope_theta`) and `rope_scaling`, and ignores
`rope_parameters`. transformers 5 writes only `rope_parameters`. Reading an older config, it takes
`rope_theta` where `rope_parameters` has none, `rope_scaling` before `rope_parameters`, and never DBRX's
`attn_config.rope_theta`: such a model silently computes with a base of 10,000.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from train.recipe.errors import UserError

Config = Mapping[str, Any]

SECTIONS = ("rope_parameters", "rope_scaling")
PLAIN = "default"
"""The type of positions that are not scaled."""
ATTENTION = "attn_config"
"""DBRX's keys of attention."""


def rope_keys(theta: float) -> dict[str, object]:
    """Returns the keys by which transformers 5 reads a base; 4's are the architecture's own."""
    return {"rope_parameters": {"rope_type": PLAIN, "rope_theta": float(theta)}}


def rope_base(config: Config, default: float) -> float:
    """Reads RoPE's base theta.

    Args:
        config: a `config.json`, of transformers 4 or 5.
        default: base of the architecture's class, for a config that has none.

    Raises:
        UserError: if the config has several bases, or scaled or partial positions.
    """
    _check_partial("partial_rotary_factor", config.get("partial_rotary_factor"))
    for name in SECTIONS:
        _check_section(name, config.get(name))
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


def _check_section(name: str, section: object) -> None:
    """Refuses a section of another type, or one with anything but a base."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise UserError(f"{name} is {section!r}, not a section with rope_type and rope_theta")
    nested = [key for key, value in section.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{name} differs by layer ({', '.join(nested)}), which cannot be expressed")
    _check_partial(f"{name}.partial_rotary_factor", section.get("partial_rotary_factor"))
    for key in ("rope_type", "type"):
        given = section.get(key)
        if given not in (None, PLAIN):
            raise UserError(f"{name}.{key} is {given!r}; only {PLAIN!r}, no scaling, can be expressed")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for key, value in section.items():
        if key not in known and value is not None:
            raise UserError(f"{name}.{key} is {value!r}, which cannot be expressed")


def _check_partial(name: str, factor: object) -> None:
    if factor is not None and factor != 1:
        raise UserError(f"{name} is {factor!r}; only 1, every dimension of a head, can be expressed")


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
