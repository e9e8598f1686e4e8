"""Prompts with responses, and chats, as texts of which some parts are to be learnt.

A prompt and its response follow each other as they are. A chat is rendered by a template in Jinja, in the
sandbox in which transformers renders it. To be learnt are responses, and what the assistant says with what
ends its turn: what the template puts between `{% generation %}` and `{% endgeneration %}`, or, if it has
none, what a turn adds to the prompt for it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.chat_template import read_template
from data.text.file_listing import named
from data.tokenizer import EOS, PAD, TokenizerHandle
from train.recipe.errors import UserError
from train.recipe.preparation import SourceKind
from train.recipe.schema import Tokenizer

Turn = tuple[str, str]
"""Role and words."""
Spans = tuple[tuple[int, int], ...]
"""Characters that are to be learnt, from and to."""

CONVERSATION = "conversation"
"""Reason of records that are none; a colon and more words may follow."""
ROLES = ("system", "user", "assistant", "tool")
PROMPT, RESPONSES = "prompt", ("response", "completion")
_ANSWER = "0f1e2d3c"
"""Words that stand for an answer, to see what follows it."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ConversationError(Exception):
    """The reason why a record is no conversation that can be trained on."""


@dataclass(frozen=True)
class ChatFormat:
    """All that renders chats, small enough to be sent with every task."""

    template: str
    names: tuple[tuple[str, str], ...]
    """Special tokens by the names that templates use, `eos_token` for example."""
    special: tuple[str, ...]
    """Names of all special tokens; words must not spell them."""


def chat_format(recipe: Tokenizer, handle: TokenizerHandle | None) -> ChatFormat:
    """Returns the format of the recipe's template, or else of the tokenizer's own.

    Args:
        recipe: the recipe's tokenizer.
        handle: the tokenizer; None: a BPE that is yet to be trained.

    Raises:
        UserError: if there is no template, or it is no Jinja.
    """
    template = read_template(recipe) or (handle and handle.chat_template)
    if not template:
        what = "is null, and the tokenizer has no template for chats"
        remedy = "name a Jinja file, or the folder of a chat model as tokenizer.path"
        raise UserError(what, key="tokenizer.chat_template", remedy=remedy)
    try:
        _compiled(template)
    except Exception as error:  # Jinja's classes; the package is imported only where there are chats.
        what = f"the template is no Jinja ({_line(error)})"
        raise UserError(what, key="tokenizer.chat_template", remedy="correct it") from None
    names = {"bos_token": EOS, "eos_token": EOS, "pad_token": PAD} if handle is None else handle.special_names
    special = (EOS, PAD) if handle is None else handle.special_ids
    return ChatFormat(template, tuple(sorted(names.items())), tuple(sorted(special)))


def turns_of(tree: object, kind: SourceKind) -> list[Turn]:
    """Returns the turns of a record, a value that JSON gave.

    Raises:
        ConversationError: if it has none that can be trained on.
    """
    if kind is SourceKind.instructions:
        tree = _object(tree)
        response = next((name for name in RESPONSES if name in tree), RESPONSES[0])
        return [(name, _words(tree, name, "")) for name in (PROMPT, response)]
    turns = messages_of(tree)
    if turns[-1][0] != "assistant":
        raise ConversationError(f"{CONVERSATION}: the last message is not the assistant's")
    return turns


def messages_of(tree: object) -> list[Turn]:
    """Returns the turns of a chat's record, whoever has the last word.

    Raises:
        ConversationError: if it is no chat.
    """
    tree = _object(tree)
    messages = tree.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "messages is no list of turns" if "messages" in tree else _lacks(tree, "messages")
        raise ConversationError(f"{CONVERSATION}: {what}")
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f" of message {number}"
        if not isinstance(message, dict):
            raise ConversationError(f"{CONVERSATION}: message {number} is no object")
        role = _words(message, "role", where)
        if role not in ROLES:
            raise ConversationError(f"{CONVERSATION}: role{where} is not one of {', '.join(ROLES)}")
        turns.append((role, _words(message, "content", where)))
    return turns


def render(turns: Sequence[Turn], chat: ChatFormat | None) -> tuple[str, Spans]:
    """Returns a conversation's text and the parts of it that are to be learnt.

    Args:
        turns: as of :func:`turns_of`.
        chat: renders chats; None: a prompt and its response.

    Raises:
        ConversationError: if there is nothing to learn, words spell a special token, or the template refuses.
    """
    if not any(words.strip() for role, words in turns if role in ("assistant", *RESPONSES)):
        raise ConversationError("empty")
    if chat is None:
        (_, prompt), (_, response) = turns
        return prompt + response, ((len(prompt), len(prompt + response)),)
    _refuse_special(turns, chat)
    try:
        text, spans = _rendered(turns, chat)
    except ConversationError:
        raise
    except Exception as error:  # Templates raise whatever they like.
        raise ConversationError(f"template: {_line(error)}") from None
    if not any(begin < end for begin, end in spans):
        raise ConversationError("template: renders nothing of the assistant's")
    return text, spans


def render_prompt(turns: Sequence[Turn], chat: ChatFormat) -> tuple[str, str]:
    """Returns a chat's text up to the words of the assistant's next turn, and the text that ends such a turn.

    Args:
        turns: the chat so far.
        chat: renders it.

    Raises:
        ConversationError: if words spell a special token, or the template refuses.
    """
    _refuse_special(turns, chat)
    try:
        prompt = _text(turns, chat, prompts=True)
        answered = _text([*turns, ("assistant", _ANSWER)], chat)
    except Exception as error:  # Templates raise whatever they like.
        raise ConversationError(f"template: {_line(error)}") from None
    _, found, ending = answered.rpartition(_ANSWER)
    return prompt, ending if found else ""


def _refuse_special(turns: Sequence[Turn], chat: ChatFormat) -> None:
    spelled = next((name for name in chat.special for _, words in turns if name in words), None)
    if spelled is not None:
        raise ConversationError(f"special token: {spelled}")


def _text(turns: Sequence[Turn], chat: ChatFormat, *, prompts: bool = False) -> str:
    text: str = _compiled(chat.template).render(
        messages=_messages(turns),
        tools=None,
        documents=None,
        add_generation_prompt=prompts,
        **dict(chat.names),
    )
    return text


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": words} for role, words in turns]


def _rendered(turns: Sequence[Turn], chat: ChatFormat) -> tuple[str, Spans]:
    from transformers.utils.chat_template_utils import _render_with_assistant_indices

    if _GENERATION.search(chat.template):
        text, found = _render_with_assistant_indices(
            compiled_template=_compiled(chat.template),
            messages=_messages(turns),
            tools=None,
            documents=None,
            add_generation_prompt=False,
            **dict(chat.names),
        )
        return text, tuple((int(begin), int(end)) for begin, end in found)
    text, spans = _text(turns, chat), []
    for number, (role, _) in enumerate(turns):
        if role == "assistant":
            before, after = _text(turns[:number], chat, prompts=True), _text(turns[: number + 1], chat)
            if not (after.startswith(before) and text.startswith(after)):
                raise ConversationError("template: renders earlier turns otherwise than later ones")
            spans.append((len(before), len(after)))
    return text, tuple(spans)


def _compiled(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _object(tree: object) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConversationError(f"{CONVERSATION}: no object")
    return tree


def _words(tree: dict[str, Any], name: str, where: str) -> str:
    words = tree.get(name)
    if isinstance(words, str):
        return words
    what = f"{name}{where} is no text" if name in tree else f"{_lacks(tree, name)}{where}"
    raise ConversationError(f"{CONVERSATION}: {what}")


def _lacks(tree: dict[str, Any], name: str) -> str:
    keys = [key[:40].encode("ascii", "backslashreplace").decode() for key in tree]
    return f"no {name!r}, but {named(keys) or 'nothing'}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
