import ast
import inspect
import struct
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from data.text.installed import LANGUAGES, docstrings, domain_of_source, installed_corpus
from data.text.quality import is_generated, is_good_code, is_good_prose
from train.recipe.errors import UserError


def story(name: str) -> str:
    """Returns prose of 24 lines about a topic."""
    line = "That is the story of a {} which lived with the birds of the wood.\nThey have all been friends.\n"
    return line.format(name) * 12


def module_text(name: str) -> str:
    return f'"""{story(name)}"""\n\n\ndef {name}(value):\n    return value + len("{name}")\n' * 3


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two packages that vendor each other's file, with documentation and a licence."""
    files = {
        "one/alpha.py": module_text("alpha"),
        "one/beta.py": module_text("beta"),
        "one/gamma.py": module_text("gamma"),
        "one/delta.py": module_text("delta"),
        "two/_vendor/alpha.py": module_text("alpha") + "# changed a little\n",
        "two/copy_of_beta.py": module_text("beta"),
        "two/__pycache__/x.py": module_text("cache"),
        "one-1.0.dist-info/METADATA": "Name: one\nVersion: 1.0\n\n" + story("bear"),
        "one-1.0.dist-info/licenses/LICENSE.txt": story("lawyer"),
        "one/README.md": story("hare"),
        "one/binary.txt": story("\0"),
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "site/one/latin.txt").write_bytes(story("é").encode("latin-1"))
    return {"packages": tmp_path / "site"}


def test_domains_and_names(folders: dict[str, Path]):
    documents = list(installed_corpus(10_000_000, folders))
    names = {document.name for document in documents}
    assert {"packages/one-1.0.dist-info/METADATA", "packages/one/README.md"} <= names
    assert not any(
        "LICENSE" in name or "cache" in name or "latin" in name or "binary" in name
        for name in names
        if name.startswith("packages")
    )
    metadata = next(d.text for d in documents if d.name.endswith("METADATA"))
    assert metadata.startswith("That is the story of a bear")
    # Python's reference topics are also prose.
    assert any(name.startswith("stdlib/pydoc_data/topics.py#") for name in names)


def test_a_source_file_serves_one_domain_and_so_do_its_copies(folders: dict[str, Path]):
    documents = list(installed_corpus(10_000_000, folders))
    for animal in ("alpha", "gamma", "delta"):
        domains = {document.domain for document in documents if f"story of a {animal}" in document.text}
        assert len(domains) == 1
    assert domain_of_source("packages/a/_vendor/rich/console.py") == domain_of_source("stdlib/console.py")
    assert domain_of_source("packages/a/rich/__init__.py") == domain_of_source("packages/rich/__init__.py")


def test_no_text_comes_twice(folders: dict[str, Path]):
    texts = Counter(document.text for document in installed_corpus(10_000_000, folders))
    assert max(texts.values()) == 1


def test_order_is_the_same_each_time_and_the_bound_holds(folders: dict[str, Path]):
    stdlib = {"stdlib": Path(sysconfig.get_path("stdlib")) / "email", **folders}
    one, other = (list(installed_corpus(400_000, stdlib)) for _ in range(2))
    assert one == other
    for domain in ("code", "prose"):
        size = sum(len(document.text.encode()) for document in one if document.domain == domain)
        assert 0 < size <= 400_000


def catalogue(messages: dict[str, str]) -> bytes:
    """A compiled message catalogue (GNU gettext's manual, "The Format of GNU MO Files")."""
    pairs = sorted((key.encode(), text.encode()) for key, text in messages.items())
    tables, texts = [b"", b""], b""
    start = 28 + 16 * len(pairs)
    for table in (0, 1):
        for pair in pairs:
            tables[table] += struct.pack("<II", len(pair[table]), start + len(texts))
            texts += pair[table] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    return head + tables[0] + tables[1] + texts


def test_messages_are_what_catalogues_translate(tmp_path: Path):
    header = "Content-Type: text/plain; charset=UTF-8\n"
    many = {f"say {n:04}": f"Sagt dem Bären Nummer {n}, dass er gehen kann." for n in range(600)}
    files = {
        "de/tell.mo": {"": header, "one\0more": "ein Bär\0viele Bären", "OK": "OK", **many},
        "fr/tell.mo": {"": header, "bye": "au revoir"},
        "xx/tell.mo": {"": header, "bye": "na na"},
    }
    for name, messages in files.items():
        path = tmp_path / name.replace("/", "/LC_MESSAGES/")
        path.parent.mkdir(parents=True)
        path.write_bytes(catalogue(messages))
    (tmp_path / "de/LC_MESSAGES/damaged.mo").write_bytes(b"not one")
    documents = list(installed_corpus(10_000_000, {"locale": tmp_path}, ["messages"]))
    assert {document.domain for document in documents} == {"messages"} and "xx" not in LANGUAGES
    by_name = {document.name: document.text for document in documents}
    assert by_name.pop("locale/tell.mo/fr#0") == "au revoir\n"
    lines = "".join(by_name[f"locale/tell.mo/de#{n}"] for n in range(len(by_name))).splitlines()
    assert len(by_name) > 2 and lines == ["ein Bär", "viele Bären", *many.values()]
    # Only recipes that name them read them, and no program provides more than a twentieth.
    assert not list(installed_corpus(10_000_000, {"locale": tmp_path}, []))
    assert (
        sum(len(d.text.encode()) for d in installed_corpus(200_000, {"locale": tmp_path}, ["messages"]))
        < 10_000
    )
    with pytest.raises(UserError, match=r"data.domains: has messages, but .* has no message catalogue in de"):
        list(installed_corpus(10_000_000, {"locale": tmp_path / "nowhere"}, ["messages"]))


def test_no_package_takes_more_than_its_share():
    documents = list(installed_corpus(400_000))
    for domain in ("code", "prose"):
        by_package: Counter[str] = Counter()
        for document in documents:
            if document.domain == domain:
                by_package["/".join(document.name.split("/")[:2])] += len(document.text.encode())
        assert by_package.total() > 300_000 and max(by_package.values()) <= 20_000


@pytest.mark.parametrize("name", ["argparse", "inspect", "ast", "email.message", "statistics", "typing"])
def test_docstrings_are_those_that_the_parser_finds(name: str):
    path = Path(sysconfig.get_path("stdlib")) / (name.replace(".", "/") + ".py")
    source = path.read_text()
    expected = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            # A backslash is spelled out in the source, and strings in single quotes are not searched.
            if text and "\\" not in text and f'"""{text}' in source:
                expected.append(inspect.cleandoc(text))
    found = docstrings(source)
    assert len(expected) > 10 and not set(expected) - set(found)
    assert len(set(found)) < 1.1 * len(set(expected)) + 5


def test_strings_that_are_no_docstrings_are_left_alone():
    source = (
        "# c'mon\n'''first'''\nx = '''no'''\n"
        "def f():\n    r'''yes\n      more'''\n    y = \"'''\"\n    g('''no''')\n"
    )
    assert docstrings(source) == ["first", "yes\nmore"]


def test_code_that_is_no_ones_handwriting_is_left_out():
    good = module_text("alpha")
    assert is_good_code(good)
    assert not is_good_code("x = 1\n")
    assert not is_good_code(good + "y = '" + "a" * 1001 + "'\n")
    assert not is_good_code("# Auto-generated by protoc\n" + good) and is_generated("# DO NOT EDIT\n")
    assert not is_good_code("x = [\n" + "    [+-*/=, ;:(){}]\n" * 100 + "]\n")
    assert not is_good_code(good * 500)


def test_prose_that_nobody_reads_is_left_out():
    good = story("fox")
    assert is_good_prose(good)
    assert not is_good_prose("the cat and the dog")
    assert not is_good_prose(" ".join(map(str, range(500))) + " the and of")
    assert not is_good_prose("\n".join(f"- {line}" for line in good.split("\n")))
    assert not is_good_prose(
        good.replace("the", "la").replace("of", "de").replace("and", "y").replace("with", "")
    )
    assert not is_good_prose(good.replace(" ", " # "))
