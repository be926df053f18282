"""Formats of rows: what each becomes, what is refused, and how a format is found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hdp.data.prepare.documents import (
    EMPTY,
    MALFORMED,
    NO_ASSISTANT,
    NO_COLUMN,
    NOT_UTF8,
    Document,
    Rejected,
)
from hdp.data.prepare.rows import FORMATS, columns_of, find_format, row_document

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def document(row: dict, kind: str = "auto", text_column: str = "text") -> Document | Rejected:
    found = find_format(list(row), text_column, kind)
    assert found is not None, row
    return row_document(row, found, text_column)


def says(speaker: str, value: object, **rest: object) -> dict:
    return {"from": speaker, "value": value, **rest}


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["id", "text"], "text"),
        (["messages", "text", "tools"], "chat"),
        (["conversations", "system", "id"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "completion"], "prompt"),
        (["input_ids", "attention_mask", "labels"], "tokens"),
        (["prompt", "chosen", "rejected"], None),
        ([], None),
    ],
)
def test_format_follows_from_the_columns(columns, kind):
    assert find_format(columns) == kind


def test_several_formats_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"chat \(messages\) and sharegpt.*--format chat\|sharegpt"
    ):
        find_format(["messages", "conversations"])
    assert find_format(["messages", "conversations"], requested="sharegpt") == "sharegpt"
    assert find_format(["text", "messages"], requested="text") == "text"
    assert find_format(["messages", "body"], "body") == "text"
    assert find_format(["dialog"], "dialog", "chat") == "chat"
    assert all(columns_of(name) for name in FORMATS[1:])


def test_sharegpt():
    turns = [says("system", "s"), says("human", "u"), says("gpt", "a", weight=0)]
    expected = [{"role": "system", "content": "s"}, U, {**A, "weight": 0}]
    assert document({"conversations": turns}).messages == expected
    assert document({"conversations": json.dumps(turns)}).messages == expected
    assert document({"conversations": turns[1:], "system": "s"}).messages == expected
    assert document({"conversations": [U, A]}).messages == [U, A]
    assert document({"messages": turns[1:]}).messages == expected[1:]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "conversations": [
            says("human", "u"),
            says("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            says("observation", "2"),
            says("gpt", "a"),
        ],
        "tools": json.dumps(tools),
    }
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert document(row) == Document(
        messages=[
            U,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            A,
        ],
        tools=tools,
    )


@pytest.mark.parametrize(
    ("turns", "reason", "detail"),
    [
        ([says("narrator", "x"), says("gpt", "a")], MALFORMED, "turn 0 is from 'narrator'; known"),
        ([says(None, "x"), says("gpt", "a")], MALFORMED, "turn 0 is from None"),
        ([{"from": "human"}, says("gpt", "a")], MALFORMED, "turn 0 has no 'value'"),
        ([{**says("human", "u"), **U}], MALFORMED, "which"),
        ([says("human", "u"), says("function_call", "f(1)")], MALFORMED, "is not JSON"),
        ([says("human", "u"), says("function_call", "{}")], MALFORMED, "has no name"),
        ([says("function_call", '{"name": "f", "id": 3}')], MALFORMED, "unknown keys ['id']"),
        ([says("human", "u")], NO_ASSISTANT, ""),
        ([], EMPTY, ""),
        ("[", MALFORMED, "'conversations' is not JSON"),
        ("[" * 5000, MALFORMED, "nested too deeply"),
        ({"from": "human"}, MALFORMED, "is a dict, not a list"),
    ],
)
def test_invalid_sharegpt(turns, reason, detail):
    refused = document({"conversations": turns})
    assert refused.reason == reason and detail in refused.detail


def test_system_is_said_once():
    turns = [says("system", "s"), says("human", "u"), says("gpt", "a")]
    refused = document({"conversations": turns, "system": "other"})
    assert refused.reason == MALFORMED and "system" in refused.detail


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 2", "output": "a", "system": "s"}
    asked = {"role": "user", "content": "Add.\n\n1 2"}
    system = {"role": "system", "content": "s"}
    assert document(row).messages == [system, asked, A]
    assert document({**row, "input": "", "system": None}).messages == [
        {"role": "user", "content": "Add."},
        A,
    ]
    assert document({**row, "history": [["u", "a"]]}).messages == [system, U, A, asked, A]
    for change, reason in [
        ({"output": ""}, EMPTY),
        ({"instruction": "", "input": ""}, EMPTY),
        ({"output": 5}, MALFORMED),
        ({"input": ["x"]}, MALFORMED),
        ({"history": [["u"]]}, MALFORMED),
        ({"history": "["}, MALFORMED),
        ({"output": None}, NO_COLUMN),
        ({"output": "\ud800"}, NOT_UTF8),
    ]:
        assert row_document({**row, **change}, "alpaca", "text").reason == reason


def test_prompt_and_completion():
    assert document({"prompt": "p", "completion": "c"}) == Document(prompt="p", completion="c")
    assert document({"prompt": "", "completion": "c"}) == Document(prompt="", completion="c")
    chat = document({"prompt": [U, A, U], "completion": [A]})
    assert chat.messages == [U, {**A, "train": False}, U, A]
    turns = [says("human", "u")], [says("gpt", "a")]
    assert document(dict(zip(("prompt", "completion"), turns, strict=True))).messages == [U, A]
    for prompt, completion, reason in [
        ("p", "", EMPTY),
        ([U], [], EMPTY),
        ("p", [A], MALFORMED),
        (3, "c", MALFORMED),
        ("\ud800", "c", NOT_UTF8),
        (None, "c", NO_COLUMN),
        ([says("x", "u")], [A], MALFORMED),
    ]:
        row = {"prompt": prompt, "completion": completion}
        assert row_document(row, "prompt", "text").reason == reason
    refused = document({"prompt": "p", "completion": "c", "label": False})
    assert refused.reason == MALFORMED and "label" in refused.detail


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "false", "0", " FALSE "])
def test_negative_examples_are_refused(label):
    refused = document({"prompt": "p", "completion": "c", "label": label})
    assert refused.reason == MALFORMED and "not to be learned" in refused.detail


@pytest.mark.parametrize("label", [True, 1, "true", "True", "1", None])
def test_positive_examples_are_kept(label):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert document(row) == Document(prompt="p", completion="c")


@pytest.mark.parametrize("label", [2, 0.5, "bad", "", [], [0], {"a": 1}])
def test_other_labels_are_refused(label):
    refused = document({"prompt": "p", "completion": "c", "label": label})
    assert refused.reason == MALFORMED and "write true or false" in refused.detail


def test_tools_and_system_beside_a_prompt():
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = {"prompt": "p", "completion": "c"}
    for more in ({"tools": tools}, {"tools": json.dumps(tools)}, {"system": "s"}):
        refused = document({**text, **more})
        assert refused.reason == MALFORMED and f"{min(more)!r} beside" in refused.detail
    assert document({**text, "tools": [], "system": ""}) == Document(prompt="p", completion="c")
    chat = document({"prompt": [U], "completion": [A], "tools": tools, "system": "s"})
    assert chat == Document(messages=[{"role": "system", "content": "s"}, U, A], tools=tools)
    said = {"prompt": [{"role": "system", "content": "s"}, U], "completion": [A], "system": "t"}
    assert "in the column 'system'" in document(said).detail


def test_system_beside_messages():
    system = {"role": "system", "content": "s"}
    assert document({"messages": [U, A], "system": "s"}).messages == [system, U, A]
    assert document({"messages": [U, A], "system": ""}).messages == [U, A]
    refused = document({"messages": [system, U, A], "system": "t"})
    assert refused.reason == MALFORMED and "in the column 'system'" in refused.detail


@pytest.mark.parametrize(
    "row",
    [
        {"messages": '[{"role": "assistant", "content": "a", "content": "b"}]'},
        {"messages": [U, A], "tools": '[{"name": "f", "name": "g"}]'},
    ],
)
def test_json_text_with_a_key_twice_is_refused(row):
    refused = document(row)
    assert refused.reason == MALFORMED and "is given twice" in refused.detail


def test_packed_documents_are_refused():
    assert tokens(input_ids=[5, 6, 7], position_ids=[0, 1, 2]) == ([5, 6, 7], [1, 1, 1])
    padded = {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "position_ids": [1, 0, 1]}
    assert tokens(**padded) == ([5, 6], [1, 1])
    refused = tokens(input_ids=[5, 6, 7], position_ids=[0, 1, 0])
    assert refused.reason == MALFORMED and "at token 2: several packed" in refused.detail
    refused = tokens(input_ids=[5, 6, 7], attention_mask=[1, 1, 2])
    assert refused.reason == MALFORMED and "packed documents" in refused.detail


def tokens(**row: object) -> tuple[list[int], list[int]] | Rejected:
    found = document(row)
    if isinstance(found, Rejected):
        return found
    return found.input_ids.tolist(), found.loss_mask.astype(int).tolist()


def test_tokens():
    assert tokens(input_ids=[5, 6, 7]) == ([5, 6, 7], [1, 1, 1])
    assert tokens(input_ids=[5, 6, 7], labels=[-100, 6, 7]) == ([5, 6, 7], [0, 1, 1])
    assert tokens(input_ids=[5, 6, 7], loss_mask=[0, 0, 1]) == ([5, 6, 7], [0, 0, 1])
    assert tokens(input_ids=[5, 6], completion_mask=[False, True]) == ([5, 6], [0, 1])
    masks = {"labels": [-100, 6, 7], "assistant_masks": [1, 1, 0]}
    assert tokens(input_ids=[5, 6, 7], **masks) == ([5, 6, 7], [0, 1, 0])
    padded = {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}
    assert tokens(**padded, labels=[-100, -100, 6, -100]) == ([5, 6], [0, 1])
    assert tokens(input_ids="[5, 6]") == ([5, 6], [1, 1])
    for row, reason, detail in [
        ({"input_ids": []}, EMPTY, ""),
        ({"input_ids": "x"}, MALFORMED, "not a list of integers"),
        ({"input_ids": [1.5]}, MALFORMED, "not a list of integers"),
        ({"input_ids": [[1], [2]]}, MALFORMED, "not a list of integers"),
        ({"input_ids": [[1], [2, 3]]}, MALFORMED, "not a list of integers"),
        ({"input_ids": ["1"]}, MALFORMED, "not a list of integers"),
        ({"input_ids": 3}, MALFORMED, "not a list of integers"),
        ({"input_ids": [10**30]}, MALFORMED, "not a list of integers"),
        ({"input_ids": [5, 6], "labels": [5]}, MALFORMED, "one per token"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, MALFORMED, "labels are not shifted"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, MALFORMED, "not only padding"),
        ({"input_ids": [5], "attention_mask": [0]}, EMPTY, "hides every token"),
    ]:
        refused = tokens(**row)
        assert refused.reason == reason and detail in refused.detail, row


def test_null_is_a_column_that_is_not_there():
    row = {"messages": [{**U, "name": None}, {**A, "tool_calls": None}], "tools": None}
    assert document(row) == Document(messages=[U, A])
    assert row_document({"text": None, "x": 1}, "text", "text").detail == "no 'text' among ['x']"


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_rows_of_any_shape_are_documents_or_refused(kind):
    """Nothing raises, whatever the columns hold."""
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    values = [None, 0, True, 1.5, "", "x", "[", "[[", "{}", [], [None], [[]], {}, {"a": 1}, deep,
              [{}], [U], [A], [3], [{"role": 3}], [{"from": {}}], [says("gpt", None)], "[1]", b"x",
              [{"role": "assistant"}], np.float64("nan")]  # fmt: skip
    needs, uses = columns_of(kind)
    good = {"messages": [U, A], "conversations": [U, A], "input_ids": [1], "text": "t"}
    good |= dict.fromkeys(("instruction", "output", "prompt", "completion"), "x")
    good |= {"chosen": "y", "rejected": "z", "label": True}
    for name in (*needs, *uses):
        for value in values:
            row = {**{need: good[need] for need in needs}, name: value}
            made = row_document(row, kind, "text")
            is_other = made is None and row.get("label") in (0, 1)  # bad, or good, unlike `kind`
            assert is_other or isinstance(made, (Document, Rejected)), (name, value)
