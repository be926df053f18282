"""Messages in one form: what rows write in many ways, as chat templates take it.

A message says its role, its content, its tool calls and its reasoning. Everything else either
carries no content, and is left out, or the chat is refused by the name of the key:

* content: text, or a list of text parts, which are joined; other parts are refused by their type
* tool calls: arguments written as a JSON string are decoded once, and empty lists are dropped; the
  older `function_call` becomes a tool call
* reasoning: `reasoning_content`, `reasoning` and `thinking` are one field, `reasoning_content`
* `weight` (0 or 1) and `train` (true or false) say whether an assistant turn carries a loss; other
  switches, of which nobody can say what they mean, are refused; an empty turn carries none
* keys that the template names are kept; METADATA that it does not name is left out, and so are
  empty values; any other key is refused
"""

from __future__ import annotations

import json
import re
from typing import Any

from hdp.errors import ChatTemplateError

from . import json_text

Messages = list[dict[str, Any]]

ROLE, CONTENT, CALLS, THOUGHT = "role", "content", "tool_calls", "reasoning_content"
REASONING = (THOUGHT, "reasoning", "thinking")
# Which call an answer belongs to. Many templates leave it to the order of the messages.
_LINKS = ("name", "tool_call_id")
# Keys that say something about a message and nothing in it.
METADATA = frozenset(
    (
        *("annotations", "author", "cache_control", "channel", "conversation_id"),
        *("country", "created", "created_at", "date", "emojis", "finish_reason"),
        *("hashed_ip", "header", "id", "idx", "index", "lang", "language", "logprobs"),
        *("message_id", "meta", "metadata", "model", "model_name", "msg_id", "num_tokens"),
        *("parent", "parent_id", "provider", "rank", "rating", "recipient", "redacted"),
        *("score", "source", "state", "status", "stop_reason", "thread_id", "time"),
        *("timestamp", "token_count", "tokens", "toxic", "turn", "turn_id"),
        *("turn_identifier", "type", "updated_at", "usage", "user", "user_id", "uuid"),
    )
)
# Keys that ask for, or against, a loss in a way that is not `weight` or `train`.
_SWITCH = re.compile(r"(?i)loss|mask|train|weight|learn|supervis|ignore|predict|^target")
_CALL_KEYS = frozenset(("id", "type", "index", "function", "name", "arguments"))


def normalize(messages: Messages, template: str = "") -> tuple[Messages, list[bool]]:
    """`messages` in the form described above, and which of them carry a loss.

    template: its source; keys that it names are kept. Raises ChatTemplateError, which names the
    message and the key, for content that cannot be rendered and switches that are not understood.
    """
    normal, learns = [], []
    for i, message in enumerate(messages):
        try:
            said, has_loss = _message(message, template), _learns(message)
            if message[ROLE] == "assistant" and says_nothing(message):
                # Whichever way it is written; there is nothing to learn but to stop at once.
                said, has_loss = {**said, CONTENT: ""}, False
            normal.append(said)
            learns.append(has_loss)
        except ChatTemplateError as error:
            raise ChatTemplateError(f"message {i}: {error}") from None
    return normal, learns


def says_nothing(message: dict[str, Any]) -> bool:
    """Whether a message has no content, no tool calls and no reasoning, in any way of writing."""
    others = (message.get(key) for key in (CALLS, "function_call", *REASONING))
    return _is_blank(message.get(CONTENT)) and all(map(_is_empty, others))


def _is_blank(content: Any) -> bool:
    """Whether content is empty, or a list of parts with empty texts."""
    if isinstance(content, list):
        return all(
            part == "" or (isinstance(part, dict) and _is_empty_text(part)) for part in content
        )
    return _is_empty(content)


def _is_empty_text(part: dict[str, Any]) -> bool:
    return part.get("type", "text") == "text" and _is_empty(part.get("text"))


def join_parts(content: Any) -> str:
    """The text of a message's content. Raises ChatTemplateError if anything in it is not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(f"content is a {type(content).__name__}, not text")
    return "".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ChatTemplateError(f"content has a part that is a {type(part).__name__}, not text")
    kind = part.get("type", "text")
    others = {k for k, v in part.items() if not _is_empty(v)} - {"type", "text", *METADATA}
    if kind != "text" or others:
        name = kind if kind != "text" else min(others)
        raise ChatTemplateError(f"content has a part {name!r}, and only text can be trained on")
    if not isinstance(part.get("text"), str):
        raise ChatTemplateError("content has a text part without text")
    return part["text"]


def _message(message: dict[str, Any], template: str) -> dict[str, Any]:
    role = message.get(ROLE)
    if not isinstance(role, str) or not role.strip():
        raise ChatTemplateError(f"the role is {role!r}, not a name")
    normal: dict[str, Any] = {ROLE: role}
    if message.get(CONTENT) is not None:
        normal[CONTENT] = join_parts(message[CONTENT])
    thoughts = {message[key] for key in REASONING if _is_text(message, key)} - {""}
    if len(thoughts) > 1:
        raise ChatTemplateError("it has two different reasoning texts; keep one")
    if thoughts:
        normal[_thought_key(template)] = thoughts.pop()
    if calls := _calls(message):
        normal[CALLS] = calls
    for key in _LINKS:
        if message.get(key) is not None:
            normal[key] = message[key]
    known = {ROLE, CONTENT, *REASONING, CALLS, "function_call", *_LINKS, "weight", "train"}
    for key, value in message.items():
        if key in known or value is None:
            continue
        if _SWITCH.search(key):
            raise ChatTemplateError(
                f'{key!r} is {value!r}: write "weight": 0 or "train": false for no loss'
            )
        if _is_empty(value):
            continue
        if _reads(template, key):
            normal[key] = value
        elif key not in METADATA:
            raise ChatTemplateError(f"{key!r} would not be trained on; delete it, or the message")
    return normal


def _learns(message: dict[str, Any]) -> bool:
    """Whether the message carries a loss."""
    asked = set()
    if (weight := message.get("weight")) is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ChatTemplateError(f"'weight' is {weight!r}: write 0 or 1")
        asked.add(weight == 1)
    if (train := message.get("train")) is not None:
        if not isinstance(train, bool):
            raise ChatTemplateError(f"'train' is {train!r}: write true or false")
        asked.add(train)
    is_assistant = message[ROLE] == "assistant"
    if len(asked) > 1:
        raise ChatTemplateError("'weight' and 'train' contradict each other")
    if True in asked and not is_assistant:
        raise ChatTemplateError(f"a {message[ROLE]} message asks for a loss; only assistants can")
    return is_assistant and False not in asked


# ---- tool calls ----


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get(CALLS) or []
    if not isinstance(calls, list):
        raise ChatTemplateError(f"'tool_calls' is a {type(calls).__name__}, not a list")
    if legacy := message.get("function_call"):
        calls = [*calls, {"type": "function", "function": legacy}]
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ChatTemplateError("a tool call is not an object")
    call = {key: value for key, value in call.items() if value is not None}
    is_nested = isinstance(call.get("function"), dict)
    function = dict(call["function"]) if is_nested else call
    unknown = sorted({*call, *function} - _CALL_KEYS)
    name = function.get("name")
    if unknown or not isinstance(name, str) or not name:
        what = f"an unknown key {unknown[0]!r}" if unknown else "no function name"
        raise ChatTemplateError(f"a tool call has {what}; write name and arguments")
    if "arguments" in function:
        function["arguments"] = _decoded(function["arguments"])
    return {**call, "function": function} if is_nested else function


def _decoded(arguments: Any) -> Any:
    """The arguments as an object; text that is not a JSON object stays text."""
    if isinstance(arguments, dict):
        return arguments
    if not isinstance(arguments, str):
        kind = type(arguments).__name__
        raise ChatTemplateError(f"the arguments of a tool call are a {kind}, not an object")
    if not arguments.strip():
        return {}
    try:
        decoded = json_text.loads(arguments)
    except json_text.DuplicateKey:
        raise ChatTemplateError("the arguments of a tool call name a key twice") from None
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, dict) else arguments


# ---- other forms of the same messages ----


def with_parts(messages: Messages) -> Messages:
    """Contents as lists with one text part, for templates that take nothing else."""
    return [
        {**m, CONTENT: [{"type": "text", "text": m[CONTENT]}]} if CONTENT in m else m
        for m in messages
    ]


def with_json_arguments(messages: Messages) -> Messages:
    """Arguments as JSON text, for templates that print them as they are."""

    def call(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            call = {**call, "function": _json_arguments(call["function"])}
        return _json_arguments(call)

    return [{**m, CALLS: [call(c) for c in m[CALLS]]} if CALLS in m else m for m in messages]


def with_empty_content(messages: Messages) -> Messages:
    """Empty content where there is none, for templates that always print it."""
    return [m if CONTENT in m else {**m, CONTENT: ""} for m in messages]


def _json_arguments(function: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(function.get("arguments"), dict):
        return function
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _reads(template: str, key: str) -> bool:
    """Whether the template's source names a key."""
    return re.search(rf"['\".]{re.escape(key)}\b", template) is not None


def _thought_key(template: str) -> str:
    """The name under which the template reads reasoning."""
    return next((key for key in REASONING if _reads(template, key)), THOUGHT)


def _is_text(message: dict[str, Any], key: str) -> bool:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise ChatTemplateError(f"{key!r} is a {type(value).__name__}, not text")
    return value is not None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)
