"""Old names of commands from the previous release: `python -m train.export` runs `python -m train.hf export`.

Each is kept for one release and prints its new name to standard error.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

RENAMED = {
    "train.export": "train.hf export",
    "train.import_hf": "train.hf import",
    "train.upcycle": "train.hf upcycle",
    "train.interchange.parity": "train.hf check",
    "train.interchange.serving": "train.hf serving",
    "train.registry": "train.tracking.registry",
    "launch.drill": "launch.verify --faults",
    "launch.planted": "launch.verify --rollback",
    "launch.ladder": "launch.experiments.ladder",
    "launch.continued": "launch.experiments.continued",
    "launch.bench": "launch.experiments.bench",
    "launch.bench.data": "launch.experiments.bench.data",
    "launch.bench.prepare": "launch.experiments.bench.prepare",
    "launch.bench.checkpoint": "launch.experiments.bench.save_stall",
    "launch.bench.interchange": "launch.experiments.bench.hf",
    "launch.plan --published": "launch.experiments.published",
    "launch.preflight --trials": "launch.experiments.preflight_trials",
}
"""New command by old one: a module, with leading arguments where it is now a subcommand or an option."""


def run(old: str) -> None:
    """Runs the new command of an old name with the arguments of this process."""
    module, *first = RENAMED[old].split()
    print(f"python -m {old} is now called python -m {RENAMED[old]}", file=sys.stderr)
    sys.argv[1:1] = first
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_if_given(command: str, option: str, *, keeps_value: bool = False) -> None:
    """Runs the command that an option has become, where this process was given the option; then exits.

    Args:
        command: that had the option.
        option: with its dashes.
        keeps_value: the new command has the option too, with its value.
    """
    if all(word.split("=")[0] != option for word in sys.argv[1:]):
        return
    if not keeps_value:
        sys.argv.remove(option)
    run(f"{command} {option}")


def install() -> None:
    """Lets `python -m` find the old names; a real module of the same name takes precedence."""
    if not any(isinstance(finder, _OldNameFinder) for finder in sys.meta_path):
        sys.meta_path.append(_OldNameFinder())


class _OldNameFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns a package for an old name or its parents, with a ``__main__`` that runs the new command."""
        if any(old == fullname or old.startswith(f"{fullname}.") for old in RENAMED):
            return spec_from_loader(fullname, _Source(""), is_package=True)
        package, _, leaf = fullname.rpartition(".")
        if leaf == "__main__" and package in RENAMED:
            return spec_from_loader(
                fullname, _Source(f"from train import old_names\nold_names.run({package!r})")
            )
        return None


class _Source(InspectLoader):
    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, fullname: str) -> str:
        """Returns the source of the module."""
        return self.text

    def is_package(self, fullname: str) -> bool:
        """Returns True unless the module is a ``__main__``."""
        return not self.text
