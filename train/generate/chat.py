"""ChatML, the conversation format that DBRX Instruct was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.recipe.errors import UserError

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


def chatml(messages: Sequence[Message]) -> str:
    """Formats a conversation as text, up to the start of the assistant's next answer.

    Raises:
        UserError: for an unknown role, or a message that contains ChatML's special tokens.
    """
    for message in messages:
        if message.role not in ROLES:
            raise UserError(f"role {message.role!r} is not one of {', '.join(ROLES)}")
        if START in message.content or END in message.content:
            raise UserError(f"a message contains {START} or {END}, which would end its turn")
    turns = [f"{START}{message.role}\n{message.content}{END}\n" for message in messages]
    return "".join(turns) + f"{START}assistant\n"
