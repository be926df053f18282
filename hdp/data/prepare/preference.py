"""Pairs of answers to one prompt, in TRL's shapes: prompt, chosen, rejected.

    prompt, chosen, rejected    three strings, or three lists of messages
    chosen, rejected            both with the prompt in front: what the two have in common is it
    prompt, chosen, rejected    a string, and two whole conversations that begin with it

A pair is tokenized as two documents, each a prompt with its completion, so that the loss and the
sums of log-probabilities are on the answer alone. Whether a pair is one is decided here, for both
sides alike: an empty answer or two equal ones say nothing about what is better.
"""

from __future__ import annotations

import json
from typing import Any

from .documents import EQUAL, MALFORMED, NO_ANSWER, Rejected, without_none

SIDES = ("chosen", "rejected")


def one_answer(row: dict[str, Any], side: str) -> dict[str, Any] | Rejected:
    """{"prompt", "completion" [, "tools"]} of one side, "chosen" or "rejected", of a pair."""
    try:
        row = {**row, **{name: _decoded(row[name]) for name in ("prompt", *SIDES) if name in row}}
    except ValueError as error:
        return Rejected(reason=MALFORMED, detail=f"a list of messages is not JSON: {error}")
    kinds = {name: type(row[name]).__name__ for name in SIDES}
    if len(set(kinds.values())) > 1 or kinds["chosen"] not in ("str", "list"):
        detail = f"'chosen' is a {kinds['chosen']} and 'rejected' a {kinds['rejected']}"
        return Rejected(reason=MALFORMED, detail=f"{detail}: two strings, or two lists of messages")
    prompt, answers = row.get("prompt"), {name: row[name] for name in SIDES}
    if prompt is None or (isinstance(prompt, str) and kinds["chosen"] == "list"):
        shared = _shared(answers["chosen"], answers["rejected"])
        if prompt is not None and not _begins_with(answers["chosen"][:shared], prompt):
            detail = "'prompt' is a string that the conversations do not begin with"
            return Rejected(reason=MALFORMED, detail=detail)
        prompt = answers["chosen"][:shared]
        answers = {name: answer[shared:] for name, answer in answers.items()}
    for name, answer in answers.items():
        if _is_empty(answer):
            return Rejected(reason=NO_ANSWER, detail=f"{name!r} is empty")
    if answers["chosen"] == answers["rejected"]:
        return Rejected(reason=EQUAL)
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"prompt": prompt, "completion": answers[side], **tools}


def _decoded(value: Any) -> Any:
    """A list that a table holds as JSON text; other values as they are."""
    if isinstance(value, str) and value.startswith('[{"'):
        return without_none(json.loads(value))
    return value


def _shared(a: Any, b: Any) -> int:
    """How many characters or messages two answers have in common at their start.

    In text, the cut is before a space that both have, as TRL makes it: " yes" and " no" are words
    with their space. One answer that begins with the other keeps its last message.
    """
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    if isinstance(a, str):
        return count - 1 if count and a[count - 1] == " " else count
    return count


def _begins_with(messages: list[Any], prompt: str) -> bool:
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    return prompt in texts


def _is_empty(answer: Any) -> bool:
    """Whether an answer says nothing: no text, or no message with anything in it."""
    if isinstance(answer, str):
        return not answer.strip()
    return not any(
        isinstance(message, dict) and any(message.get(key) for key in ("content", "tool_calls"))
        for message in answer
    )
