"""Imports of Composer and others that wait until something of them is used.

`import composer` runs TorchMetrics' audio and text, transformers, torchvision, torch's compiler, MosaicML's
command line and the clients of eight services: more than half of the time from command to first step, in each
rank, and none of it is used. `install` puts a finder before Python's own, which treats a few modules so:

- A package whose ``__init__`` gathers names from its modules (`LAZY_PACKAGES`) imports each when asked for.
- A module that mentions others at its top, for functions that we never call (`MENTIONED`), gets stand-ins.
- Torch imports its compiler at an optimizer's first step only to keep out of it: see `_CompilerLater`.

Nothing is hidden: what is used, by whomever, is imported then, and its import errors come then. The file also
holds what of LLM Foundry and MegaBlocks needs help to be imported. Each entry of `PREPARED` has a test that
fails when it is no longer needed: tests/train/test_lazy_imports.py.
"""

import builtins
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

LAZY_PACKAGES = (
    "composer",
    "composer.algorithms",  # of every field; Composer asks each run for one
    "composer.callbacks",
    "composer.loggers",  # eight services
    "composer.models",  # Hugging Face's
    "composer.profiler",
    "composer.utils",
    "composer.utils.object_store",  # a client of each kind of store
    "datasketch",  # SciPy, for all of it but MinHash
    "streaming",
    "streaming.base",
    "torchmetrics",  # audio, text, images, detection
    "torchmetrics.utilities",
)
"""Packages whose ``__init__`` imports from its own modules only to offer their names."""

COMPILER = "torch._dynamo"
"""Torch's compiler, which takes as long to import as the rest of torch."""

MENTIONED = {
    "composer.loggers.mosaicml_logger": ("mcli",),
    "composer.trainer.trainer": (COMPILER, "coolname"),  # is a model compiled; names for runs that have none
    "composer.utils.file_helpers": ("requests",),
    "composer.utils.misc": ("torchvision",),  # transforms images
    "composer.utils.object_store.libcloud_object_store": ("requests",),
    "composer.utils.object_store.sftp_object_store": ("paramiko",),
    "streaming.base.format.mds.encodings": ("PIL",),
    "torchmetrics": ("scipy",),  # puts a name back that SciPy removed
    "torchmetrics.collections": ("torchmetrics.utilities.plot",),  # Matplotlib
    "torchmetrics.metric": ("torchmetrics.utilities.plot",),
}
"""Module, and the packages that it gets stand-ins for."""


def install() -> None:
    """Puts the finder before Python's own; a second call changes nothing."""
    if not any(isinstance(finder, _PreparingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PreparingFinder())


class StandIn:
    """Stands for a module, or for something in one, until it is used.

    While the module that mentions it is being imported, its attributes are stand-ins too.
    """

    def __init__(self, path: tuple[str, ...], importing: "_Importing") -> None:
        self.path, self._importing = path, importing

    def real(self) -> Any:
        """Imports what this stands for."""
        found = importlib.import_module(self.path[0])
        for end, name in enumerate(self.path[1:], 2):
            try:
                found = getattr(found, name)
            except AttributeError:  # A module that nobody has imported yet.
                found = importlib.import_module(".".join(self.path[:end]))
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._importing.names:
            return StandIn((*self.path, name), self._importing)
        return getattr(self.real(), name)

    def __call__(self, *args: object, **keywords: object) -> Any:
        """Calls the real one."""
        return self.real()(*args, **keywords)

    def __instancecheck__(self, instance: object) -> bool:
        """A class whose package was never imported has no instances."""
        return ".".join(self.path[:-1]) in sys.modules and isinstance(instance, self.real())


class _Importing:
    """``__import__`` of one module: while its body runs, some names are stand-ins."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        """Packages that are not imported; empty once the body has run."""

    def __call__(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        """Replaces ``builtins.__import__``, whose parameters these are."""
        later = any(f"{name}.".startswith(f"{package}.") for package in self.names)
        plain = not any(part == "*" or part.startswith("__") for part in fromlist or ())
        if not later or not plain or level:
            return builtins.__import__(name, globals, locals, fromlist, level)
        path = tuple(name.split("."))
        return StandIn(path if fromlist else path[:1], self)


@contextmanager
def _stand_ins(module: ModuleType, *names: str) -> Iterator[None]:
    """Lets a module import stand-ins for the packages that it only mentions while its body runs."""
    importing = _Importing((*names, *MENTIONED.get(module.__name__, ())))
    # CPython looks ``__import__`` up in what a module calls its builtins.
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importing}
    try:
        yield
    finally:
        importing.names = ()


@contextmanager
def _names_later(package: ModuleType) -> Iterator[None]:
    """Lets a package offer the names that its body takes from its own modules, and import each when asked."""
    with _stand_ins(package, package.__name__.partition(".")[0]):
        yield
    names = {name: value for name, value in vars(package).items() if isinstance(value, StandIn)}
    for name in names:
        delattr(package, name)

    def __getattr__(name: str) -> Any:  # noqa: N807  (PEP 562)
        if name in names and names[name].path != (*package.__name__.split("."), name):
            try:
                value = names[name].real()
            except AttributeError as error:
                # Passed on, it would say that the package has no such name.
                raise ImportError(f"{package.__name__}.{name}: {error}") from error
        elif name.startswith("__"):
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        else:
            try:  # The body would have imported the package's modules, by way of the names.
                value = importlib.import_module(f"{package.__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{package.__name__}.{name}":
                    raise
                raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}") from None
        setattr(package, name, value)
        return value

    package.__getattr__ = __getattr__  # type: ignore[method-assign]


@contextmanager
def _package_versions(module: ModuleType) -> Iterator[None]:
    """LLM Foundry asks `pkg_resources`, which setuptools 82 removed, for the versions of packages."""
    from importlib import metadata

    name = "pkg_resources"
    missing = name not in sys.modules and PathFinder.find_spec(name) is None
    if missing:
        sys.modules[name] = substitute = ModuleType(name)
        vars(substitute).update(
            get_distribution=metadata.distribution,
            DistributionNotFound=metadata.PackageNotFoundError,
        )
    try:
        yield
    finally:
        if missing:
            del sys.modules[name]


@contextmanager
def _no_future_warning(module: ModuleType) -> Iterator[None]:
    """MegaBlocks calls `torch.jit.script`, deprecated from torch 2.10, for a function that we never call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class _CompilerLater:
    """Stands at ``torch._dynamo`` until the compiler is imported; what each run calls does nothing."""

    graph_break = staticmethod(lambda: None)
    disable_nested_graph_breaks = nullcontext

    def disable(self, function: Callable[..., Any], *args: object, **keywords: object) -> Callable[..., Any]:
        """Keeps a function from being compiled once there is a compiler."""

        @functools.wraps(function)
        def inner(*call: object, **named: object) -> Any:
            if COMPILER not in sys.modules:
                return function(*call, **named)
            return sys.modules[COMPILER].disable(function, *args, **keywords)(*call, **named)

        return inner

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(COMPILER), name)


@contextmanager
def _compiler_later(torch: ModuleType) -> Iterator[None]:
    """Importing the compiler puts it where `_CompilerLater` stands."""
    yield
    if COMPILER not in sys.modules:
        torch._dynamo = _CompilerLater()  # type: ignore[attr-defined]


@contextmanager
def _compiler_if_there(module: ModuleType) -> Iterator[None]:
    """Lets functions of torch that import the compiler, only to keep out of it, see `_CompilerLater`."""

    def importing(name: str, *args: Any, **keywords: Any) -> Any:
        if name == COMPILER and name not in sys.modules:
            return sys.modules["torch"]
        return builtins.__import__(name, *args, **keywords)

    vars(module)["__builtins__"] = {**vars(builtins), "__import__": importing}
    yield


PREPARED: dict[str, Callable[[ModuleType], AbstractContextManager[None]]] = {
    **dict.fromkeys(MENTIONED, _stand_ins),
    **dict.fromkeys(LAZY_PACKAGES, _names_later),
    "llmfoundry.callbacks.env_logging_callback": _package_versions,
    "megablocks.layers.gelu": _no_future_warning,
    "torch": _compiler_later,
    "torch._compile": _compiler_if_there,
    "torch.optim.optimizer": _compiler_if_there,
}
"""A context in which a module is imported."""


class _PreparingFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module in `PREPARED` with a loader that prepares it."""
        if fullname not in PREPARED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _PreparingLoader(fullname, spec.loader.path)
        return spec


class _PreparingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Runs the module's body within what is in `PREPARED` for it."""
        with PREPARED[module.__name__](module):
            super().exec_module(module)
