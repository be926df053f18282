"""Spans of assistant turns compared with an oracle per template, and token masks from spans."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.prepare.chat import ChatTemplate, spans2mask
from hdp.errors import ChatTemplateError
from tests.data.chat_templates import CHATML, KINDS, Kind, expected

jinja2 = pytest.importorskip("jinja2")
pytest.importorskip("jinja2.ext")
pytest.importorskip("jinja2.sandbox")


def make_render(template: str, kind: Kind):
    """A renderer with the same settings as transformers, without importing it."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    compile_once = functools.cache(environment.from_string)
    bos = next((s for s in ("<s>", "<|begin_of_text|>") if s in kind.special), "")

    def render(
        messages: Any, *, tools: Any = None, add_generation_prompt: bool, chat_template: str
    ) -> str:
        return compile_once(chat_template).render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=kind.eos,
        )

    return render


@functools.cache
def make_template(name: str, template: str | None = None) -> ChatTemplate:
    kind = KINDS[name]
    template = template or kind.template
    return ChatTemplate(
        make_render(template, kind), template, special_tokens=kind.special, eos_token=kind.eos
    )


MARKED = CHATML.replace(
    "{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}",
    "{{- '<|im_start|>' + m['role'] + '\\n' -}}{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- m['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}",
)


# Contents that look like template output, or have whitespace where templates trim.
LOOKALIKES = ["", " ", "\n", " a ", "\n\nb\n\n", "assistant", "\u00e9\U0001f600", "a" * 50]
LOOKALIKES += ["<|im_end|>", "</s>", "### user:\n", "<think>x</think>y", "<|im_start|>assistant\n"]
# Exclude the categories Cs (lone surrogates are not text) and Co (private use, for the marks).
any_text = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12)
contents = st.one_of(any_text, st.sampled_from(LOOKALIKES))


@st.composite
def chats(draw: Any) -> list[dict]:
    messages = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(contents)})
        messages.append({"role": "assistant", "content": draw(contents)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(contents)})
    return messages


def has_any(messages: list[dict], *parts: str) -> bool:
    return any(part in m["content"] for m in messages for part in parts)


@pytest.mark.parametrize("name", KINDS)
@given(messages=chats())
def test_spans_cover_the_turns(name, messages):
    """Content and end of turn are inside, headers and other roles outside, as in the oracle."""
    if name == "think" and has_any(messages, "think>"):
        messages = [m if "think>" not in m["content"] else {**m, "content": "z"} for m in messages]
    kind = KINDS[name]
    text, spans = make_template(name).render_spans(messages)
    expected_text, expected_spans = expected(kind, messages)
    assert text == expected_text, "the test's oracle is wrong"
    assert [text[a:b] for a, b in spans] == [text[a:b] for a, b in expected_spans]
    assert spans == expected_spans


@pytest.mark.parametrize("name", KINDS)
@given(messages=chats())
def test_marks_at_once_equal_marks_one_by_one(name, messages):
    """The fast way and the slow one, which shares none of the other messages' marks."""
    chat = make_template(name)
    assert chat.render_spans(messages, one_by_one=True) == chat.render_spans(messages)


class Counter:
    """A renderer that counts what it renders."""

    def __init__(self, render: Any) -> None:
        self.render, self.num_calls, self.num_characters = render, 0, 0

    def __call__(self, messages: Any, **options: Any) -> str:
        text = self.render(messages, **options)
        self.num_calls, self.num_characters = self.num_calls + 1, self.num_characters + len(text)
        return text


@pytest.mark.parametrize("name", [*KINDS, "tools", "generation"])
@pytest.mark.parametrize("num_turns", [8, 1024])
def test_two_renderings(name, num_turns):
    """A chat of 1,024 turns takes two renderings and a few of short examples."""
    kind = KINDS.get(name, KINDS["chatml"])
    template = {"tools": TOOLS, "generation": MARKED}.get(name, kind.template)
    render = Counter(make_render(template, kind))
    chat = ChatTemplate(render, template, special_tokens=kind.special, eos_token=kind.eos)
    messages = []
    for n in range(num_turns // 2):
        messages.append({"role": "user", "content": f"Question {n}: " + "why is it so? " * 4})
        call = {"tool_calls": [{"name": f"f{n}", "arguments": {}}]} if name == "tools" else {}
        messages.append({"role": "assistant", "content": f"{n}. " + "It is so. " * 8, **call})
    text, spans = chat.render_spans(messages)
    assert len(spans) == num_turns // 2
    assert render.num_calls <= 2 + 8  # the examples show prompts and ends of turns
    assert render.num_characters < 3 * len(text) + 2000


@given(messages=chats())
def test_both_methods_agree(messages):
    """A template gives the same spans with and without {% generation %}."""
    assert MARKED != CHATML
    plain = make_template("chatml").render_spans(messages)
    assert make_template("chatml", MARKED).render_spans(messages) == plain


SPACED = """
  {% for m in messages %}
    <{{ m['role'] }}>
    {%L generation %}
      {{ m['content'] }}
    {% endgeneration R%}
  {% endfor %}
"""


@pytest.mark.parametrize("left", ["", "-", "+"])
@pytest.mark.parametrize("right", ["", "-", "+"])
def test_marks_change_nothing(left, right):
    """Marks preserve the whitespace control of the tags."""
    template = SPACED.replace("L", left).replace("R", right)
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    chat = make_template("chatml", template)
    text, spans = chat.render_spans(messages)
    plain = re.sub(r"(end)?generation", "if true", template, count=1)
    plain = re.sub(r"endgeneration", "endif", plain)
    compiled = make_render(plain, KINDS["chatml"])
    assert text == compiled(messages, add_generation_prompt=False, chat_template=plain)
    assert [text[a:b].strip() for a, b in spans] == ["u", "a"]


def test_generation_inside_a_macro():
    """Marks survive passing text through a macro."""
    template = (
        "{% macro turn(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ turn(m) }}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "abc"}]
    assert make_template("chatml", template).render_spans(messages) == ("u[abc]", [(2, 5)])


def test_filtered_generation_blocks_are_rejected():
    """A filter over the marked text sees the marks; the check against the plain text detects it."""
    template = (
        "{% set t %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}"
        "{{ t | trim }}"
    )
    with pytest.raises(ChatTemplateError, match="blocks changes its output"):
        make_template("chatml", template).render_spans([{"role": "assistant", "content": "x"}])


def test_chat_that_starts_with_the_assistant():
    text, spans = make_template("chatml").render_spans(
        [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "x"}]
    )
    assert [text[a:b] for a, b in spans] == ["hi<|im_end|>"]


def test_consecutive_assistant_turns():
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "same"}]
    text, spans = make_template("chatml").render_spans([*messages, messages[1]])
    assert [text[a:b] for a, b in spans] == ["same<|im_end|>"] * 2


def test_content_in_parts():
    template = CHATML.replace("m['content']", "m['content'][0]['text']")
    part = [{"type": "text", "text": "hello"}]
    messages = [{"role": "user", "content": part}, {"role": "assistant", "content": part}]
    text, spans = make_template("chatml", template).render_spans(messages)
    assert [text[a:b] for a, b in spans] == ["hello<|im_end|>"]


TOOLS = CHATML.replace(
    "m['content'] + '<|im_end|>\\n' -}}",
    "m['content'] -}}{%- for c in m.tool_calls or [] -%}{{- '<call>' + c.name + '</call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}",
)
TOOL_CHAT = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "let me see", "tool_calls": [{"name": "f"}, {"name": "g"}]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "it is 42"},
]


def test_tool_calls_are_inside_and_answers_outside():
    text, spans = make_template("chatml", TOOLS).render_spans(TOOL_CHAT)
    calls = "let me see<call>f</call><call>g</call><|im_end|>"
    assert [text[a:b] for a, b in spans] == [calls, "it is 42<|im_end|>"]


def test_tool_answer_inside_the_turn_is_rejected():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
        "{{ '(' + messages[loop.index].content + ')' }}{% endif %}{{ m.content }}<|im_end|>"
        "{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match="tool's answer"):
        make_template("chatml", template).render_spans(TOOL_CHAT)


def test_templates_without_exact_spans_are_rejected():
    one = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    twice = "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="renders message 1 2 times"):
        make_template("chatml", twice).render_spans(one)
    picky = "{{ raise_exception('no') if messages[1].content != 'a' else 'a' }}"
    with pytest.raises(ChatTemplateError, match="rejects replaced content in message 1"):
        make_template("chatml", picky).render_spans(one)
    with pytest.raises(ChatTemplateError, match="reserved"):
        make_template("chatml").render_spans([{"role": "assistant", "content": "\U000f8a31"}])
    nested = "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}"
    with pytest.raises(ChatTemplateError, match="nests"):
        make_template("chatml", nested).render_spans(one)


@given(
    st.lists(st.integers(0, 4), max_size=30),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6),
)
def test_mask_has_the_tokens_with_a_character_in_a_span(token_sizes, gaps_and_sizes):
    stops = np.cumsum(token_sizes, dtype=int)
    offsets = np.stack([stops - token_sizes, stops], axis=1).reshape(-1, 2)
    spans, position = [], 0
    for gap, size in gaps_and_sizes:
        spans.append((position + gap, position + gap + size))
        position += gap + size
    inside = {c for start, stop in spans for c in range(start, stop)}
    for (start, stop), in_mask in zip(offsets, spans2mask(offsets, spans), strict=True):
        if start < stop:
            assert in_mask == any(c in inside for c in range(start, stop))
        else:  # a token without characters is in the mask only inside a span
            assert not in_mask or (start in inside and start - 1 in inside)


def test_mask_of_a_character_split_into_tokens():
    """The byte-level tokens of one character all have that character's offsets."""
    offsets = np.array([[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]])
    assert spans2mask(offsets, [(1, 2)]).tolist() == [False, True, True, True, False]
    assert spans2mask(np.zeros((0, 2)), [(0, 1)]).shape == (0,)
