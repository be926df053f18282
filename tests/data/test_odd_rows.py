"""Odd rows under ten templates: trained on with nothing lost, or refused with a reason.

What is lost is judged by a check of its own, which knows nothing about marks: each text of the row
has to be in the tokens, in order, and those of the assistant's turns in the tokens with a loss.
`python -m tests.data.test_odd_rows` prints the table of docs/chats.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdp.data.prepare.documents import NOTHING_TO_LEARN, Rejected, chat_document
from hdp.data.prepare.tokenizer import ByteTokenizer, HFTokenizer
from tests.data.odd_rows import ROWS, Row
from tests.data.odd_templates import EOS, SPECIAL_TOKENS, TEMPLATES

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

DOCS = Path(__file__).parents[2] / "docs" / "chats.md"
DROPS_OLD_THOUGHTS = ("Qwen3", "DeepSeek")


@functools.cache
def tokenizer(name: str) -> HFTokenizer:
    from hdp.models.huggingface import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save_pretrained(folder)
        hf = load_tokenizer(folder)
    hf.add_special_tokens(
        {
            "eos_token": EOS.get(name, "<|im_end|>"),
            "bos_token": "<|begin_of_text|>",
            "additional_special_tokens": [*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>"],
        }
    )
    hf.chat_template = TEMPLATES[name]
    return HFTokenizer(hf, name)


def encode(row: Row, name: str) -> tuple[np.ndarray, np.ndarray] | Rejected:
    row = json.loads(json.dumps(row))
    document = chat_document(row["messages"], row.get("tools"))
    if isinstance(document, Rejected):
        return document
    [encoded] = tokenizer(name).encode_chats([document])
    return encoded


# ---- the check ----


def forms(text: str) -> set[str]:
    return {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}


def leaves(value: Any) -> Iterator[str]:
    """The texts of a JSON value, and its numbers as JSON writes them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def content_of(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else part["text"] for part in content]
        return "".join(parts).strip()
    return content.strip()


def calls_of(message: dict) -> Iterator[str]:
    legacy = message.get("function_call")
    calls = [*(message.get("tool_calls") or []), *([legacy] if legacy else [])]
    for call in calls:
        function = call.get("function", call)
        yield function["name"]
        arguments = function["arguments"]
        with contextlib.suppress(TypeError, ValueError):
            arguments = json.loads(arguments)
        if isinstance(arguments, dict):
            yield from leaves(arguments)
        elif function["arguments"]:
            yield function["arguments"]


def says(message: dict, name: str) -> list[str]:
    """Everything that has to be found, in the order in which templates print it."""
    thoughts = {message.get(key) for key in ("reasoning_content", "reasoning", "thinking")}
    content = [content_of(message)]
    if message["role"] == "assistant" and name in DROPS_OLD_THOUGHTS and "</think>" in content[0]:
        content = [piece.strip() for piece in re.split("</?think>", content[0])]
    said = [*(t.strip() for t in thoughts if t), *content, *calls_of(message)]
    return [text for text in said if text]


def has_loss(message: dict) -> bool:
    is_off = message.get("weight") == 0 or message.get("train") is False
    return message["role"] == "assistant" and not is_off


def find(text: str, said: str, start: int) -> int:
    """Where `said` ends in `text` after `start`; -1 if it is not there."""
    places = [(text.find(form, start), form) for form in forms(said)]
    found = [(place, form) for place, form in places if place >= 0]
    if not found:
        return -1
    place, form = min(found)
    return place + len(form)


def check(row: Row, name: str, text: str, learned: list[str]) -> None:
    messages = row["messages"]
    messages = json.loads(messages) if isinstance(messages, str) else messages
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    position, loss = 0, "\n".join(learned)
    for i, message in enumerate(messages):
        start = 0 if message["role"] in ("system", "developer") else position
        ends = [find(text, said, start) for said in says(message, name)]
        is_old = message["role"] == "assistant" and i < last_user and name in DROPS_OLD_THOUGHTS
        if is_old and -1 in ends:
            assert content_of(message)[-8:] not in loss, "the rest of an old turn is learned"
            continue
        assert -1 not in ends, f"message {i}, {says(message, name)}: not in {text!r}"
        if ends and start == position:
            position = max(ends)
        if has_loss(message):
            for said in says(message, name):
                assert find(loss, said, 0) >= 0, f"message {i}, {said!r}: not learned: {learned}"
        elif message["role"] == "assistant":
            assert content_of(message) not in loss, "a turn without a loss is learned"
    answers = "".join(said for m in messages if has_loss(m) for said in says(m, name))
    for message in messages:
        said, is_context = content_of(message), message["role"] != "assistant"
        if is_context and len(said) > 3 and said not in answers:
            assert said not in loss, f"{message} is learned"
    tools = row.get("tools")
    for tool in (json.loads(tools) if isinstance(tools, str) else tools) or []:
        for said in ("get_weather", 'The weather in a <city> & "town".', "city", "Where", "kelvin"):
            assert said in str(tool) and find(text, said, 0) >= 0, f"tool: {said}"


def runs(ids: np.ndarray, mask: np.ndarray, name: str) -> list[str]:
    """The text of each run of tokens with a loss."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer(name).decode(ids[a:b]) for a, b in bounds.reshape(-1, 2)]


# ---- the table ----


@functools.cache
def outcomes(name: str) -> dict[str, list[Any]]:
    return {kind: [encode(row, name) for row in rows] for kind, rows in ROWS.items()}


def table() -> str:
    lines = ["| kind | rows | " + " | ".join(TEMPLATES) + " |"]
    lines.append("|" + "---|" * (len(TEMPLATES) + 2))
    total: Counter[str] = Counter()
    for kind, rows in ROWS.items():
        cells = []
        for name in TEMPLATES:
            count = sum(not isinstance(one, Rejected) for one in outcomes(name)[kind])
            total[name] += count
            cells.append(f"{count}")
        lines.append(f"| {kind} | {len(rows)} | " + " | ".join(cells) + " |")
    counts = " | ".join(str(total[name]) for name in TEMPLATES)
    lines.append(f"| all | {sum(map(len, ROWS.values()))} | {counts} |")
    return "\n".join(lines)


def test_there_are_enough_rows() -> None:
    assert sum(map(len, ROWS.values())) >= 200 and len(TEMPLATES) == 10


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_lost_in_silence(name: str) -> None:
    for kind, rows in ROWS.items():
        for row, encoded in zip(rows, outcomes(name)[kind], strict=True):
            if isinstance(encoded, Rejected):
                assert encoded.detail or encoded.reason in NOTHING_TO_LEARN, row
                continue
            ids, mask = encoded
            check(row, name, tokenizer(name).decode(ids), runs(ids, mask, name))


def test_plain_rows_train_everywhere() -> None:
    """Refusing everything would lose nothing either."""
    plain = ROWS["texts"].index({"messages": ROWS["texts"][24]["messages"]})
    assert all(not isinstance(outcomes(name)["texts"][plain], Rejected) for name in TEMPLATES)


def test_table_in_the_docs() -> None:
    assert table() in DOCS.read_text(), "python -m tests.data.test_odd_rows prints the table"


if __name__ == "__main__":
    print(table())
