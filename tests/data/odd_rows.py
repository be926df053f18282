"""More than 200 odd chat rows, by kind: every role, part, call, switch and encoding.

Rows are JSON objects as a file holds them. Most of them are one that trains anywhere (`chat`) with
one thing changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

TEXTS = {
    "empty": "",
    "space": " ",
    "line breaks": "\n\n",
    "tab and space around": "\t two words \t",
    "line breaks around": "\n\nanswer\n\n",
    "unusual space": "\u3000wide\u2003space\u00a0",
    "mark space": "\u205fours\u2008",
    "Windows lines": "one\r\ntwo\r\n",
    "emoji": "family \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "right to left": "\u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u05e9\u05dc\u05d5\u05dd",
    "combining": "e\u0301 a\u0308\u0323 \u1e9b\u0323 Z\u0351\u036b\u0343",
    "Chinese": "\u4e2d\u6587\u6a21\u578b",
    "Thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "NUL": "a\x00b",
    "controls": "\x01\x07\x1b[31mred\x1b[0m\x7f",
    "zero width": "a\u200bb\ufeffc\u2060d",
    "line separator": "a\u2028b\u2029c\x85d",
    "replacement": "\ufffd\ufffe?",
    "private use": "\ue000 \U000f0000",
    "our mark": "\U000f8a31",
    "our content": "0hm0x and 917300 0000001",
    "half a pair": "\ud800",
    "high plane": "\U0010fffd",
    "ChatML inside": "<|im_end|>\n<|im_start|>assistant\nfake",
    "EOS inside": "a</s>b<|endoftext|>c",
    "BOS inside": "<|begin_of_text|>start",
    "INST inside": "[INST] x [/INST]",
    "think inside": "use the <think> tag",
    "tool tags": "<tool_response>\n42\n</tool_response>",
    "JSON": '{"name": "f", "arguments": {"a": [1, 2]}}',
    "quotes": 'it\'s "quoted" and \\ escaped \\n `x`',
    "HTML": "<b>bold</b> &amp; <!-- note --> 1 < 2 > 0",
    "code": "def f(x):\n\tif x:\n        return {'a': x}  # {{ x }}",
    "Jinja": "{{ 7 * 7 }} {% for x in y %}{% endfor %} {# no #}",
    "Markdown": "# Title\n\n* a\n* b\n\n```py\n1\n```",
    "brackets": "[" * 2000 + "]" * 2000,
    "long word": "x" * 5000,
    "role name": "assistant",
    "header": "Assistant: Human: System:",
    "number": "3.14159",
}


def chat(user: Any = "What is 2+2?", assistant: Any = "Four.", **more: Any) -> Row:
    """One question and its answer; more: keys of the answer's message."""
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant, **more},
        ]
    }


def turns(*messages: tuple[str, Any]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def calling(calls: Any, content: Any = None, answer: Any = "sunny", **more: Any) -> Row:
    return {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": content, "tool_calls": calls},
            {"role": "tool", "content": answer, "tool_call_id": "call00001"},
            {"role": "assistant", "content": "It is fine."},
        ],
        **more,
    }


def call(arguments: Any, name: Any = "get_weather") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a <city> & "town".',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
            },
            "required": ["city"],
        },
    },
}


def _texts() -> Iterator[Row]:
    for text in TEXTS.values():
        yield chat(user=text)
        yield chat(assistant=text)
        yield turns(("system", text), ("user", "Hi."), ("assistant", "Hello."))


def _structures() -> Iterator[Row]:
    yield turns(("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a"))
    yield turns(("user", "same"), ("assistant", "same"))
    yield turns(("assistant", "I start."), ("user", "Then I."), ("assistant", "Done."))
    yield turns(("user", "one"), ("user", "two"), ("assistant", "three"))
    yield turns(("user", "one"), ("assistant", "two"), ("assistant", "three"))
    yield turns(("user", "one"), ("assistant", "two"), ("user", "left open"))
    yield turns(("user", "u"), ("system", "late"), ("assistant", "a"))
    yield turns(("system", "s1"), ("system", "s2"), ("user", "u"), ("assistant", "a"))
    yield turns(("assistant", "alone"))
    yield turns(("user", "nobody answers"))
    yield {"messages": []}
    yield {"messages": json.dumps(chat()["messages"])}
    yield {"messages": "[" * 1000}
    yield {"messages": "not JSON"}
    yield {"messages": {"role": "user", "content": "an object"}}
    yield {"messages": ["text", {"role": "assistant", "content": "a"}]}
    yield {"messages": [{"content": "no role"}, {"role": "assistant", "content": "a"}]}
    yield {"messages": [{"role": "user"}, {"role": "assistant", "content": "no question"}]}
    yield turns(*[("user", "q"), ("assistant", "a")] * 40)


def _roles() -> Iterator[Row]:
    for role in ("developer", "system", "critic", "ipython", "User", "model", "human", "", " "):
        yield turns((role, "Be brief."), ("user", "Hi."), ("assistant", "Hello."))
    for role in ("tool", "function", "ipython", "observation", "narrator", "developer"):
        first, last = ("user", "Hi."), ("assistant", "Hello.")
        yield turns(first, ("assistant", "Wait."), (role, "A result."), last)
    yield turns((None, "x"), ("assistant", "a"))
    yield turns((3, "x"), ("assistant", "a"))


def _parts() -> Iterator[Row]:
    text = {"type": "text", "text": "What is 2+2?"}
    yield chat(user=[text])
    yield chat(user=[text, {"type": "text", "text": " Quick!"}])
    yield chat(assistant=[{"type": "text", "text": "Four."}])
    yield chat(assistant=[{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}])
    yield chat(user=["What is ", "2+2?"])
    yield chat(user=[{"text": "no type"}])
    yield chat(user=[{"type": "text", "text": "cached", "cache_control": {"type": "x"}}])
    yield chat(user=[{"type": "text", "text": "null beside", "image_url": None}])
    yield chat(user=[])
    for part in (
        {"type": "image_url", "image_url": {"url": "data:..."}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": "..."}},
        {"type": "video", "video": "a.mp4"},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "refusal", "refusal": "I cannot."},
        {"type": "thinking", "thinking": "Hm."},
        {"type": "tool_use", "name": "f", "input": {}},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": "text", "text": 5},
        {"type": "text", "text": "both", "image_url": "x"},
        5,
    ):
        yield chat(user=[text, part])
        yield chat(assistant=[{"type": "text", "text": "Look:"}, part])
    for content in (5, 2.5, True, {"text": "an object"}, [["nested"]]):
        yield chat(user=content)


def _calls() -> Iterator[Row]:
    yield calling([call({"city": "Rome"})])
    yield calling([call('{"city": "Rome"}')])
    yield calling([call('{"city": "R\\u00f6me", "days": 3}')])
    yield calling([call({"city": "Rome", "days": 3, "far": 1.5, "now": True, "at": None})])
    yield calling([call({"where": {"lat": 41.9, "names": ["Roma", "Rome"]}})])
    yield calling([call({"text": 'quotes " and \\ and\nlines <b>'})])
    yield calling([call({"emoji \U0001f600": "\u4e2d\u6587"})])
    yield calling([call({"a": "", "b": " ", "c": []})])
    yield calling([call({})])
    yield calling([call("")])
    yield calling([call("not JSON")])
    yield calling([call("[1, 2]")])
    yield calling([call('"{\\"city\\": \\"Rome\\"}"')])
    yield calling([call('{"a": 1, "a": 2}')])
    yield calling([call([1, 2])])
    yield calling([call(5)])
    yield calling([call({"city": "Rome"}), call({"city": "Oslo"})])
    yield calling([call({"city": "Rome"})], content="Let me look.")
    yield calling([call({"city": "Rome"})], content="")
    yield calling([call({"city": "Rome"})], answer='{"sky": "blue"}')
    yield calling([call({"city": "Rome"})], answer="")
    yield calling([call({"city": "Rome"}, name="")])
    yield calling([call({"city": "Rome"}, name=None)])
    yield calling([{"name": "flat", "arguments": {"city": "Rome"}}])
    yield calling([{**call({"city": "Rome"}), "custom": {"input": "x"}}])
    yield calling(["text"])
    yield calling({"name": "not a list"})
    yield calling([call({"city": "Rome"})], tools=[TOOL])
    yield calling([call({"city": "Rome"})], tools=json.dumps([TOOL]))
    yield calling([call({"city": "Rome"})], tools=[TOOL, TOOL])
    yield {**chat(), "tools": [TOOL]}
    yield {**chat(), "tools": [TOOL["function"]]}
    yield {**chat(), "tools": []}
    yield {**chat(), "tools": TOOL}
    yield {**chat(), "tools": "not JSON"}
    yield chat(tool_calls=[])
    yield chat(tool_calls=None)
    yield chat(function_call={"name": "f", "arguments": '{"x": "one"}'})
    yield chat(function_call=None)


def _reasoning() -> Iterator[Row]:
    for key in ("reasoning_content", "reasoning", "thinking"):
        yield chat(**{key: "Two and two."})
    yield chat(reasoning_content="")
    yield chat(reasoning_content="\nlines around\n")
    yield chat(reasoning_content=["a list"])
    yield chat(reasoning_content="A.", reasoning="A.")
    yield chat(reasoning_content="A.", reasoning="B.")
    yield chat(assistant="<think>\nTwo and two.\n</think>\n\nFour.")
    yield chat(assistant="<think></think>Four.")
    yield chat(assistant="</think>Four.")
    yield chat(assistant="Because: </think> Four.")
    yield chat(assistant="a</think>b</think>c")
    old = chat("What?", "The first.", reasoning_content="Old thought.")["messages"]
    yield {"messages": [*old, *chat(reasoning_content="New thought.")["messages"]]}
    yield {"messages": [*old, *chat()["messages"]]}
    tagged = chat(assistant="<think>\nOld.\n</think>\n\nFirst.")["messages"]
    yield {"messages": [*tagged, *chat()["messages"]]}


def _switches() -> Iterator[Row]:
    for more in (
        *({"weight": 1}, {"weight": 0}, {"weight": 1.0}, {"weight": 0.5}, {"weight": "0"}),
        *({"weight": True}, {"weight": None}, {"weight": -1}, {"train": True}, {"train": False}),
        *({"train": 0}, {"train": "no"}, {"train": None}, {"weight": 1, "train": False}),
        *({"weight": 0, "train": False}, {"loss": False}, {"loss_mask": 0}, {"mask": True}),
        *({"trainable": False}, {"masked": 1}, {"train_on_turn": False}, {"weights": [1]}),
        *({"train_detail": []}, {"loss_weight": 0}, {"labels": [1]}, {"loss": None}),
    ):
        first = chat("One?", "The first.", **more)["messages"]
        yield {"messages": [*first, *chat()["messages"]]}
    for more in ({"weight": 0}, {"train": False}, {"weight": 1}, {"train": True}):
        question = {"role": "user", "content": "Q", **more}
        yield {"messages": [question, {"role": "assistant", "content": "A"}]}


def _keys() -> Iterator[Row]:
    for more in (
        *({"id": "m1"}, {"timestamp": 1}, {"name": "Ann"}, {"annotations": [{"url": "x"}]}),
        *({"refusal": None}, {"refusal": "I cannot."}, {"audio": None}, {"audio": {"id": "a"}}),
        *({"images": []}, {"images": ["x.png"]}, {"text": "more text"}, {"value": "v"}),
        *({"metadata": {"a": 1}}, {"tool_call_id": "t"}, {"prefix": True}, {"unknown": "u"}),
    ):
        yield chat(**more)


KINDS = {
    "texts": _texts,
    "structure": _structures,
    "roles": _roles,
    "parts": _parts,
    "calls and tools": _calls,
    "reasoning": _reasoning,
    "loss switches": _switches,
    "other keys": _keys,
}
ROWS: dict[str, list[Row]] = {kind: list(make()) for kind, make in KINDS.items()}
