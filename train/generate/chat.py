"""Chats with a model, in the format of the template that it was tuned with.

A chat is rendered again for each answer, as its tokens would be in training. An answer ends with the special
token, or the text, that the template puts after an assistant's words.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from data.text.conversations import ConversationError, Turn, messages_of, render_prompt
from train.generate.generation import ChatTokenizer
from train.recipe.errors import UserError


class ChatText:
    """A tokenizer for rendered chats: a :class:`~train.generate.generation.Text`, and what renders them.

    Args:
        text: the tokenizer of the weights.
        template: Jinja file in place of the tokenizer's own template.

    Raises:
        UserError: if there is no template, or it can't be read.
    """

    def __init__(self, text: ChatTokenizer, template: Path | None) -> None:
        self._text = text
        chat = text.chat_format(_read(template))
        if chat is None:
            remedy = "give one, for example yamls/chatml.jinja for DBRX Instruct"
            raise UserError("the tokenizer has no template for chats", key="--chat-template", remedy=remedy)
        self._format = chat
        self.end_ids = text.end_ids
        self.stop: tuple[str, ...] = ()
        """Texts that end an answer, of a template that ends it without a special token."""

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Renders a chat up to the assistant's next words, and notes what will end them.

        Raises:
            UserError: if words spell a special token, or the template refuses.
        """
        try:
            prompt, ending = render_prompt(turns, self._format)
        except ConversationError as error:
            raise UserError(f"the chat can't be rendered: {error}") from None
        ids = self._text.encode_chat(ending)
        place = next((n for n, token in enumerate(ids) if token in self._text.special_ids), len(ids))
        self.end_ids = self._text.end_ids | set(ids[place : place + 1])
        before = self._text.decode(ids[:place]).rstrip()
        self.stop = (before,) if before else ()
        return prompt

    def encode(self, text: str) -> list[int]:
        """Encodes a rendered chat, with its special tokens."""
        return self._text.encode_chat(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, without special tokens."""
        return self._text.decode(ids)


def read_chats(file: Path) -> list[list[Turn]]:
    """Reads chats of a JSONL file, objects with `messages`, of which the last is not the assistant's.

    Raises:
        UserError: if a line is none; names file and line.
    """
    chats = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            turns = messages_of(json.loads(line))
        except (ConversationError, ValueError) as error:
            reason = error if isinstance(error, ConversationError) else "no JSON"
            raise UserError(f"{file}: line {number}: {reason}") from None
        if turns[-1][0] == "assistant":
            remedy = "end each chat with what is to be answered"
            raise UserError(f"{file}: line {number}: the last message is the assistant's", remedy=remedy)
        chats.append(turns)
    return chats


def _read(template: Path | None) -> str | None:
    if template is None:
        return None
    try:
        return template.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(f"{template} can't be read ({reason})", key="--chat-template") from None
