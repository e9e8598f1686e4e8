"""Keys of the previous release's recipes, read as what they have become: in files, also those that runs hold,
and on the command line. Each is kept for one release.
"""

from typing import Any

RENAMED = {
    "training.activation_checkpointing": ("training.recompute", {"true": "layer", "false": "nothing"}),
}
"""By old name: the new one, and what the old values mean."""


def renamed(key: str, value: Any) -> tuple[str, Any]:
    """Returns a key and its value by their present names."""
    if key not in RENAMED:
        return key, value
    name, values = RENAMED[key]
    return name, values.get(str(value).lower(), value)


def renamed_in(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Returns a recipe's tree with present names; of a key by both names the present one's value counts."""
    for key in RENAMED:
        section, _, leaf = key.rpartition(".")
        keys = tree.get(section)
        if isinstance(keys, dict) and leaf in keys:
            others = {name: item for name, item in keys.items() if name != leaf}
            name, value = renamed(key, keys[leaf])
            tree = {**tree, section: {name.rpartition(".")[2]: value, **others}}
    return tree
