"""Text generation with a decoder: prompts in, streamed text out.

Shapes: B prompts, S tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from data.text.conversations import ChatFormat
from data.tokenizer import TokenizerHandle
from train.generate.sampling import Sampling, next_tokens
from train.hf.folders import SOURCE_FOLDER
from train.hf.model_card import tokenizer_of
from train.hf.weights import WeightSource
from train.model.decoder import Decoder
from train.model.kv_cache import CachedDecoder, flush_right
from train.recipe.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text(Protocol):
    """A tokenizer: text to ids and back."""

    end_ids: frozenset[int]
    """Tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """Encodes a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, without special tokens."""


class ChatTokenizer(Text, Protocol):
    """A tokenizer of a source of weights, which may render chats."""

    special_ids: frozenset[int]
    """Tokens that no text makes."""

    def chat_format(self, template: str | None) -> ChatFormat | None:
        """Returns the format of a Jinja template, or of its own; None: it has none."""

    def encode_chat(self, text: str) -> list[int]:
        """Encodes a rendered chat, in which names of special tokens become these."""


class OwnText:
    """The tokenizer that a run was trained with."""

    def __init__(self, handle: TokenizerHandle) -> None:
        self._handle = handle
        self.end_ids = frozenset({handle.eos_id})
        self.special_ids = frozenset(handle.special_ids.values())

    def encode(self, text: str) -> list[int]:
        """Encodes a text; never as special tokens."""
        return [int(i) for i in self._handle.encode_documents([text])[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, without special tokens."""
        return self._handle.decode(i for i in ids if i not in self.special_ids)

    def chat_format(self, template: str | None) -> ChatFormat | None:
        """Returns the format of a Jinja template, or of the shards' own; None: they have none."""
        template = template or self._handle.chat_template
        names, special = sorted(self._handle.special_names.items()), sorted(self._handle.special_ids)
        return ChatFormat(template, tuple(names), tuple(special)) if template else None

    def encode_chat(self, text: str) -> list[int]:
        """Encodes a rendered chat, in which names of special tokens become these."""
        return [int(i) for i in self._handle.encode_chat(text, ())[0]]


class HuggingFaceText:
    """The tokenizer of a Hugging Face folder; custom code is not run."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ends = {"<|im_end|>", self._tokenizer.eos_token}
        ids = (self._tokenizer.convert_tokens_to_ids(end) for end in ends if end)
        self.end_ids = frozenset(i for i in ids if i is not None and i != self._tokenizer.unk_token_id)
        added = self._tokenizer.added_tokens_decoder
        self._special = {token.content: number for number, token in added.items() if token.special}
        self.special_ids = frozenset(self._special.values())

    def encode(self, text: str) -> list[int]:
        """Encodes a text; special tokens such as ChatML's are single tokens if the tokenizer has them."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def chat_format(self, template: str | None) -> ChatFormat | None:
        """Returns the format of a Jinja template, or of the folder's own; None: it has none."""
        own = self._tokenizer.chat_template
        template = template or (own.get("default") if isinstance(own, dict) else own)
        named = self._tokenizer.special_tokens_map
        names = sorted((key, name) for key, name in named.items() if isinstance(name, str))
        return ChatFormat(template, tuple(names), tuple(sorted(self._special))) if template else None

    def encode_chat(self, text: str) -> list[int]:
        """Encodes a rendered chat, in which names of special tokens become these."""
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]


def text_of(source: WeightSource) -> ChatTokenizer:
    """Returns the tokenizer of a source of weights.

    Raises:
        UserError: if it has none.
    """
    if source.recipe is not None:
        return OwnText(tokenizer_of(source.recipe, source.path))
    for folder in (source.path / SOURCE_FOLDER, source.path):
        if (folder / TOKENIZER_FILE).is_file():
            return HuggingFaceText(folder)
    raise UserError(f"{source.path}: has no {TOKENIZER_FILE}")


@dataclass
class Answer:
    """One prompt's continuation so far."""

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ending: str = ""
    """`end of text`, `stop`, `length` or, by Ctrl-C in a chat, `interrupted`; empty while it is growing."""


def generate(
    decoder: Decoder,
    text: Text,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    use_cache: bool = True,
) -> Iterator[list[Answer]]:
    """Continues prompts, one token per prompt at a time.

    Args:
        decoder: whole on one device.
        text: its tokenizer.
        prompts: each of at least one token.
        sampling: the sampling settings.
        max_tokens: maximum tokens per answer.
        stop: texts that end an answer and are not part of it.
        use_cache: False recomputes everything for each token.

    Yields:
        All answers after each token, as the same objects every time. Text grows by whole characters and
        excludes any partial match of a stop text.

    Raises:
        UserError: if prompt and answer do not fit the model's sequence length.
    """
    ids = [text.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise UserError(f"prompt {prompt!r} has no tokens")
    longest, limit = max(map(len, ids)) + max_tokens, decoder.cfg.max_sequence_tokens
    if longest > limit:
        raise UserError(
            f"prompt and answer of {longest} tokens exceed the model's {limit}; lower --max-tokens"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    answers = [Answer(len(tokens)) for tokens in ids]
    cached = CachedDecoder(decoder, use_cache=use_cache)
    fed_BS = flush_right(ids, next(decoder.parameters()).device)
    for _ in range(max_tokens):
        logits_BV = cached.feed(fed_BS)
        assert cached.tokens_BN is not None
        drawn_B = next_tokens(logits_BV, cached.tokens_BN, sampling, generator)
        for answer, token in zip(answers, drawn_B.tolist(), strict=True):
            _extend(answer, token, text, stop)
        for answer in answers:
            if not answer.ending and len(answer.ids) == max_tokens:
                answer.ending = "length"
                answer.text = text.decode(answer.ids)
        yield answers
        if all(answer.ending for answer in answers):
            return
        fed_BS = drawn_B[:, None]


def _extend(answer: Answer, token: int, text: Text, stop: Sequence[str]) -> None:
    """Adds a token to an answer that has not ended."""
    if answer.ending:
        return
    if token in text.end_ids:
        answer.ending = "end of text"
        answer.text = text.decode(answer.ids)
        return
    answer.ids.append(token)
    decoded = text.decode(answer.ids)
    for end in stop:
        if end in decoded:
            answer.ending, answer.text = "stop", decoded[: decoded.index(end)]
            return
    # The last character may be incomplete, and a stop text may have begun.
    decoded = decoded.rstrip(REPLACEMENT)
    held = max((k for end in stop for k in range(1, len(end)) if decoded.endswith(end[:k])), default=0)
    decoded = decoded[: len(decoded) - held]
    if decoded.startswith(answer.text):
        answer.text = decoded
