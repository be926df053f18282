"""Document or Rejected: what one row of a source becomes.

Every row becomes one of the two, so rows = documents + rejections, and a report can account for
each row. Damage (the first group below) is an error under `strict`; rows with nothing to learn from
are only counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import json_text
from .messages import says_nothing

UNREADABLE = "unreadable"
NOT_UTF8 = "not UTF-8"
MALFORMED = "malformed"
NO_COLUMN = "missing a column"
TEMPLATE = "refused by the chat template"
UNKNOWN_TOKEN = "outside the vocabulary"
NO_ANSWER = "without an answer"
EQUAL = "a pair of equal answers"
DAMAGE = (UNREADABLE, NOT_UTF8, MALFORMED, NO_COLUMN, TEMPLATE, UNKNOWN_TOKEN, NO_ANSWER, EQUAL)

EMPTY = "empty"
NO_ASSISTANT = "without an assistant turn"
NOTHING_TO_LEARN = (EMPTY, NO_ASSISTANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One of: text; a conversation for the tokenizer's chat template; a prompt and its completion,
    which alone gets a loss; token ids. A conversation that has a prompt and a completion, too, is
    these for a tokenizer without a chat template."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    input_ids: np.ndarray | None = None  # (seqlen,) int64
    loss_mask: np.ndarray | None = None  # (seqlen,) bool, of input_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that did not become a document, and why."""

    reason: str  # one of DAMAGE or NOTHING_TO_LEARN
    detail: str = ""


def text_document(value: Any, column: str) -> Document | Rejected:
    """The document in a text column's value."""
    if not isinstance(value, str):
        kind = type(value).__name__
        return Rejected(reason=MALFORMED, detail=f"{column!r} is a {kind}, not a string")
    if not value:
        return Rejected(reason=EMPTY)
    if not is_unicode(value):
        return not_unicode()
    return Document(text=value)


def chat_document(messages: Any, tools: Any = None) -> Document | Rejected:
    """The document in a `messages` value: a list of objects with a role, one of them "assistant".

    Keys whose value is null are left out, as in transformers: templates print them as "None".
    """
    try:  # tables store rows of arbitrary structure as JSON text
        messages = json_text.loads(messages) if isinstance(messages, str) else messages
        tools = json_text.loads(tools) if isinstance(tools, str) and tools else tools
        as_text = json.dumps([messages, tools], ensure_ascii=False, default=str)
    except RecursionError:
        return Rejected(reason=MALFORMED, detail="'messages' or 'tools' is nested too deeply")
    except ValueError as error:
        return Rejected(reason=MALFORMED, detail=f"'messages' or 'tools' is not JSON: {error}")
    if not isinstance(messages, list):
        kind = type(messages).__name__
        return Rejected(reason=MALFORMED, detail=f"'messages' is a {kind}, not a list")
    if not messages:
        return Rejected(reason=EMPTY)
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Rejected(reason=MALFORMED, detail=f"message {i} is not an object with a role")
    if not any(message["role"] == "assistant" for message in messages):
        return Rejected(reason=NO_ASSISTANT)
    if all(says_nothing(message) for message in messages if message["role"] == "assistant"):
        return Rejected(reason=EMPTY, detail="no assistant text")
    if not is_unicode(as_text):
        return Rejected(reason=NOT_UTF8, detail="half of a surrogate pair")
    messages = [{key: v for key, v in message.items() if v is not None} for message in messages]
    return Document(messages=messages, tools=tools or None)


def parse_line(line: bytes) -> dict[str, Any] | Rejected | None:
    """The object in one line of a JSON Lines file; None for a blank line."""
    try:
        text = line.decode("utf-8-sig")
        if not text or text.isspace():
            return None
        row = json_text.loads(text)
    except UnicodeDecodeError as error:
        return Rejected(reason=NOT_UTF8, detail=f"byte {error.start}: {error.reason}")
    except RecursionError:
        return Rejected(reason=MALFORMED, detail="nested too deeply")
    except ValueError as error:
        return Rejected(reason=MALFORMED, detail=f"not JSON: {error}")
    if not isinstance(row, dict):
        return Rejected(reason=MALFORMED, detail=f"a JSON {type(row).__name__}, not an object")
    return row


def without_none(value: Any) -> Any:
    """`value` without keys whose value is None, at any depth.

    Tables give every row every key, but chat templates treat a key that exists as set.
    """
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def not_unicode() -> Rejected:
    """The rejection of text that `is_unicode` refuses."""
    return Rejected(reason=NOT_UTF8, detail="half of a surrogate pair")


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: it has no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
