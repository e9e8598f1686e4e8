"""Secrets: kept out of whatever a run writes down, prints or sends.

A recipe's addresses may hold a password or a key; records hold the address without it. And a recipe that
somebody else has written must not copy variables of the environment, where many keep secrets, into the run's
records: only keys of files and folders may name variables, and none whose name says that it is a secret.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import Node, OmegaConf
from omegaconf.resolvers import oc

from train.recipe.catalogue import schema_keys
from train.recipe.errors import UserError

_NAMES = r"signature|token|passw(?:or)?d|passphrase|pwd|secret|credential|(?:api|access|account|private)_?key"
_SECRET_VARIABLE = re.compile(_NAMES, re.IGNORECASE)
# A user's password, up to the last @ of the address; digits and a slash after the colon are a port.
_PASSWORD = re.compile(r"(\w[\w+.-]*://[^\s/?#:@]*):(?!\d+[/?#])(?:(?!://)\S)*@")
# A web address without a colon before the @ may hold a token in place of the user's name.
_WEB_USER = re.compile(r"((?:git\+)?https?://)[^\s/?#@]*@", re.IGNORECASE)
_PARAMETER = re.compile(
    rf"([?&;](?:[\w.-]*(?:{_NAMES})\w*|(?:[\w.-]*[-_.])?(?:sig|key|auth|pass))=)[^&\s#;'\"]+", re.IGNORECASE
)
_NO_DEFAULT = object()


def without_secrets(text: str) -> str:
    """Removes passwords, keys and tokens from the addresses in a text; any other text stays as it is."""
    if "://" not in text and ";" not in text:
        return text
    text = _PASSWORD.sub(r"\1@", text)
    return _PARAMETER.sub(r"\1***", _WEB_USER.sub(r"\1", text))


def looks_secret(variable: str) -> bool:
    """Returns whether the name of a variable says that it holds a secret."""
    return _SECRET_VARIABLE.search(variable) is not None


def require_no_secret(variable: str, key: str) -> None:
    """Refuses a variable of the environment whose name says that it holds a secret.

    Raises:
        UserError: if it does.
    """
    if looks_secret(variable):
        raise UserError(
            f"names the variable {variable}, which looks like a secret", key=key, remedy="write the value out"
        )


@contextlib.contextmanager
def guarded_environment() -> Iterator[None]:
    """Limits OmegaConf's ``${oc.env:NAME}`` to a recipe's keys of files and folders in this context."""
    OmegaConf.register_resolver("oc.env", _variable, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True, annotation_validation="off")


def _variable(name: str, default: Any = _NO_DEFAULT, *, _node_: Node) -> str | None:
    key = re.sub(r"\[\d+\]", "[]", str(_node_._get_full_key(key=None)))
    known = schema_keys().get(key) or schema_keys().get(key.removesuffix("[]"))
    if known is None or not known.rules.is_path:
        raise UserError(
            f"names the variable {name}, and what it holds would stand in the run's records",
            key=key,
            remedy="only keys of files and folders may; give the value as key=value on the command line",
        )
    require_no_secret(str(name), key)
    if name in os.environ:
        return os.environ[name]
    if default is _NO_DEFAULT:
        raise UserError(f"${name} is not set", key=key, remedy="set it, or write the folder out")
    return None if default is None else str(default)
