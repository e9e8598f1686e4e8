"""Commands under the names of the release before: `python -m train.export` runs `python -m train.hf export`.

Each is kept for one release and says on standard error what it is called now.
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
}
"""New command by old: a module, and the arguments that come first where it has grown subcommands."""


def run(old: str) -> None:
    """Runs an old command as the new one, with the arguments of this process."""
    module, *first = RENAMED[old].split()
    print(f"python -m {old} is now called python -m {RENAMED[old]}", file=sys.stderr)
    sys.argv[1:1] = first
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def install() -> None:
    """Lets `python -m` find the old names; where a module has one of them again, the module wins."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A package for each old name and its parents, with a ``__main__`` that runs the new command."""
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
        """The program of the module."""
        return self.text

    def is_package(self, fullname: str) -> bool:
        """Whether other modules may lie below it: below all but a ``__main__``."""
        return not self.text
