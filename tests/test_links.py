"""Relative links of the pages lead to files that there are, and their anchors to headings."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "launch/**/*.md", ".github/*.md")
    for page in ROOT.glob(pattern)
)
CODE = re.compile(r"^( *```).*?^\1 *$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Returns the anchors that GitHub and the site give a page's headings."""
    anchors: list[str] = []
    blocks = re.sub(r"^( *```).*?^\1 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.+?) *$", blocks, flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        anchors.append(anchor if anchor not in anchors else f"{anchor}-{anchors.count(anchor)}")
    return set(anchors)


def broken_links(page: Path) -> list[str]:
    """Returns the relative links of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# On `a.b`: c, [d](e.md)\n\n```sh\n# No heading\n```\n## Two\n## Two\n"
    )
    links = (
        "other.md",
        "other.md#on-ab-c-d",
        "other.md#two-1",
        "#here",
        "none.md",
        "other.md#no-heading",
        "#there",
    )
    (tmp_path / "page.md").write_text("# Here\n" + "".join(f"[x]({link})\n" for link in links))
    assert broken_links(tmp_path / "page.md") == ["none.md", "other.md#no-heading", "#there"]
