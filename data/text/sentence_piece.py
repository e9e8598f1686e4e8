"""Converts a SentencePiece model to a tokenizer of the package ``tokenizers``, and compares them.

Kudo and Richardson 2018, "SentencePiece" (arXiv 1808.06226). Models of the kinds BPE and unigram are
converted with their normalisation. SentencePiece itself then encodes some texts on which tokenizers tend to
differ; a conversion that gives other ids is refused, so that none is used in silence.

The file is a message in the wire format of Protocol Buffers, which is read here: the classes that come with
sentencepiece ask for a newer version of protobuf than other packages allow.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIX = ".model"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
"""The sign that SentencePiece writes for a space."""


def convert_model(path: Path, texts: Sequence[str]) -> tuple["Tokenizer", dict[str, str]]:
    """Converts a SentencePiece model.

    Args:
        path: the model.
        texts: texts that both must encode to the same ids.

    Returns:
        The tokenizer, and its special tokens by ``eos_token``, ``bos_token``, ``pad_token`` and
        ``unk_token``, of which it may lack some.

    Raises:
        ValueError: if it is no SentencePiece model, or can't be converted; to follow the file's name.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError("needs the package sentencepiece to be converted") from None
    original: Any = SentencePieceProcessor()
    try:
        original.Load(str(path))
        model = _read(path.read_bytes())
    except Exception as error:  # The package raises no class of its own.
        raise ValueError(f"is no SentencePiece model ({' '.join(str(error).split())[:100]})") from None
    made = _tokenizer(model)
    for text in texts:
        if original.EncodeAsIds(text) != made.encode(text, add_special_tokens=False).ids:
            raise ValueError(f"can't be converted exactly: {text[:40]!r} gets other ids")
    ids = {
        "eos": original.eos_id(),
        "bos": original.bos_id(),
        "pad": original.pad_id(),
        "unk": original.unk_id(),
    }
    return made, {f"{name}_token": model.pieces[number][0] for name, number in ids.items() if number >= 0}


@dataclass
class _Model:
    """A SentencePiece model, with the defaults of its format."""

    pieces: list[tuple[str, float, int]]
    """Text, score and type."""
    kind: int = _UNIGRAM
    unk_id: int = 0
    unk_piece: str = "<unk>"
    byte_fallback: bool = False
    characters: bytes = b""
    """The table by which characters are normalised."""
    has_prefix: bool = True
    """A space is put before the text."""
    without_surplus: bool = True
    """Of several spaces one remains, of those around the text none."""


def _read(content: bytes) -> _Model:
    model = _Model([])
    for field, value in _fields(content):
        inner = dict(_fields(value)) if isinstance(value, bytes) else {}
        if field == 1:
            score = struct.unpack("<f", inner[2])[0] if 2 in inner else 0.0
            model.pieces.append((inner.get(1, b"").decode(), score, inner.get(3, 1)))
        elif field == 2:
            model.kind, model.unk_id = inner.get(3, _UNIGRAM), inner.get(40, 0)
            model.unk_piece = inner.get(45, b"<unk>").decode()
            model.byte_fallback = bool(inner.get(35, 0))
        elif field == 3:
            model.characters = inner.get(2, b"")
            model.has_prefix, model.without_surplus = bool(inner.get(3, 1)), bool(inner.get(4, 1))
    return model


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a message: an integer, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield number, content[at : at + size]
        at += size


def _tokenizer(model: _Model) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models

    if model.kind == _UNIGRAM:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        made = Tokenizer(models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
    elif model.kind == _BPE:
        vocabulary = {piece: number for number, (piece, _, _) in enumerate(model.pieces)}
        made = Tokenizer(
            models.BPE(
                vocabulary,
                _merges(vocabulary, [score for _, score, _ in model.pieces]),
                unk_token=model.unk_piece,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    else:
        raise ValueError("is a SentencePiece model of characters or words, which is not converted")
    made.normalizer = _normalizer(model)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if model.has_prefix else steps)
    made.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == _CONTROL)
            for piece, _, kind in model.pieces
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    # Text that spells a special token stays text, as in SentencePiece.
    made.encode_special_tokens = True
    return made


def _normalizer(model: _Model) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.characters:
        steps.append(normalizers.Precompiled(model.characters))
    if model.without_surplus:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if model.has_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which SentencePiece merges: by score."""
    found = [
        (-scores[number], number, vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece, cut)
        for piece, number in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(found)]
