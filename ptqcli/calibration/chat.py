"""Chats to text, as the model was trained on them: by the tokenizer's own chat template.

A chat is a list of messages, ``{"role": ..., "content": ...}`` or, as ShareGPT has them, ``{"from": ..., "value": ...}``; also as one JSON
string, and as one object of lists. Contents are texts, or lists of parts that are all texts. What else a message has (calls of tools) is
left to the template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from ptqcli.errors import PTQError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Who speaks in ShareGPT's files, by the name that templates know.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"}
SHOWN_CHARACTERS = 200  # of what a template says against a chat
MOST_TEMPLATE_LINES = 1_000_000  # run for one chat; templates of real models take some ten a message

# (chat as it is stored, place for errors) -> its text, None for a chat without messages.
WriteChat = Callable[[Any, str], str | None]


def chat_writer(tokenizer: PreTrainedTokenizerBase) -> WriteChat:
    """What writes a chat out with the template of ``tokenizer``; a beginning-of-sequence token in front is left out, as windows have it.

    It raises PTQError, naming the place, for what is no chat, and for one that the template does not take.
    """

    def write(stored: Any, where: str) -> str | None:
        from jinja2 import TemplateError

        messages = messages_of(stored, where)
        if not messages:
            return None
        if not tokenizer.chat_template:
            raise PTQError(
                f"{where}: holds a chat, and the tokenizer has no chat template to write it out; "
                "give chats as plain text, or use a tokenizer with a template"
            )
        try:
            text = written_out(tokenizer, messages)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as error:
            reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
            raise PTQError(f"{where}: the tokenizer's chat template refuses the chat ({reason}); correct or remove it") from error
        return text.removeprefix(tokenizer.bos_token or "")

    return write


def written_out(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **how: Any) -> str:
    """``messages`` in the chat template of ``tokenizer``. how: options of transformers' ``apply_chat_template``.

    Raises PTQError for a template that does not come to an end, and whatever jinja2 does. Its sandbox bounds a range, but not ranges in
    ranges. So the lines are counted that run of the functions which jinja2 makes of a template; they have one file name.
    """
    before, lines = sys.gettrace(), 0

    def count(frame: FrameType, _event: str, _argument: object) -> Callable[..., Any] | None:
        nonlocal lines
        if frame.f_code.co_filename != "<template>":
            return None
        lines += 1
        if lines > MOST_TEMPLATE_LINES:
            raise PTQError(f"{tokenizer.name_or_path}: the chat template runs for more than {MOST_TEMPLATE_LINES} lines; mend it")
        return count

    sys.settrace(count)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))
    finally:
        sys.settrace(before)


def messages_of(stored: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a chat, each with role and content. Raises PTQError, naming the message, for anything else."""
    if isinstance(stored, str):
        try:
            stored = json.loads(stored)
        except (ValueError, RecursionError) as error:
            raise PTQError(f"{where}: holds neither messages nor JSON of them; correct or remove it") from error
    if isinstance(stored, Mapping) and stored and all(isinstance(column, list) for column in stored.values()):
        stored = [dict(zip(stored, values, strict=False)) for values in zip(*stored.values(), strict=False)]
    if not isinstance(stored, list):
        raise PTQError(f"{where}: is no list of messages but {type(stored).__name__}; correct or remove it")
    return [_message(entry, f"{where}, message {number}") for number, entry in enumerate(stored, start=1)]


def _message(stored: Any, where: str) -> dict[str, Any]:
    if not isinstance(stored, Mapping):
        raise PTQError(f"{where}: is not an object with role and content; correct or remove it")
    message = {str(key): value for key, value in stored.items() if value is not None}  # tables have every key in every message
    role, content = message.pop("from", message.get("role")), message.pop("value", message.get("content"))
    if not isinstance(role, str):
        raise PTQError(f"{where}: has no role (or 'from'); correct or remove it")
    if content is None and not message.get("tool_calls"):
        raise PTQError(f"{where}: has no content (or 'value'); correct or remove it")
    return {**message, "role": ROLES.get(role, role), "content": _content("" if content is None else content, where)}


def _content(stored: Any, where: str) -> str:
    if isinstance(stored, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in stored):
        return "".join(part["text"] for part in stored)
    if not isinstance(stored, str):
        raise PTQError(f"{where}: its content is no text; correct or remove it")
    return stored
