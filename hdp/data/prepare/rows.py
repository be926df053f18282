"""Rows: what a row of each format becomes.

    format     columns                      the document
    text       text (or --text-column)      the text, with a loss on every token
    chat       messages [, tools, system]   a chat, with a loss on the assistant's turns
    sharegpt   conversations [, tools,      a chat: {"from": "human", "value": ...} turns, or
               system]                      {"role": ..., "content": ...}
    alpaca     instruction, output          a chat of one turn: the user's message is instruction
               [, input, system, history]   and input with an empty line in between; for a tokenizer
                                            without a chat template, Alpaca's own prompt
    prompt     prompt, completion           two strings, or two lists of messages, with a loss on
               [, tools, system, label]     the completion only; tools and system are for messages
    tokens     input_ids [, labels, masks]  token ids, as they are
    chosen,    chosen, rejected [, prompt]  one side of a pair, as a completion of the prompt that
    rejected                                both share (preference.py); never chosen by "auto"
    good, bad  prompt, completion, label    the completions whose label is true, or false; no others

The format follows from the columns of a source, unless it is given; `text` beside the columns of
another format is its rendered copy and gives way. A null is a column that the row does not have, at
any depth, whatever the file: tables cannot tell the two apart. What a format does not know is a
rejection with its name, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from . import json_text
from .documents import (
    EMPTY,
    MALFORMED,
    NO_ANSWER,
    NO_COLUMN,
    Document,
    Rejected,
    chat_document,
    is_unicode,
    not_unicode,
    text_document,
    without_none,
)
from .preference import one_answer

RowFormat = Literal[
    "auto",
    "text",
    "chat",
    "sharegpt",
    "alpaca",
    "prompt",
    "tokens",
    "chosen",
    "rejected",
    "good",
    "bad",
]
FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)

# The columns that a format needs; it may use more.
_NEEDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "tokens": ("input_ids",),
    "chosen": ("chosen", "rejected"),
    "rejected": ("chosen", "rejected"),
    "good": ("prompt", "completion", "label"),
    "bad": ("prompt", "completion", "label"),
}
_TOKEN_MASKS = ("labels", "attention_mask", "loss_mask", "completion_mask", "assistant_masks")
_BY_REQUEST = ("chosen", "rejected", "good", "bad")  # formats that "auto" never finds
_USES: dict[str, tuple[str, ...]] = {
    "chat": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "alpaca": ("input", "system", "history"),
    "prompt": ("tools", "system", "label"),
    "tokens": (*_TOKEN_MASKS, "position_ids"),
    "chosen": ("prompt", "tools"),
    "rejected": ("prompt", "tools"),
    "good": ("tools",),
    "bad": ("tools",),
}
_LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
_IGNORED = -100
# What a label says, as text: JSON has true and 1, and tables have words.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}


def find_format(
    columns: Sequence[str], text_column: str = "text", requested: str = "auto"
) -> str | None:
    """The format of rows with these columns; None if they fit none.

    Raises ValueError if they fit several.
    """
    if requested != "auto":
        needs = columns_of(requested, text_column)[0]
        return requested if all(name in columns for name in needs) else None
    if text_column != "text":
        return "text" if text_column in columns else None
    found = [
        name
        for name, needs in _NEEDS.items()
        if name not in _BY_REQUEST and all(n in columns for n in needs)
    ]
    if len(found) > 1:
        described = " and ".join(f"{name} ({', '.join(_NEEDS[name])})" for name in found)
        raise ValueError(
            f"the columns {list(columns)} fit several formats, {described}: choose one with "
            f"format (--format {'|'.join(found)})"
        )
    return found[0] if found else ("text" if "text" in columns else None)


def columns_of(row_format: str, text_column: str = "text") -> tuple[tuple[str, ...], ...]:
    """(columns that the format needs, columns that it uses if they are there)."""
    if row_format == "text":
        return (text_column,), ()
    needs = _NEEDS[row_format]
    if row_format in ("chat", "sharegpt") and text_column != "text":
        needs = (text_column,)
    return needs, _USES[row_format]


def row_document(
    row: dict[str, Any], row_format: str, text_column: str
) -> Document | Rejected | None:
    """The document of one row; None for a row that is not what the format asks for, good or bad."""
    needs = columns_of(row_format, text_column)[0]
    try:
        row = without_none(row)
        for name in needs:
            if name not in row:
                return Rejected(reason=NO_COLUMN, detail=f"no {name!r} among {sorted(row)}")
        if row_format == "text":
            return text_document(row[text_column], text_column)
        if row_format in ("chat", "sharegpt"):
            return _chat(row, needs[0])
        if row_format in ("good", "bad"):
            return _labeled(row, is_good=row_format == "good")
        if row_format in _BY_REQUEST:
            answer = one_answer(row, row_format)
            return answer if isinstance(answer, Rejected) else _prompt(answer)
        return {"alpaca": _alpaca, "prompt": _prompt, "tokens": _tokens}[row_format](row)
    except RecursionError:
        return Rejected(reason=MALFORMED, detail="nested too deeply")


# -- chats --


def _chat(row: dict[str, Any], column: str) -> Document | Rejected:
    messages = _turns(row[column], column)
    if isinstance(messages, list):
        messages = _with_system(messages, row, column)
    if isinstance(messages, Rejected):
        return messages
    return chat_document(messages, row.get("tools"))


def _with_system(messages: list[Any], row: dict[str, Any], column: str) -> list[Any] | Rejected:
    """`messages` after the system message in the row's column `system`, if it has one."""
    system = row.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        return _malformed(f"'system' is a {type(system).__name__}, not a string")
    if any(isinstance(m, dict) and m.get("role") == "system" for m in messages):
        return _malformed(f"a system message in {column!r} and in the column 'system'")
    return [{"role": "system", "content": system}, *messages]


def _turns(value: Any, column: str) -> Any:
    """Messages with a role and content, from either way of writing them."""
    if isinstance(value, str):  # tables store rows of arbitrary structure as JSON text
        try:
            value = without_none(json_text.loads(value))
        except ValueError as error:
            return _malformed(f"{column!r} is not JSON: {error}")
    if not isinstance(value, list):
        return _malformed(f"{column!r} is a {type(value).__name__}, not a list")
    messages = []
    for i, turn in enumerate(value):
        if isinstance(turn, dict) and ("from" in turn or "value" in turn):
            turn = _turn(turn, i)
            if isinstance(turn, Rejected):
                return turn
        messages.append(turn)
    return messages


def _turn(turn: dict[str, Any], i: int) -> dict[str, Any] | Rejected:
    """The message of one {"from": ..., "value": ...} turn; other keys are kept as they are."""
    if "role" in turn or "content" in turn:
        return _malformed(f"turn {i} has 'from' or 'value', and 'role' or 'content': which?")
    speaker, value = turn.get("from"), turn.get("value")
    if value is None:
        return _malformed(f"turn {i} has no 'value'")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return _function_call(value, rest, i)
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join([*_ROLES, "function_call"])
        return _malformed(f"turn {i} is from {speaker!r}; known are {known}")
    return {"role": role, "content": value, **rest}


def _function_call(value: Any, rest: dict[str, Any], i: int) -> dict[str, Any] | Rejected:
    try:
        calls = json_text.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        return _malformed(f"turn {i}, a function_call, is not JSON: {error}")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return _malformed(f"turn {i}, a function_call, has no name")
    unknown = {key for call in calls for key in call} - {"name", "arguments"}
    if unknown:
        return _malformed(f"turn {i}, a function_call, has unknown keys {sorted(unknown)}")
    tool_calls = [
        {"type": "function", "function": {"arguments": {}, **without_none(call)}} for call in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls, **rest}


def _alpaca(row: dict[str, Any]) -> Document | Rejected:
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(name, ""), str):
            return _malformed(f"{name!r} is a {type(row[name]).__name__}, not a string")
    parts = [part for part in (row["instruction"], row.get("input", "")) if part]
    if not parts or not row["output"]:
        return Rejected(reason=EMPTY, detail=f"no {'output' if parts else 'instruction'}")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history") or []
    try:
        history = json_text.loads(history) if isinstance(history, str) else history
    except ValueError as error:
        return _malformed(f"'history' is not JSON: {error}")
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not pairs:
        return _malformed("'history' is not a list of [user, assistant] pairs of strings")
    for user, assistant in history:
        messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    is_one_turn = not messages
    messages.append({"role": "user", "content": "\n\n".join(parts)})
    chat = chat_document([*messages, {"role": "assistant", "content": row["output"]}])
    if isinstance(chat, Rejected) or not is_one_turn:
        return chat
    return replace(chat, prompt=_alpaca_prompt(parts), completion=row["output"])


def _alpaca_prompt(parts: list[str]) -> str:
    """The prompt of https://github.com/tatsu-lab/stanford_alpaca, with which models were trained
    before tokenizers had chat templates."""
    task, *inputs = parts
    beside = ", paired with an input that provides further context" if inputs else ""
    return (
        f"Below is an instruction that describes a task{beside}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{task}\n\n"
        + "".join(f"### Input:\n{text}\n\n" for text in inputs)
        + "### Response:\n"
    )


def _labeled(row: dict[str, Any], *, is_good: bool) -> Document | Rejected | None:
    label = _LABELS.get(str(row["label"]).strip().lower())
    if label is None:
        return _malformed(f"'label' is {row['label']!r}: write true or false")
    if label != is_good:
        return None
    document = _prompt({name: value for name, value in row.items() if name != "label"})
    if isinstance(document, Rejected) and document.reason == EMPTY:
        return Rejected(reason=NO_ANSWER, detail=document.detail)
    return document


def _prompt(row: dict[str, Any]) -> Document | Rejected:
    prompt, completion = row["prompt"], row["completion"]
    is_good = _LABELS.get(str(row.get("label", True)).strip().lower())
    if is_good is None:
        return _malformed(f"'label' is {row['label']!r}: write true or false")
    if not is_good:
        return _malformed(f"'label' is {row['label']!r}: a completion that is not to be learned")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            return Rejected(reason=EMPTY, detail="no completion")
        for name in ("system", "tools"):
            if row.get(name) and row[name] != "[]":
                return _malformed(f"{name!r} beside a prompt that is text: write it there")
        if not is_unicode(prompt + completion):
            return not_unicode()
        return Document(prompt=prompt, completion=completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        return _malformed(f"'prompt' and 'completion' are {kinds}: both strings, or both lists")
    if not completion:
        return Rejected(reason=EMPTY, detail="no completion")
    prompt, completion = _turns(prompt, "prompt"), _turns(completion, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt = _with_system(prompt, row, "prompt")
    for part in (prompt, completion):
        if isinstance(part, Rejected):
            return part
    # The loss is on the completion: what the assistant says in the prompt is context.
    context = [
        {**turn, "train": False}
        if isinstance(turn, dict) and turn.get("role") == "assistant"
        else turn
        for turn in prompt
    ]
    return chat_document([*context, *completion], row.get("tools"))


# -- tokens --


def _tokens(row: dict[str, Any]) -> Document | Rejected:
    ids = _integers(row["input_ids"])
    if ids is None:
        return _malformed("'input_ids' is not a list of integers")
    if not len(ids):
        return Rejected(reason=EMPTY)
    loss = np.ones(len(ids), dtype=bool)
    masks = {}
    for name in (*_TOKEN_MASKS, "position_ids"):
        if name in row:
            mask = _integers(row[name])
            if mask is None or len(mask) != len(ids):
                return _malformed(f"{name!r} is not a list of {len(ids)} integers, one per token")
            masks[name] = mask
    if "labels" in masks:
        labels = masks["labels"]
        wrong = np.flatnonzero((labels != _IGNORED) & (labels != ids))
        if len(wrong):
            at = int(wrong[0])
            return _malformed(
                f"label {at} is {labels[at]}, neither token {at} ({ids[at]}) nor {_IGNORED}: "
                "labels are not shifted"
            )
        loss &= labels != _IGNORED
    for name in _LOSS_MASKS:
        if name in masks:
            loss &= masks[name] != 0
    if "attention_mask" in masks:  # what it hides is padding, at the ends
        if not np.isin(masks["attention_mask"], (0, 1)).all():
            return _malformed("'attention_mask' numbers packed documents; write a row for each")
        shown = np.flatnonzero(masks["attention_mask"])
        if not len(shown):
            return Rejected(reason=EMPTY, detail="'attention_mask' hides every token")
        if len(shown) != shown[-1] - shown[0] + 1:
            return _malformed("'attention_mask' hides tokens between others: not only padding")
        ids, loss = ids[shown[0] : shown[-1] + 1], loss[shown[0] : shown[-1] + 1]
        masks = {name: mask[shown[0] : shown[-1] + 1] for name, mask in masks.items()}
    resets = np.flatnonzero(np.diff(masks.get("position_ids", np.arange(len(ids)))) != 1)
    if len(resets):
        return _malformed(
            f"'position_ids' do not go on at token {resets[0] + 1}: several packed documents; "
            "write a row for each"
        )
    return Document(input_ids=ids, loss_mask=loss)


def _integers(value: Any) -> np.ndarray | None:
    """(n,) int64, or None if `value` is not a list of integers (or of booleans)."""
    try:
        value = json_text.loads(value) if isinstance(value, str) else value
        array = np.array(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if not isinstance(value, list) or array.ndim != 1:
        return None
    if len(array) and array.dtype.kind not in "iub":
        return None
    return array.astype(np.int64)


def _malformed(detail: str) -> Rejected:
    return Rejected(reason=MALFORMED, detail=detail)
