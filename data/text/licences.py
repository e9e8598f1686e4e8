"""Licences of documents: SPDX expressions, and whether a list of licences permits one."""

import functools
import re

LONGEST = 200
"""Characters of an expression that is understood; a longer one is kept, and permitted by no list."""
_READ = 1000
"""Characters of a column's value that are looked at."""
_TOKEN = re.compile(r"[()]|[^\s()]+")


@functools.lru_cache(maxsize=10_000)
def canonical(licence: str) -> str:
    """Returns an SPDX expression in canonical form; other words as they are, cut, in one line."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    # A lone surrogate, as JSON may have, is no text that a file could keep.
    words = " ".join(licence.encode("utf-8", "replace").decode().split())
    if len(words) > LONGEST:
        return words[:LONGEST] + "…"
    try:
        return str(canonicalize_license_expression(words))
    except InvalidLicenseExpression:
        return words


def is_expression(words: str) -> bool:
    """Returns whether words are an SPDX expression."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        canonicalize_license_expression(words)
    except InvalidLicenseExpression:
        return False
    return True


def canonical_of(value: object) -> str:
    """Returns the licence in a record's column: an expression, or a list of licences that all hold."""
    if isinstance(value, str):
        return canonical(value[:_READ])
    if isinstance(value, list):
        each = [canonical(item[:_READ]) for item in value[:20] if isinstance(item, str) and item.strip()]
        return canonical(" AND ".join(f"({it})" if " OR " in it else it for it in dict.fromkeys(each)))
    return ""


def permits(licence: str, listed: list[str]) -> bool:
    """Returns whether a list of licences permits what has this licence.

    Of licences joined by OR one suffices, of those joined by AND all are needed. An exception to a licence
    (WITH) only adds permissions.

    Args:
        licence: canonical; empty for none.
        listed: the licences that are permitted.
    """
    if not licence or licence.endswith("…"):
        return False
    return _permits(licence, tuple(listed))


@functools.lru_cache(maxsize=10_000)
def _permits(licence: str, listed: tuple[str, ...]) -> bool:
    known = {canonical(it).lower() for it in listed}
    if licence.lower() in known:
        return True
    return is_expression(licence) and _any(_TOKEN.findall(licence), known)


def _any(tokens: list[str], known: set[str]) -> bool:
    """Takes licences joined by OR from the front of the tokens; returns whether one of them is permitted."""
    result = _all(tokens, known)
    while tokens and tokens[0] == "OR":
        tokens.pop(0)
        result |= _all(tokens, known)
    return result


def _all(tokens: list[str], known: set[str]) -> bool:
    result = _one(tokens, known)
    while tokens and tokens[0] == "AND":
        tokens.pop(0)
        result &= _one(tokens, known)
    return result


def _one(tokens: list[str], known: set[str]) -> bool:
    token = tokens.pop(0)
    if token == "(":
        result = _any(tokens, known)
        tokens.pop(0)
        return result
    result = token.lower() in known
    if tokens and tokens[0] == "WITH":
        result |= f"{token} {tokens.pop(0)} {tokens.pop(0)}".lower() in known
    return result
