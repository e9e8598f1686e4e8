import numpy as np

from data.corpus import Document
from data.split import near_identical_groups, split_documents


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 40 lines, each line of three words out of many."""
    rng = np.random.default_rng(seed)
    return [
        "\n".join(" ".join(map(str, row)) for row in rng.integers(0, 10_000, (40, 3))) for _ in range(count)
    ]


def edited(text: str, lines: int) -> str:
    parts = text.split("\n")
    return "\n".join(["changed", *parts[lines:]])


def documents(of: list[str]) -> list[Document]:
    return [Document("code", str(number), text) for number, text in enumerate(of)]


def test_near_identical_documents_are_found_and_others_are_not():
    originals = texts(30)
    groups = near_identical_groups([*originals, edited(originals[3], 4), edited(originals[7], 8)])
    assert groups[30] == groups[3] and groups[31] == groups[7]
    assert len(set(groups)) == 30


def test_copies_are_on_the_same_side_at_any_place():
    originals = texts(300)
    everything = [*originals, *(edited(text, 3) for text in originals)]
    sides = split_documents(documents(everything))
    assert sides[:300] == sides[300:]
    assert 0.005 < sides.count("validation") / 600 < 0.08
    backwards = split_documents(documents(everything[::-1]))
    assert backwards[::-1] == sides


def test_a_side_does_not_depend_on_unrelated_documents():
    some, more = texts(200), texts(100, seed=1)
    assert split_documents(documents(some + more))[:200] == split_documents(documents(some))


def test_no_side_is_empty():
    for count in (2, 3, 10):
        assert set(split_documents(documents(texts(count)))) == {"train", "validation"}
    assert split_documents(documents(texts(1))) == ["train"] or split_documents(documents(texts(1)))
