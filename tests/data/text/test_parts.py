"""Parts of data preparation against references: Streaming's writer, Jaccard similarity, real sentences."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.shards.packing import pack
from data.text import duplicates, quality
from data.text.bpe import train_bpe
from data.text.clean import clean, normalise, read_texts, write_texts
from data.text.duplicates import resolve, sketch
from data.text.evaluation_overlap import EvaluationTexts
from data.text.inputs import Chunk, SourceFile
from data.text.job import PreparationJob
from data.text.language import language_of
from data.text.losses import require_readable_sources, table_of_languages
from data.text.mds import (
    compress_shard,
    encode_shard,
    index_entry,
    index_text,
    packed_name,
    shard_name,
)
from data.text.quality import (
    CODE,
    PROSE_REPETITION,
    PROSE_WORDS,
    code_scores,
    first_violation,
    is_good_prose,
    repetition_scores,
    word_scores,
)
from data.text.repositories import Portion
from data.text.tokens import open_once, plan_shards
from data.text.words import hash_ngrams, hash_words
from train.recipe.preparation import Preparation, Quality, Source, SourceKind
from train.recipe.schema import Tokenizer, TokenizerKind


def test_a_tokenizer_that_took_anothers_place_is_opened(tmp_path: Path):
    # Spark's processes outlive a build, and the next build may use the same folder.
    cfg = Tokenizer(TokenizerKind.bpe, 270)
    made = [train_bpe(cfg, iter([text * 9])) for text in ("the cat sat on the mat ", "xyz zyx yxz ")]
    for handle in made:
        handle.to_hugging_face(tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "out")
        assert open_once(cfg, tmp_path / "out").fingerprint == handle.fingerprint
        assert open_once(cfg, tmp_path / "out") is open_once(cfg, tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"old-{handle.fingerprint}")
    assert made[0].fingerprint != made[1].fingerprint


@pytest.mark.parametrize("sequence_tokens, level", [(8, None), (700, None), (8, 5)])
def test_shards_are_those_of_streamings_writer(tmp_path: Path, sequence_tokens: int, level: int | None):
    from streaming import MDSWriter
    from streaming.base.compression import decompress

    rng = np.random.default_rng(0)
    documents = [
        (n, rng.integers(0, 99, length).astype(np.int32)) for n, length in enumerate([5, 1, 900, *[0] * 400])
    ]
    samples = list(pack(documents, sequence_tokens=sequence_tokens, eos_id=100, pad_id=101))
    columns = {
        "documents": "bytes",
        "lengths": "bytes",
        "tokens": f"ndarray:int32:{sequence_tokens}",
    }  # fmt: skip
    name = level and f"zstd:{level}"
    with MDSWriter(
        columns=columns, out=str(tmp_path / "theirs"), hashes=["sha256"], compression=name
    ) as writer:
        for sample in samples:
            pieces = {"documents": sample.documents.tobytes(), "lengths": sample.lengths.tobytes()}
            writer.write(vars(sample) | pieces)
    content = encode_shard(samples, sequence_tokens, level)
    if level is None:
        assert content == (tmp_path / "theirs" / shard_name(0)).read_bytes()
        entry = index_entry(0, content, len(samples), sequence_tokens)
    else:
        theirs = (tmp_path / "theirs" / packed_name(0)).read_bytes()
        assert content == decompress(name, theirs) == decompress(name, compress_shard(content, level))
        entry = index_entry(0, content, len(samples), sequence_tokens, (level, theirs))
    assert index_text([entry]) == (tmp_path / "theirs/index.json").read_text()


@pytest.mark.parametrize("seed", range(6))
def test_shards_are_planned_from_the_chunks_that_overlap_them(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    source = Source(domain="d", kind=SourceKind.jsonl, path="", dataset="", version="", origin="", licence="")
    job = PreparationJob(tmp_path, (source,), Preparation(), (), Tokenizer(), 1 << 20, False)
    tokens = rng.integers(0, 1 << 24, 40) * rng.integers(0, 2, 40)
    sides = [{"tokens": int(n), "documents": 3} for n in tokens]
    encoded = [{"documents": 5, "train": side, "validation": {"tokens": 0}} for side in sides]
    tasks = plan_shards(job, [Portion(n, 0, "", "") for n in range(40)], encoded)
    ends = np.cumsum(tokens)
    at = 0
    for task in tasks:
        assert task.tokens[0] == at < task.tokens[1]
        at = task.tokens[1]
        overlap = np.minimum(ends, at) - np.maximum(ends - tokens, task.tokens[0])
        assert [it.portion for it in task.segments] == np.flatnonzero(overlap > 0).tolist()
        for it in task.segments:
            assert (it.first_token, it.first_document) == (
                ends[it.portion] - tokens[it.portion],
                5 * it.portion,
            )
    assert at == ends[-1]


class Passes(list[Any]):
    """A list that counts how often it is gone through."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return super().__iter__()


def test_many_sources_and_domains_take_one_pass_over_the_chunks(tmp_path: Path):
    facts = {"kind": SourceKind.jsonl, "path": "", "version": "", "origin": "", "licence": ""}
    sources = tuple(Source(domain=f"d{n}", dataset=f"s{n}", **facts) for n in range(300))
    job = PreparationJob(tmp_path, sources, Preparation(), (), Tokenizer(), 1 << 20, False)
    chunks = Passes(Chunk(n, n, (), 0, 0) for n in range(300))
    side = {"tokens": 5, "documents": 1}
    encoded = [{"documents": 2, "train": side, "validation": side} for _ in chunks]
    portions = Passes(Portion(n, n, "", "") for n in range(300))
    assert len(plan_shards(job, portions, encoded)) == 600
    require_readable_sources(job, chunks, [{"kept": 1, "rejected": {}}] * 300)
    assert (portions.count, chunks.count) == (1, 2)


def prose_violation(text: str) -> str:
    return first_violation(word_scores(text, language_of(text)), PROSE_WORDS)


def repetition_violation(text: str) -> str:
    return first_violation(repetition_scores(text), PROSE_REPETITION)


def texts(count: int, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[f"w{n}" for n in rng.integers(0, 5000, 400)] for _ in range(count)]


def resolved(documents: list[str], near: float | None):
    words = [hash_words(text) for text in documents]
    digests = np.array([[hash(text) & 2**63 - 1, 7] for text in documents], np.uint64)
    return resolve(digests, np.concatenate([sketch(it) for it in words]), near)


def test_copies_and_near_copies_are_found_and_the_first_is_kept():
    originals = texts(40)
    near = [*originals[3][:-10], "other", "end"]
    like = [*originals[5][:330], *texts(1, seed=9)[0][:70]]
    documents = [" ".join(words) for words in [*originals, originals[1], near, like]]
    found = resolved(documents, 0.8)
    assert found.keeper[:40].tolist() == list(range(40)) and found.keeper[40:42].tolist() == [1, 3]
    assert found.is_exact[40] and not found.is_exact[41]
    # Similar: kept, but in the same split.
    assert found.keeper[42] == 42 and found.group[42] == found.group[5] and found.group[6] != found.group[5]
    assert resolved(documents, None).keeper[41] == 41 and resolved(documents, None).keeper[40] == 1


def test_bands_are_those_of_datasketchs_index():
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=duplicates.SAME_SIDE, num_perm=128)
    assert (index.b, index.r) == (duplicates.BANDS, duplicates.BAND_ROWS)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 300, 150_000])
def test_signatures_are_datasketchs(count: int):
    from datasketch import MinHash

    shingles = np.random.default_rng(count).integers(0, 2**64, count, np.uint64)
    ours = duplicates.signature(np.r_[shingles, shingles[:9]]).reshape(-1, duplicates.PARTS)
    there = np.unique(shingles >> np.uint64(62)).tolist()
    for part in range(duplicates.PARTS):
        used = next((it for it in [*there, *(it + 4 for it in there)] if it >= part), 0) % 4
        theirs = MinHash(num_perm=duplicates.PERMUTATIONS // duplicates.PARTS, hashfunc=int)
        mine = shingles[shingles >> np.uint64(62) == used]
        theirs.update_batch((mine & np.uint64(2**32 - 1)).tolist())
        assert np.array_equal(ours[:, part], theirs.hashvalues)


@pytest.mark.parametrize("count, edges", [(0, 0), (1, 0), (60, 20), (60, 45), (3000, 2500), (3000, 2999)])
def test_components_are_scipys(count: int, edges: int):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(edges)
    pairs = rng.integers(0, max(count, 1), (edges, 2))
    if edges == count - 1 > 0:  # one chain, in no order
        order = rng.permutation(count)
        pairs = np.stack([order[:-1], order[1:]], 1)[rng.permutation(edges)]
    least = duplicates.first_of_component(pairs, count)
    if not count:
        assert least.size == 0
        return
    graph = coo_array((np.ones(edges), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    assert least.tolist() == [int(np.flatnonzero(labels == label)[0]) for label in labels]


def test_texts_are_read_as_they_were_written(tmp_path: Path):
    texts = [("a", "one\r\ntwo\u2028three\x85\n"), ('b "quoted"', ""), ("c", "\U0001f600\t\\")]
    write_texts(tmp_path / "new/file", texts)
    assert list(read_texts(tmp_path / "new/file")) == texts


def test_signatures_estimate_the_similarity():
    first, second = texts(2)
    mixed = first[:200] + second[:200]
    grams = [set(hash_ngrams(hash_words(" ".join(words)), 5).tolist()) for words in (first, mixed)]
    exact = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    values = [sketch(hash_words(" ".join(words)))["values"] for words in (first, mixed)]
    assert (values[0] == values[1]).sum() == pytest.approx(
        duplicates.matches_of(exact), abs=50
    ) and exact > 0.2


def test_evaluation_text_is_found_whatever_its_case_and_signs(tmp_path: Path):
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    (tmp_path / "a.txt").write_text(f"{question}\nalpha beta gamma delta epsilon zeta eta theta\ntoo short\n")
    known = EvaluationTexts((str(tmp_path / "a.txt"),), 13)
    assert known.touches(hash_words("It said: " + question.upper().replace(" ", ", ") + "!"))
    assert known.touches(hash_words("x alpha, beta gamma delta epsilon zeta eta theta y"))
    assert not known.touches(hash_words(" ".join(question.split()[:12]) + " and so on"))
    assert not known.touches(hash_words("too short")) and not known.touches(hash_words(""))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The house that we saw was not as large as it is in the picture, but it is old."),
        ("de", "Das Haus ist nicht so groß wie auf dem Bild, aber es wird von den Leuten auch geliebt."),
        ("fr", "La maison que nous avons vue est dans la rue et elle n'est pas plus grande que les autres."),
        ("es", "La casa que vimos no es tan grande como en la foto, pero los vecinos se quedan en ella."),
        ("ja", "私たちが見た家は写真ほど大きくありません。"),
        ("zh", "我们看到的房子没有照片上那么大。"),
        ("ru", "Дом, который мы видели, не такой большой, как на картинке."),
        ("uk", "Будинок, який ми бачили, не такий великий, як на малюнку."),
        ("sr", "Кућа коју смо видели није толико велика као на слици, али има леп врт."),
        ("mk", "Куќата што вчера видовме не беше толку голема како на сликата, но има убава градина."),
        ("hu", "A ház, amelyet láttunk, nem olyan nagy, mint a képen, de nagyon szép."),
        ("vi", "Ngôi nhà mà chúng tôi thấy không lớn như trong ảnh, nhưng rất đẹp."),
        ("ar", "البيت الذي رأيناه ليس كبيرا كما في الصورة، لكنه جميل جدا."),
        ("und", "0x3f 0x4a 0x5b == != 17"),
        ("und", "xq zv kkp wwt rrm jjl"),
        ("und", "=*- " * 500),
        ("und", ""),
    ],
)
def test_languages(language: str, text: str):
    assert language_of(text) == language


def test_normalised_text():
    assert normalise(" e\u0301\r\nb\rc\x00\x07\td \n") == "é\nb\nc\td\n"
    assert normalise("\n \n  \tif x:\n    y\n\n", keeps_indentation=True) == "  \tif x:\n    y\n"
    assert normalise("  if x:", keeps_indentation=True) == "  if x:\n" and normalise("  if x:") == "if x:\n"
    assert normalise(" \n ", keeps_indentation=True) == normalise("") == "\n"
    assert normalise("\ufeff    if x:", keeps_indentation=True) == "    if x:\n"
    assert normalise("\ufeff\ufeffa\ufeff") == "a\ufeff\n"


SENTENCES = {
    "en": "The house that we visited yesterday was not as large as the picture, but people always loved it",
    "de": "Das Haus ist nicht so groß wie auf dem Bild, aber es wird von den Leuten auch sehr geliebt und",
    "nl": "Het huis is niet zo groot als op de foto, maar het wordt door de mensen ook zeer gewaardeerd en",
    "sv": "Huset som vi såg är inte så stort som på bilden, men det har en trädgård och för oss är det",
    "pl": "Dom nie jest tak duży jak na zdjęciu, ale ludzie bardzo go lubią i to się nie zmieni przez",
    "ru": "Дом, который мы видели, не такой большой, как на картинке, но люди очень любят этот дом",
    "ko": "우리가 본 집은 사진만큼 크지 않지만 사람들은 그 집을 매우 사랑하고 정원도 아름답습니다",
    "zh": "我们看到的房子没有照片上那么大。但是人们非常喜欢它。花园也很漂亮。",
    "ja": "私たちが見た家は写真ほど大きくありませんが、人々はそれをとても愛しています。",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_prose_is_not_only_english(language: str):
    text = "\n".join(f"{SENTENCES[language]} {n}" for n in range(12))
    assert language_of(text) == language and not prose_violation(text)
    assert is_good_prose(text) == (language == "en")
    if language not in ("zh", "ja"):
        assert prose_violation(SENTENCES[language]) == "prose: number of words"
    assert prose_violation(text + "#" * 100) == "prose: symbols"


def test_text_in_no_language_is_no_prose():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bcdfghjklmnpqrstvwxz"), 5)) for _ in range(200)]
    assert prose_violation(" ".join(words)) == "prose: stop words"
    assert prose_violation(SENTENCES["zh"] + " ".join(words)) == "prose: stop words"


def test_a_book_is_prose_and_a_table_of_its_size_no_code():
    rng = np.random.default_rng(1)
    names = [f"{a}{b}" for a in ("ba", "ke", "lo", "mi") for b in ("den", "fur", "gat", "lin")]
    book = "\n".join("the " + " and ".join(rng.choice(names, 8)) + " of it" for _ in range(5000))
    assert (
        len(book) > 200_000
        and not prose_violation(book)
        and first_violation(code_scores(book), CODE) == "code: length"
    )
    assert prose_violation(book * 2) == "prose: number of words"


@pytest.mark.parametrize("vocabulary", [3, 40, 5000])
def test_ngrams_of_many_words_are_counted_as_those_of_few(vocabulary: int):
    rng = np.random.default_rng(vocabulary)
    for count in (2, 3, 4, 60, 900):
        words = [f"{n * 7}" for n in rng.integers(0, vocabulary, count)]
        if count >= max(quality._NGRAMS):
            assert quality._covered_of_many(words) == quality._covered(words)


def test_repetition():
    assert repetition_violation("a line that comes again\n" * 9) == "prose: repeated lines"
    assert repetition_violation("buy now " * 60) == "prose: repeated 2-grams"
    assert not repetition_violation(" ".join(texts(1)[0]))


def test_a_table_tells_what_each_rule_removed_of_each_language(tmp_path: Path):
    pages = [
        "\n".join(f"{SENTENCES[language]} {n}" for n in range(12)) for language in ("en", "de", "de", "sv")
    ]
    texts = [*pages, SENTENCES["de"], "xq zv kkp wwt rrm jjl " * 20, "0 1 2"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    facts = {"dataset": "web", "version": "", "origin": "", "licence": ""}
    source = Source(
        domain="d", kind=SourceKind.jsonl, path="", languages=["de", "en"], quality=Quality.prose, **facts
    )
    job = PreparationJob(tmp_path, (source,), Preparation(), (), Tokenizer(), 16, False)
    file = SourceFile(0, "a.jsonl", str(tmp_path / "a.jsonl"), (tmp_path / "a.jsonl").stat().st_size, 0)
    chunks = [Chunk(0, 0, (file,), 0, file.bytes)]
    rows = [
        re.split(r"  +", line.strip())
        for line in table_of_languages(job, [clean(job, chunks[0])], chunks).splitlines()
    ]
    assert rows == [
        ["dataset", "language", "documents", "kept", "removed by rule"],
        ["web", "de", "3", "2", "1 prose: number of words"],
        ["web", "unknown", "2", "0", "2 language"],
        ["web", "en", "1", "1"],
        ["web", "sv", "1", "0", "1 language"],
    ]
