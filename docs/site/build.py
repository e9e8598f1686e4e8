"""Builds the documentation site: `make docs`. A warning, such as a link that leads nowhere, is an error.

The pages are copied to a folder of their own and laid out as in the repository, so that every relative link
means the same on GitHub and here; the README is the first page.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
BUILD = ROOT / ".cache/site"
SOURCE, HTML = BUILD / "source", BUILD / "html"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/experiments/README.md", "docs/*.md")
CODE = ("train", "data", "launch")
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def stage() -> None:
    """Copies the pages with their links and pictures, and writes those that are generated."""
    sys.path.insert(0, str(ROOT))
    from reference import reference

    shutil.rmtree(SOURCE, ignore_errors=True)
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        target = SOURCE / page.relative_to(ROOT)
        if target == SOURCE / "README.md":
            target = SOURCE / "index.md"
        write(target, LINK.sub(lambda link, page=page: followed(link, page), page.read_text()))
    with (SOURCE / "index.md").open("a") as stream:
        stream.write((SITE / "contents.md").read_text())
    write(SOURCE / "docs/reference.rst", reference())
    packages = sorted({file.parent for top in CODE for file in (ROOT / top).rglob("*.py")})
    names = [".".join(folder.relative_to(ROOT).parts) for folder in packages]
    for folder, name in zip(packages, names, strict=True):
        write(SOURCE / f"api/{name}.md", package_page(folder, name))
    write(SOURCE / "api/index.md", (SITE / "api.md").read_text() + contents(names))


def followed(link: re.Match[str], page: Path) -> str:
    """Returns a link as the site has it: modules lead to pages of the API, other files are downloads."""
    target, anchor = link[1], link[2] or ""
    if target.startswith("http"):
        return link[0]
    file = (page.parent / target).resolve().relative_to(ROOT)
    if file == Path("README.md") or (ROOT / file).is_dir():
        return f"](/index.md{anchor})"
    if file.suffix == ".py":
        is_command = file.stem == "__main__"  # It has no page of its own.
        name = f"{'.'.join(file.parts[:-1])}.md" if is_command else f"{file.with_suffix('')}/index.rst"
        return f"](/api/{name})"
    if file.suffix != ".md":
        (SOURCE / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, SOURCE / file)
    return link[0]


def package_page(folder: Path, name: str) -> str:
    """Returns the page of a package: its modules, each with the first line of its docstring."""
    modules = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    place = f"/api/{folder.relative_to(ROOT)}"
    rows = ""
    for module in modules:
        said = ast.get_docstring(ast.parse((folder / f"{module}.py").read_text())) or ""
        first = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", said.partition("\n\n")[0].replace("\n", " ")).replace(
            "|", r"\|"
        )
        rows += f"| [{module}]({place}/{module}/index.rst) | {first} |\n"
    head = f"# {name}\n\n| module | |\n|---|---|\n{rows}"
    return head + contents([f"{place}/{module}/index" for module in modules], hidden=True)


def contents(pages: list[str], *, hidden: bool = False) -> str:
    """Returns a table of contents for the side bar, and for the page unless it is hidden."""
    options = [":hidden:"] if hidden else [":maxdepth: 1"]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def write(path: Path, text: str) -> None:
    """Writes a page of the copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    stage()
    shutil.rmtree(HTML, ignore_errors=True)
    arguments = ["-b", "html", "-c", str(SITE), "-d", str(BUILD / "doctrees"), "-W", "--keep-going", "-q"]
    status = sphinx([*arguments, *sys.argv[1:], str(SOURCE), str(HTML)])
    if status == 0:
        print(f"docs: open {HTML / 'index.html'}")
    sys.exit(status)
