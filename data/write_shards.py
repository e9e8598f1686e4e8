"""Documents to tokens to MDS shards: ``python -m data.write_shards RECIPE``.

A folder of shards holds ``manifest.json``, ``tokenizer.json`` where the tokenizer was trained, and per
domain ``documents.jsonl`` (one line per document, its place being the number that samples refer to) and
MDS shards in ``train/`` and ``validation/``. It is built beside its place and renamed when whole, and
the same documents give the same bytes.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data import corpus
from data.bpe import train_bpe
from data.corpus import Document, installed_corpus
from data.curriculum import domains_of
from data.manifest import (
    DOCUMENTS_FILE,
    FORMAT,
    INDEX_FILE,
    MANIFEST_FILE,
    DomainRecord,
    Manifest,
    SplitRecord,
    TokenizerRecord,
    check_shards,
    entropy,
    require_match,
)
from data.packing import PADDING, pack
from data.shard_cache import open_cache
from data.split import SPLITS, split_documents
from data.tokenizer import TokenizerHandle, open_tokenizer
from train.recipe import RecipeError, load_recipe
from train.schema import Recipe, TokenizerKind

COLUMNS = {"documents": "ndarray:int64", "lengths": "ndarray:int32", "tokens": "ndarray:int32"}
SHARD_BYTES = 1 << 26
"""Size of a shard file: small enough to fetch at once, large enough to read on."""
BPE_TEXT_BYTES = 16_000_000
"""Text that a tokenizer is trained on; more of it no longer changes a small vocabulary."""
CHUNK_BYTES = 4_000_000
"""Text that is tokenised at once, on all cores."""


def ensure_shards(recipe: Recipe) -> Manifest:
    """The recipe's shards, checked; built first where they are missing and the recipe names a corpus.

    One rank calls it before any opens the shards. Another process that builds the same is waited for.
    Of shards in a store only the manifest is fetched; every file is held to its hash when it is read.

    Raises:
        RecipeError: if they are missing, damaged, or not those that the recipe means.
    """
    root = Path(recipe.data.shards)
    if (cache := open_cache(recipe)) is not None:
        manifest = cache.fetch_manifest()
        require_match(manifest, recipe)
        return manifest
    if recipe.data.corpus == "installed" and not (root / MANIFEST_FILE).exists():
        build_shards(recipe)
    manifest = check_shards(root)
    require_match(manifest, recipe)
    return manifest


def build_shards(
    recipe: Recipe,
    *,
    rebuild: bool = False,
    documents: Callable[[], Iterator[Document]] | None = None,
) -> Manifest:
    """Builds the recipe's shards from the installed corpus, or from documents that are given.

    Args:
        recipe: says where, with which tokenizer and length, and how much text.
        rebuild: replace shards that are there; they are used as they are otherwise.
        documents: makes the documents in place of the installed corpus.

    Raises:
        RecipeError: if the place holds something else, or a domain has too little text.
    """
    root = Path(recipe.data.shards)
    if documents is None and recipe.data.corpus is None:
        raise RecipeError(
            "is null, which leaves nothing to build from", key="data.corpus", remedy="set it to `installed`"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root):
        if (root / MANIFEST_FILE).exists() and not rebuild:
            return check_shards(root)
        if root.exists() and any(root.iterdir()) and not (root / MANIFEST_FILE).exists():
            what = f"{root} exists and holds no shards"
            raise RecipeError(what, key="data.shards", remedy="give another folder, or empty it")
        partial = root.with_name(f".{root.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            source = documents or (lambda: installed_corpus(recipe.data.corpus_bytes))
            manifest = _build_into(partial, recipe, _gather(source(), recipe))
            (partial / MANIFEST_FILE).write_text(manifest.to_json())
            shutil.rmtree(root, ignore_errors=True)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _gather(documents: Iterator[Document], recipe: Recipe) -> dict[str, list[Document]]:
    """All documents by domain, with a bar that counts their bytes."""
    by_domain: dict[str, list[Document]] = {}
    with tqdm(desc="reading text", unit="B", unit_scale=True, mininterval=1) as bar:
        for document in documents:
            by_domain.setdefault(document.domain, []).append(document)
            bar.update(len(document.text))
    for domain in [*domains_of(recipe), *recipe.data.validation_domains]:
        if len(by_domain.get(domain, [])) < 2:
            what = f"{domain} has {len(by_domain.get(domain, []))} documents, too few for two splits"
            raise RecipeError(what, key="data.domains", remedy="raise data.corpus_bytes")
    return by_domain


def _build_into(folder: Path, recipe: Recipe, by_domain: dict[str, list[Document]]) -> Manifest:
    print("telling near-identical documents apart; importing Streaming", file=sys.stderr, flush=True)
    sides = {domain: split_documents(documents) for domain, documents in by_domain.items()}
    import_module("streaming")
    tokenizer = _make_tokenizer(recipe, by_domain, sides)
    if recipe.tokenizer.kind is TokenizerKind.bpe:
        tokenizer.to_hugging_face(folder)
    total = sum(len(document.text.encode()) for documents in by_domain.values() for document in documents)
    records = {}
    with tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, mininterval=1) as bar:
        for domain, documents in by_domain.items():
            records[domain] = _write_domain(
                folder / domain, documents, sides[domain], tokenizer, recipe, advance=bar.update
            )
    return Manifest(
        format=FORMAT,
        tokenizer=TokenizerRecord(
            tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
        ),
        sequence_tokens=recipe.data.sequence_tokens,
        corpus=recipe.data.corpus,
        corpus_bytes=recipe.data.corpus_bytes if recipe.data.corpus else None,
        domains=records,
    )


def _make_tokenizer(
    recipe: Recipe, by_domain: dict[str, list[Document]], sides: dict[str, list[str]]
) -> TokenizerHandle:
    if recipe.tokenizer.kind is not TokenizerKind.bpe:
        return open_tokenizer(recipe.tokenizer, Path(recipe.data.shards))
    texts = [
        document.text
        for domain, documents in by_domain.items()
        for document, side in zip(documents, sides[domain], strict=True)
        if side == "train"
    ]
    stride = -(-sum(map(len, texts)) // BPE_TEXT_BYTES)
    print(f"training a tokenizer of {recipe.tokenizer.vocab_size} tokens", file=sys.stderr, flush=True)
    return train_bpe(recipe.tokenizer, iter(texts[::stride]))


def _write_domain(
    folder: Path,
    documents: list[Document],
    sides: list[str],
    tokenizer: TokenizerHandle,
    recipe: Recipe,
    *,
    advance: Callable[[int], object],
) -> DomainRecord:
    folder.mkdir()
    lines = [
        {"name": document.name, "sha256": hashlib.sha256(document.text.encode()).hexdigest(), "split": side}
        for document, side in zip(documents, sides, strict=True)
    ]
    listing = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    (folder / DOCUMENTS_FILE).write_text(listing)
    splits = {}
    for split in SPLITS:
        chosen = [(n, documents[n].text) for n, side in enumerate(sides) if side == split]
        splits[split] = _write_split(
            folder / split, chosen, tokenizer, recipe.data.sequence_tokens, advance=advance
        )
    return DomainRecord(
        source=corpus.SOURCE,
        licence=corpus.LICENCE,
        transformation=corpus.TRANSFORMATION,
        documents_sha256=hashlib.sha256(listing.encode()).hexdigest(),
        splits=splits,
    )


def _write_split(
    folder: Path,
    documents: list[tuple[int, str]],
    tokenizer: TokenizerHandle,
    sequence_tokens: int,
    *,
    advance: Callable[[int], object],
) -> SplitRecord:
    """Writes the MDS shards of one split and says what is in them."""
    from streaming import MDSWriter

    digest = hashlib.sha256()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    samples = padding = 0
    # A fixed shape per column: readers need no shape in each sample.
    columns = COLUMNS | {"tokens": f"ndarray:int32:{sequence_tokens}"}
    with MDSWriter(columns=columns, out=str(folder), hashes=["sha256"], size_limit=SHARD_BYTES) as writer:
        for sample in pack(
            _encode(documents, tokenizer, advance),
            sequence_tokens=sequence_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ):
            writer.write(vars(sample))
            for column in (sample.documents, sample.lengths, sample.tokens):
                digest.update(column.tobytes())
            filling = int(sample.lengths[sample.documents == PADDING].sum())
            counts += np.bincount(sample.tokens[: sequence_tokens - filling], minlength=counts.size)
            padding += filling
            samples += 1
    return SplitRecord(
        documents=len(documents),
        samples=samples,
        tokens=int(counts.sum()),
        padding_tokens=padding,
        text_bytes=sum(len(text.encode()) for _, text in documents),
        unigram_entropy=entropy(counts),
        content_sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest(),
    )


def _encode(
    documents: list[tuple[int, str]], tokenizer: TokenizerHandle, advance: Callable[[int], object]
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Token ids of each document, made in chunks."""
    chunk: list[tuple[int, str]] = []
    size = 0
    for document in [*documents, None]:
        if document is not None:
            chunk.append(document)
            size += len(document[1].encode())
        if size >= CHUNK_BYTES or document is None:
            encoded = tokenizer.encode_documents([text for _, text in chunk])
            yield from zip([ordinal for ordinal, _ in chunk], encoded, strict=True)
            advance(size)
            chunk, size = [], 0


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Keeps other processes of this machine from building the same shards at once."""
    with root.with_name(f".{root.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (2: a mistake in the recipe)."""
    parser = argparse.ArgumentParser(
        prog="python -m data.write_shards",
        description="Builds a recipe's shards from the text that every installation has, or checks them.",
    )
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--rebuild", action="store_true", help="replace shards that are there")
    parser.add_argument("--check", action="store_true", help="hash every byte of the shards; build nothing")
    parser.add_argument("--json", metavar="FILE", help="write the manifest there too")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        root = Path(recipe.data.shards)
        if options.check:
            manifest = check_shards(root, every_byte=True)
            require_match(manifest, recipe)
        elif options.rebuild:
            manifest = build_shards(recipe, rebuild=True)
        else:
            manifest = ensure_shards(recipe)
    except RecipeError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return 2
    print(describe(manifest, root))
    if options.json:
        Path(options.json).write_text(manifest.to_json())
    return 0


def describe(manifest: Manifest, root: Path) -> str:
    """The shards as a table."""
    head = f"{root}: {manifest.tokenizer.name}, sequences of {manifest.sequence_tokens} tokens"
    rows = [
        head,
        f"{'split':24}{'documents':>11}{'samples':>9}{'tokens':>13}{'bytes/token':>13}{'entropy':>9}",
    ]
    for name, domain in manifest.domains.items():
        for side, split in domain.splits.items():
            rows.append(
                f"{name + '/' + side:24}{split.documents:>11,}{split.samples:>9,}{split.tokens:>13,}"
                f"{split.bytes_per_token:>13.2f}{split.unigram_entropy:>9.2f}"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
