"""Personal data is found by its form and checksum, and little else is; a kind has a name in its place."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from data.text.engines import Processes
from data.text.personal import KINDS, count, find, replaced
from data.write_shards import build_shards, describe
from train.recipe.errors import UserError
from train.recipe.preparation import PersonalData, Preparation, Source, SourceKind, Threshold
from train.recipe.schema import LossMean, Recipe

FACTS = {"dataset": "tales", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("write to anna.b-c+x@mail.web.org, or joe@web.de.", "write to <EMAIL>, or <EMAIL>."),
        ("联系abc@x.com联系", "联系<EMAIL>联系"),
        ("<a href='mailto:%20joe@xn--mller-kva.de'>", "<a href='mailto:%<EMAIL>'>"),
        ("+49 30 901820, +44 (0)20 7946 0958; tel:+4930901820", "<PHONE>, <PHONE>; tel:<PHONE>"),
        ("(212) 555-0123 or 212-555-0123 or +1 212-555-1234.", "<PHONE> or <PHONE> or <PHONE>."),
        ("+33 1 23 45 67 89  12 34", "<PHONE>  12 34"),
        ("from 81.2.69.142:8080 and [2a00:1450:4001:824::200e]", "from <IP>:8080 and [<IP>]"),
        ("4111 1111 1111 1111, 5500-0000-0000-0004, 378282246310005", "<CARD>, <CARD>, <CARD>"),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC and GB82WEST12345698765432.", "IBAN <IBAN> BIC and <IBAN>."),
    ],
)
def test_what_is_found(text: str, after: str) -> None:
    assert replaced(text, find(text)) == after


@pytest.mark.parametrize(
    "text",
    [
        "git@github.com:user/repo.git, icon@2x.png, joe@example.com, a@b, @decorator.name, x = a @ b.T",
        "version 81.22.69.142, Chrome/102.0.5005.61, 1.2.3.4, 8.8.8.8, 10.11.12.130, 192.168.100.200",
        "OID 1.3.101.110 and 2.16.840.1.113883; 129.213.176.0/24; section 12.34.56.78.90",
        "2001:db8::1, fe80::1, ::1, abc::def, std::vector<int>, 12:34:56, 00:1a:2b:3c:4d:5e",
        "4111 1111 1111 1112, 1234567812345670, 0.4111111111111111, 0x4111111111111111, 1764408000000000",
        "DE89 3704 0044 0532 0130 01, GB82WEST12345698765433, AB12CDEF34567890",
        "DFARS 252.227-7013, Decimal('+35236450.6'), x+4930901820, 1e+12345678, +1234567890, +999 123 4567",
        "978-3-16-148410-0, 2026-11-29 10:11:12, 555-0123, d41d8cd98f00b204e9800998ecf8427e",
        "-1.0000000  +0.12345678  +3.14159265, [+1, +2, +3, +4, +5, +6, +7, +8], a[+12345678]",
    ],
)
def test_what_is_not_found(text: str) -> None:
    assert find(text) == []


def test_checksums_leave_one_number_in_ten_and_one_in_97() -> None:
    rng = random.Random(0)
    cards = sum(bool(find(f"4{rng.randrange(10**15):015}")) for _ in range(2000))
    ibans = sum(bool(find(f"DE{rng.randrange(10**20):020}")) for _ in range(4000))
    assert 150 < cards < 250 and 20 < ibans < 65


def test_source_code_is_hardly_touched() -> None:
    """Of our own code: no number is taken for one of a person."""
    root = Path(__file__).parents[3]
    files = [
        path for part in ("data", "train", "launch", "docs") for path in sorted((root / part).rglob("*.*"))
    ]
    texts = [path.read_text() for path in files if path.suffix in (".py", ".md", ".js") and path.is_file()]
    assert len(texts) > 200
    assert [text[it.begin : it.end] for text in texts for it in find(text)] == []


UNITS = [
    "a",
    "@",
    "1",
    "1 ",
    "+",
    "+1",
    "+49 ",
    "4111 ",
    "4111-",
    "DE89 ",
    "AB12",
    "1.",
    "1.1.1.1",
    "2a00:",
    "::",
    "a@",
]
UNITS += [
    "a@b.",
    "(212) ",
    "212-",
    "+1 (",
    "+49((((",
    "a" * 64 + "é@",
    "@" + "a" * 63 + ".",
    "DE89 ABCD ABCD ",
    "+1  ",
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_no_text_takes_more_than_its_share_of_time(unit: str) -> None:
    short, long = (min(_seconds(unit * (size // len(unit))) for _ in range(3)) for size in (20_000, 160_000))
    assert long < 24 * max(short, 1e-3)  # The square would be 64 times as long.


def _seconds(text: str) -> float:
    begin = time.process_time()
    find(text)
    return time.process_time() - begin


def recipe_of(folder: Path, make: Callable[..., Recipe], shards: str, **changes: Any) -> Recipe:
    texts = [f"Tale {n} of {'the sea ' * (n % 7)}, told by teller{n}@sea.org ({n})" for n in range(30)]
    texts += [texts[3], "Her card is 4111 1111 1111 1111, her number +49 30 901820.", "no tale"]
    rows: list[dict[str, Any]] = [{"text": text} for text in texts]
    (folder / "tales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(
        domain="prose", kind=SourceKind.jsonl, path=str(folder / "tales.jsonl"), **(FACTS | changes)
    )
    preparation = Preparation(near_duplicates=None)
    return make(folder / shards, sources=[source], domains={"prose": 1.0}, preparation=preparation)


@pytest.mark.slow
def test_it_is_counted_or_replaced_in_shards(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    wanted = dict.fromkeys(KINDS, 0) | {"emails": 30, "phones": 1, "card_numbers": 1}
    for treatment, word in ((PersonalData.count, "left"), (PersonalData.replace, "replaced")):
        recipe = recipe_of(tmp_path, make_recipe, treatment.value, pii=treatment)
        manifest = build_shards(recipe, engine=Processes(1))
        assert manifest.domains["prose"].personal_data == wanted
        assert manifest.domains["prose"].rejected == {"exact duplicate": 1}
        line = f"prose: personal data, {word}: 30 emails, 1 phones, 0 ip addresses, 1 card numbers, 0 ibans"
        assert line in describe(manifest, Path(recipe.data.shards)).splitlines()
        table = parquet.read_table(Path(recipe.data.shards) / "prose/scores.parquet").to_pylist()
        for row in table:
            has_names = "<EMAIL>" in row["excerpt"] or "<CARD>" in row["excerpt"]
            assert has_names == (treatment is PersonalData.replace and row["excerpt"] != "no tale\n")
            assert all(row[kind] == value for kind, value in count(find(row["excerpt"])).items()) or has_names
    few = recipe_of(
        tmp_path, make_recipe, "few", pii=PersonalData.count, thresholds=[Threshold("emails", at_most=0)]
    )
    assert build_shards(few, engine=Processes(1)).domains["prose"].rejected == {"emails": 31}
    assert (
        build_shards(recipe_of(tmp_path, make_recipe, "off"), engine=Processes(1))
        .domains["prose"]
        .personal_data
        is None
    )
    off = recipe_of(tmp_path, make_recipe, "bad", thresholds=[Threshold("emails", at_most=0)])
    with pytest.raises(
        UserError, match=r"data.sources\[0\].pii: is off, but the personal data of texts is asked for"
    ):
        build_shards(off)


@pytest.mark.slow
def test_of_conversations_the_words_are_treated(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    rows = [
        {"prompt": f"Mail {n} to a{n}@sea.org", "response": f"Or call +49 30 9018{n:02} now."}
        for n in range(12)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(
        "prose", SourceKind.instructions, str(tmp_path / "asked.jsonl"), pii=PersonalData.replace, **FACTS
    )  # type: ignore[arg-type]
    recipe = make_recipe(
        tmp_path / "shards",
        sources=[source],
        domains={"prose": 1.0},
        preparation=Preparation(near_duplicates=None),
    )
    assert recipe.training.loss_mean is not LossMean.targets
    record = build_shards(recipe, engine=Processes(1)).domains["prose"]
    assert record.personal_data == dict.fromkeys(KINDS, 0) | {"emails": 12, "phones": 12}
    table = parquet.read_table(tmp_path / "shards/prose/scores.parquet").to_pylist()
    assert {row["excerpt"].partition("Or")[2] for row in table} == {" call <PHONE> now."}
