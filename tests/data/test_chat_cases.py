"""Chats from the field: what a row says is trained on, or the row is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from hdp.data.prepare.chat import ChatTemplate
from hdp.data.prepare.documents import EMPTY, MALFORMED, Document, Rejected, chat_document
from hdp.data.prepare.messages import METADATA, normalize
from hdp.data.prepare.tokenizer import ByteTokenizer
from hdp.errors import ChatTemplateError
from tests.data.chat_templates import CHATML, KINDS
from tests.data.odd_templates import (
    GENERATION,
    HERMES,
    LLAMA,
    QWEN3,
    SILENT,
    SPECIAL_TOKENS,
    TEMPLATES,
)
from tests.data.test_chat import make_render, make_template

U, A = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Fine."}


def spans(messages: list[dict], template: str = CHATML, **options: Any) -> list[str]:
    text, found = make_template("chatml", template).render_spans(messages, **options)
    return [text[start:stop] for start, stop in found]


def text_of(messages: list[dict], template: str = CHATML, **options: Any) -> str:
    return make_template("chatml", template).render_spans(messages, **options)[0]


def refuses(messages: list[dict], match: str, template: str = CHATML, **options: Any) -> None:
    with pytest.raises(ChatTemplateError, match=match):
        spans(messages, template, **options)


# ---- B. what the row says is not what the template rendered ----


def test_text_parts_are_joined_for_templates_that_take_strings():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    assert text_of([{**U, "content": parts}, A]) == text_of([{**U, "content": "What is 2+2?"}, A])


def test_text_becomes_parts_for_templates_that_take_parts():
    assert spans([U, A], GENERATION) == ["Fine.<|im_end|>"]
    assert "Weather?" in text_of([U, A], GENERATION)


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "refusal", "file"])
def test_other_parts_are_refused_by_name(kind):
    text = {"type": "text", "text": "Look:"}
    refuses([{**U, "content": [text, {"type": kind}]}, A], f"message 0: .*'{kind}'")
    both = {**text, "image_url": "x.png"}
    refuses([{**U, "content": [both]}, A], "'image_url'")


CALL = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": "Rome"}}}],
}


def test_calls_that_the_template_does_not_know_are_refused():
    """An empty turn would be learned."""
    refuses([U, {**CALL, "content": ""}, A], r"message 1 \(assistant\): the name of tool call 0")


def test_roles_that_vanish_are_refused():
    developer = {"role": "developer", "content": "Be brief."}
    refuses([developer, U, A], r"message 0 \(developer\): the content", SILENT)


def test_roles_that_look_like_another_are_refused():
    two = (
        "{% for m in messages %}{{ ('A: ' if m.role == 'assistant' else 'U: ') + m.content }}\n"
        "{% endfor %}"
    )
    assert spans([U, A], two) == ["Fine.\n"]
    refuses([{"role": "system", "content": "Be brief."}, U, A], "system and user the same", two)
    one = "{% for m in messages %}{{ 'turn: ' + m.content }}\n{% endfor %}"
    refuses([U, A], "assistant and user the same", one)
    raw = "{% for m in messages %}{% if m.role == 'user' %}U: {% elif m.role == 'assistant' %}A: "
    raw += "{% endif %}{{ m.content }}\n{% endfor %}"
    refuses([U, {"role": "critic", "content": "Hm."}, A], "does not know role 'critic'", raw)


def test_cut_and_changed_contents_are_refused():
    long = {**A, "content": "A long answer, cut."}
    for change in ("[:9]", " | upper", " | replace('long', 'short')"):
        changed = CHATML.replace("m['content']", f"(m['content']{change})")
        refuses([U, long], "message [01]", changed)


def test_missing_tool_definitions_are_refused():
    tool = {"type": "function", "function": {"name": "f", "description": "Does it."}}
    refuses([U, A], r"the name of tool 0 \('f'\)", tools=[tool])
    assert "Does it." in text_of([U, A], QWEN3, tools=[tool])


def test_reasoning_must_appear_where_it_is_trained():
    thought = {**A, "reasoning_content": "Look outside."}
    refuses([U, thought], "message 1 .*reasoning")
    assert spans([U, thought], QWEN3) == ["<think>\nLook outside.\n</think>\n\nFine.<|im_end|>"]
    for key in ("reasoning", "thinking"):
        assert spans([U, {**A, key: "Look outside."}], QWEN3) == spans([U, thought], QWEN3)


def test_old_turns_whose_reasoning_is_left_out_carry_no_loss():
    old = {"role": "assistant", "content": "Old.", "reasoning_content": "Old thought."}
    new = spans([U, {**A, "reasoning_content": "New."}], QWEN3)
    assert spans([U, old, U, {**A, "reasoning_content": "New."}], QWEN3) == new
    tagged = {"role": "assistant", "content": "<think>\nOld thought.\n</think>\n\nOld."}
    assert spans([U, tagged, U, {**A, "reasoning_content": "New."}], QWEN3) == new
    refuses([U, old, U, A], "message 1 .*reasoning")  # a template that never shows reasoning


# ---- C. wire format ----


@pytest.mark.parametrize("template", [QWEN3, LLAMA.replace("strftime_now('%d %b %Y')", "'x'")])
def test_arguments_in_json_are_decoded_once(template):
    answer = {"role": "tool", "content": "sunny"}
    wire = {"name": "f", "arguments": '{"city": "R\\u00f6me", "days": 3}'}
    decoded = {"name": "f", "arguments": {"city": "R\u00f6me", "days": 3}}
    chats = [
        [U, {"role": "assistant", "tool_calls": [{"function": function}]}, answer, A]
        for function in (wire, decoded)
    ]
    assert text_of(chats[0], template) == text_of(chats[1], template)
    tokens = [*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>"]
    chat = ChatTemplate(make_render(template, KINDS["chatml"]), template, special_tokens=tokens)
    text, [(start, stop), _] = chat.render_spans(chats[0])
    assert '{"city": "R\u00f6me", "days": 3}' in text[start:stop]
    assert text[start:stop].endswith(("}<|eom_id|>", "</tool_call><|im_end|>"))


def test_templates_that_print_arguments_as_text_get_json():
    assert (
        '"arguments": {"x": "Rome"}'
        in spans([U, CALL, {"role": "tool", "content": "4"}, A], HERMES)[0]
    )


def test_empty_and_legacy_calls():
    assert spans([U, {**A, "tool_calls": []}]) == spans([U, A])
    legacy = {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": "Rome"}'}}
    answer = {"role": "tool", "content": "4"}
    assert spans([U, legacy, answer, A], QWEN3) == spans([U, CALL, answer, A], QWEN3)
    twice = {"name": "f", "arguments": '{"x": 1, "x": 2}'}
    refuses([U, {"role": "assistant", "tool_calls": [twice]}, A], "a key twice", QWEN3)


# ---- G. loss switches ----


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("template", [CHATML, GENERATION, QWEN3])
def test_turns_without_a_loss(off, template):
    first = {"role": "assistant", "content": "Not this."}
    [learned] = spans([U, {**first, **off}, U, A], template)
    assert learned.endswith("Fine.<|im_end|>") and "Not this." not in learned
    for on in ({"weight": 1}, {"train": True}, {"train": None}):
        assert len(spans([U, {**first, **on}, U, A], template)) == 2


def test_turns_without_a_loss_of_our_own_tokenizers():
    tokenizer = ByteTokenizer()
    first = {"role": "assistant", "content": "Not this.", "weight": 0}
    [(ids, mask)] = tokenizer.encode_chats([Document(messages=[U, first, U, A])])
    assert tokenizer.decode(ids[mask]) == "Fine.<|im_end|>"
    bad = [{**first, "loss_mask": 0}], [{**first, "weight": 2}], [CALL]
    for messages in bad:
        [result] = tokenizer.encode_chats([Document(messages=messages)])
        assert isinstance(result, Rejected)
    [result] = tokenizer.encode_chats([Document(messages=[U, A], tools=[{"name": "f"}])])
    assert isinstance(result, Rejected) and "tool definitions" in result.detail


@pytest.mark.parametrize(
    "key", ["loss", "loss_mask", "trainable", "mask", "masked", "train_on_turn", "loss_weight"]
)
def test_other_switches_are_refused_by_name(key):
    for value in (0, 1, False, True, []):
        refuses([U, {**A, key: value}], f"message 1: '{key}'")


def test_wrong_values_of_switches_are_refused():
    for switch in ({"weight": 0.5}, {"weight": True}, {"weight": "0"}, {"train": 0}):
        refuses([U, {**A, **switch}], "message 1: '(weight|train)'")
    refuses([{**U, "train": True}, A], "message 0: a user message asks for a loss")
    refuses([U, {**A, "weight": 1, "train": False}], "contradict")


def test_other_keys():
    """Metadata passes; what holds content, or may hold it, is refused by name."""
    assert spans([U, {**A, **dict.fromkeys(METADATA, "x")}]) == ["Fine.<|im_end|>"]
    assert spans([U, {**A, "refusal": None, "audio": None, "images": []}]) == ["Fine.<|im_end|>"]
    for key in ("refusal", "audio", "images", "text", "value", "anything"):
        refuses([U, {**A, key: "x"}], f"message 1: '{key}'")


def test_metadata_that_the_template_names_is_printed():
    header = "{{- '<|im_start|>' + m['role'] + "
    dated = CHATML.replace(header, header + "(' on ' + m.date if m.date else '') + ")
    assert dated != CHATML
    text = text_of([{**U, "date": "May 5"}, A], dated)
    assert "<|im_start|>user on May 5\nWeather?" in text
    assert spans([{**U, "date": "May 5"}, A], dated) == ["Fine.<|im_end|>"]
    sent = CHATML.replace("+ m['content']", "+ (m['recipient'] or '') + m['content']")
    assert spans([U, {**A, "recipient": "all:"}], sent) == ["all:Fine.<|im_end|>"]


def test_metadata_that_the_template_compares_is_passed():
    loud = CHATML.replace("+ m['content']", "+ ('!' if m.channel == 'loud' else '') + m['content']")
    messages = [{**U, "channel": "loud"}, A]
    assert "user\n!Weather?" in text_of(messages, loud)
    assert spans(messages, loud) == ["Fine.<|im_end|>"]
    unused = "{% if false %}{{ messages[0].type }}{% endif %}" + CHATML
    assert spans([{**U, "type": "message"}, A], unused) == ["Fine.<|im_end|>"]


def test_normalize_leaves_plain_messages_alone():
    assert normalize([U, A]) == ([U, A], [False, True])


# ---- deep nesting ----


@pytest.mark.parametrize("column", ["messages", "tools"])
def test_brackets_without_end_are_a_malformed_row(column):
    row = {"messages": [U, A], "tools": None, column: "[" * 100_000}
    result = chat_document(row["messages"], row["tools"])
    assert isinstance(result, Rejected) and result.reason == MALFORMED
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    result = chat_document([U, {**A, "metadata": nested}])
    assert isinstance(result, Rejected) and "nested" in result.detail


def test_templates_that_explode_are_refused():
    endless = "{% for i in range(90000) %}{{ 'x' * 5000 }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="renders 450,000,000 characters"):
        make_template("chatml", endless).render_spans([U, A])


def test_every_kind_of_template_knows_plain_chats():
    for name in KINDS:
        make_template(name).render_spans([U, A])
    assert len(TEMPLATES) == 10


# ---- empty turns ----

EMPTY_TURNS = [
    {"role": "assistant", **rest}
    for rest in (
        {"content": None},
        {"content": ""},
        {"content": []},
        {"content": [{"type": "text", "text": ""}]},
        {"content": "", "tool_calls": [], "reasoning": ""},
        {},
    )
]
PICKY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% if m.content %}{{ m.content }}{% endif %}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA, GENERATION, PICKY])
@pytest.mark.parametrize("empty", EMPTY_TURNS)
def test_an_empty_turn_carries_no_loss(empty, template):
    end = "<|eot_id|>" if template == LLAMA else "<|im_end|>"
    template = template.replace("strftime_now('%d %b %Y')", "''")
    written = ChatTemplate(
        make_render(template, KINDS["chatml"]),
        template,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"],
    )
    for messages in ([U, empty, U, A], [U, A, U, empty]):
        text, found = written.render_spans(messages)
        assert [text[a:b] for a, b in found] == [f"Fine.{end}"]
        full = [{**m, "content": m.get("content") or ""} for m in messages]
        assert text == written.render_spans(full)[0]


@pytest.mark.parametrize("empty", EMPTY_TURNS)
def test_an_empty_turn_carries_no_loss_in_bytes(empty):
    chat = chat_document([U, empty, U, A])
    [(ids, mask)] = ByteTokenizer().encode_chats([chat])
    assert bytes(ids[mask].astype("u1")) == b"Fine.\xfd"


@pytest.mark.parametrize("empty", EMPTY_TURNS)
def test_a_chat_of_empty_turns_is_empty(empty):
    assert chat_document([U, empty]) == Rejected(reason=EMPTY, detail="no assistant text")
    assert isinstance(chat_document([U, {**empty, "reasoning": "Hm."}]), Document)
