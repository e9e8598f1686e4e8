"""Imports that wait: what a run's start imports, that every entry is needed, and that nothing is hidden."""

import ast
import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from train import lazy_imports
from train.lazy_imports import COMPILER, LAZY_PACKAGES, MENTIONED, PREPARED

ROOT = Path(__file__).resolve().parents[2]

HEAVY = {
    "accelerate",
    "coolname",
    "datasets",
    "google.cloud.storage",
    "libcloud",
    "llmfoundry",
    "matplotlib",
    "mcli",
    "mlflow",
    "pandas",
    "paramiko",
    "PIL.Image",
    "pyarrow",
    "requests",
    "scipy",
    "sklearn",
    "torchvision",
    "transformers",
}
"""No run imports these before its first step, unless its recipe asks for what they do."""
OTHERS = {"datasets", "google.cloud.storage", "libcloud", "llmfoundry", "mlflow", "pyarrow"}
"""Those that Composer does not import by itself."""


def run(code: str, *options: str) -> str:
    """Returns what an interpreter of its own prints."""
    words = [sys.executable, "-W", "error::FutureWarning", *options, "-c", textwrap.dedent(code)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_start_imports_no_heavy_package_and_whoever_uses_something_gets_the_real_one() -> None:
    code = """
    import sys, train, torch
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert "torch._dynamo" not in sys.modules
    import train.run
    from composer import Trainer
    Trainer
    print(*sys.modules)
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    assert torch.equal(compiled(weight), weight.sin() + 1) and len(graphs) == 1
    assert torch._dynamo is sys.modules["torch._dynamo"]
    optimizer.step()  # A call that was made before the compiler was there.
    assert len(graphs) == 1

    from composer.callbacks import MLPerfCallback
    from composer.models import HuggingFaceModel
    from composer.utils import add_vision_dataset_transform, misc
    from torchmetrics import MetricCollection, functional
    assert isinstance(MLPerfCallback, type) and isinstance(HuggingFaceModel, type)
    assert misc.transforms.Compose is sys.modules["torchvision.transforms"].Compose
    assert functional.accuracy is sys.modules["torchmetrics.functional.classification.accuracy"].accuracy
    """
    imported = set(run(code).split())
    heavy = HEAVY | {COMPILER}
    if Version(torch.__version__) < Version("2.11"):
        heavy -= {COMPILER}  # FlexAttention imports it.
    if Version(version("huggingface-hub")) < Version("1"):
        heavy -= {"requests"}
    assert "composer.trainer.trainer" in imported
    assert imported & heavy == set()


@pytest.mark.slow
def test_otherwise_composer_imports_them_all() -> None:
    code = "import sys, composer; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert (HEAVY - OTHERS) | {COMPILER} <= set(result.stdout.split())


def source_of(module: str) -> ast.Module:
    """Parses the source of a module without importing its packages."""
    top, *rest = module.split(".")
    spec = PathFinder.find_spec(top)
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*rest)
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def imports_of(tree: ast.Module, *, of_functions: bool) -> set[str]:
    """Names the modules that a source imports at its top, or also within functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif of_functions or not isinstance(node, ast.FunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("package", LAZY_PACKAGES)
def test_a_lazy_package_gathers_names_and_does_nothing_with_them(package: str) -> None:
    tree, top = source_of(package), package.partition(".")[0]
    gathered = {
        name.asname or name.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{top}.")
        for name in node.names
    } - {"__version__", "*"}
    assert gathered, "imports nothing of its own: take it out"
    others = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    others = [node for node in others if not isinstance(getattr(node, "value", None), ast.Name)]  # a = b
    used = {name.id for node in others for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert not gathered & used


@pytest.mark.parametrize("module", MENTIONED)
def test_what_is_mentioned_is_still_imported_at_the_top(module: str) -> None:
    imported = imports_of(source_of(module), of_functions=False)
    for name in MENTIONED[module]:
        assert any(f"{each}.".startswith(f"{name}.") for each in imported), f"{name}: take it out"


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("llmfoundry.callbacks.env_logging_callback", "pkg_resources"),
        ("torch._compile", COMPILER),
        ("torch.optim.optimizer", COMPILER),
    ],
)
def test_what_is_prepared_is_still_imported(module: str, imported: str) -> None:
    assert module in PREPARED
    assert imported in imports_of(source_of(module), of_functions=True), "take it out"


def test_megablocks_still_compiles_a_function_by_a_deprecated_call() -> None:
    decorators = [
        ast.unparse(decorator)
        for node in source_of("megablocks.layers.gelu").body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    ]
    assert "torch.jit.script" in decorators, "take it out"


def test_torch_still_asks_its_compiler_in_each_run() -> None:
    assert isinstance(vars(torch)["_dynamo"], lazy_imports._CompilerLater) or COMPILER in sys.modules
    source = Path(torch.__file__).parent
    assert "torch._dynamo.graph_break()" in (source / "optim/optimizer.py").read_text()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that gathers names, one from a module that mentions a package which is not installed."""
    files = {
        "__init__.py": "from gathers import plain\nfrom gathers.plain import value as renamed\n"
        "from gathers.mentions import kind_of, work\nfrom gathers.broken import anything\nhere = 1\n",
        "plain.py": "value = 7\n",
        "mentions.py": "from missing.parts import Part\nimport missing.tools as tools\n"
        "def kind_of(x: Part): return isinstance(x, Part)\ndef work(): return tools.build()\n",
        "broken.py": "import missing\n",
    }
    (tmp_path / "gathers").mkdir()
    for name, text in files.items():
        (tmp_path / "gathers" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PREPARED, "gathers", PREPARED["composer"])
    monkeypatch.setitem(PREPARED, "gathers.mentions", PREPARED["composer.utils.misc"])
    monkeypatch.setitem(MENTIONED, "gathers.mentions", ("missing",))
    yield "gathers"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gathers", "missing")]:
        del sys.modules[name]


def test_names_of_a_package_are_imported_when_asked_for(package: str) -> None:
    gathers = importlib.import_module(package)
    assert gathers.here == 1 and "gathers.plain" not in sys.modules
    assert gathers.renamed == 7 and "gathers.plain" in sys.modules
    assert "renamed" in vars(gathers)
    assert gathers.plain.value == 7
    with pytest.raises(AttributeError, match="'gathers' has no attribute 'nothing'"):
        getattr(gathers, "nothing")  # noqa: B009
    with pytest.raises(ModuleNotFoundError, match="missing"):
        getattr(gathers, "broken")  # noqa: B009
    with pytest.raises(ModuleNotFoundError, match="missing"):
        getattr(gathers, "anything")  # noqa: B009


def test_what_is_mentioned_is_imported_when_it_is_used(package: str, tmp_path: Path) -> None:
    gathers = importlib.import_module(package)
    assert not gathers.kind_of(3)
    with pytest.raises(ModuleNotFoundError, match="missing"):
        gathers.work()
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing/parts.py").write_text("class Part: pass\n")
    (tmp_path / "missing/tools.py").write_text("def build(): return 'built'\n")
    importlib.invalidate_caches()
    assert gathers.work() == "built"
    part = importlib.import_module("missing.parts").Part()
    assert gathers.kind_of(part) and not gathers.kind_of(3)


def test_versions_of_packages_are_found_without_setuptools() -> None:
    code = """
    import sys
    from types import ModuleType
    from train.lazy_imports import PREPARED
    with PREPARED["llmfoundry.callbacks.env_logging_callback"](ModuleType("any")):
        import pkg_resources
    assert "pkg_resources" not in sys.modules and not hasattr(pkg_resources, "__file__")
    try:
        pkg_resources.get_distribution("no-such-package")
    except pkg_resources.DistributionNotFound:
        print("not found")
    """
    assert run(code, "-S") == "not found\n"  # Without site-packages.
