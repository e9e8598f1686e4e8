"""ChatML, the form of a conversation that DBRX Instruct was trained on."""

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
    """The conversation as text, up to where the assistant's next answer begins.

    Raises:
        UserError: for a role that does not exist, or a turn that forges the marks of others.
    """
    for message in messages:
        if message.role not in ROLES:
            raise UserError(f"role {message.role!r} is not one of {', '.join(ROLES)}")
        if START in message.content or END in message.content:
            raise UserError(f"a message contains {START} or {END}, which would end its turn")
    turns = [f"{START}{message.role}\n{message.content}{END}\n" for message in messages]
    return "".join(turns) + f"{START}assistant\n"
