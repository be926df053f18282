"""Where each value of a chat is in its rendering, from one more rendering.

Every text that a row holds (contents, reasoning, tool calls with their arguments, tool
definitions) is rendered once more between two marks. If the result without the marks is the plain
rendering, character for character, then a value is exactly what is between its marks; whatever the
template does around it does not matter. Values without marks in the result have been left out.

Marks must not change what a template does, so they have the following form:

* letters and digits only, which no escaping changes; they start with a 0, which sorts first
* inside surrounding whitespace, so that `trim` still works; a rare space outside tells whether it
  did
* between the tags that the template's source names, such as </think>, so that it can still take
  contents apart there
* a number, true, false or null cannot hold marks and is replaced by a number that occurs nowhere
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hdp.errors import ChatTemplateError

from .messages import CALLS, CONTENT, METADATA, REASONING, Messages

Span = tuple[int, int]

# Private-use characters, which do not occur in text: where a {% generation %} block starts, stops.
OPEN, CLOSE = "\U000f8a31", "\U000f8a32"
TOOLS = -1  # the "message" of a tool definition's values
# Whitespace that `strip` removes and hardly any text contains: outside leading, trailing space.
_FRONT, _BACK = "\u205f", "\u2008"
_TAG = re.compile(r"<[^<>\s'\"]{1,40}>|\[/?[A-Z_]{2,}\]")
_THINK_TAG = re.compile(r"(?i)think|reason|thought")
# Words of a JSON schema whose texts must be found; the others are the template's to translate.
_SCHEMA_TEXTS = ("name", "description", "title")


@dataclass(slots=True)
class Value:
    """Something that a row says, and the spans of the rendering where it is found."""

    message: int
    what: str
    text: str
    is_thought: bool = False
    is_optional: bool = False  # whether the template may leave it out
    is_once: bool = False  # whether a second copy would be wrong
    is_key: bool = False
    is_scalar: bool = False
    is_verbatim: bool = False  # whether escaping it would be wrong
    found: list[Span] = field(default_factory=list)


@dataclass(slots=True)
class _Content:
    """One message's content and the values between its tags."""

    message: int
    text: str
    first: int  # index of the first value
    stop: int
    before: str  # from the start of the text without surrounding space to the first value
    after: str


class Marks:
    """The values of a chat, or of one message of it, and what is known about where they are."""

    def __init__(self, everything: str, template: str, *, is_bare: bool = False) -> None:
        """everything: all text that is rendered; is_bare: only texts that are not empty.

        Bare marks leave out empty texts, surrounding space and metadata.
        """
        self.values: list[Value] = []
        self.contents: list[_Content] = []
        self.generation: list[tuple[str, int]] = []
        self._is_bare = is_bare
        self._tags = _tag_pattern(template)
        self._prefix = _unused(everything, (f"0h{n or ''}m" for n in range(1000)))
        self._digits = _unused(everything, (str(917300 + n) for n in range(1000)))
        spaces = [space for space in (_FRONT, _BACK) if space not in everything]
        self._spaces = spaces if len(spaces) == 2 and not is_bare else []
        self._front: set[int] = set()
        self._back: set[int] = set()

    # -- inserting --

    def mark(self, messages: Messages, tools: Any, only: int | None = None) -> tuple[Messages, Any]:
        """A copy with marks; only: the one message (or TOOLS) to mark."""
        marked = [
            self._message(i, message) if only in (None, i) else message
            for i, message in enumerate(messages)
        ]
        if tools and only in (None, TOOLS):
            tools = [self._tool(tool, f"tool {i}") for i, tool in enumerate(tools)]
        return marked, tools

    def _message(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        for key, value in message.items():
            if key == CONTENT:
                is_list = isinstance(value, list)
                text = self._content(i, value[0]["text"] if is_list else value, message)
                marked[key] = [{"type": "text", "text": text}] if is_list else text
            elif key in REASONING:
                if value.strip():
                    marked[key] = self._inside(i, key, value, is_thought=True)
            elif key == CALLS:
                named = [(call, f"tool call {n}") for n, call in enumerate(value)]
                marked[key] = [self._call(i, call, name) for call, name in named]
            elif key in METADATA:  # what a template only compares does not survive marks
                first = len(self.values)
                marked[key] = value if self._is_bare else self._nested(i, f"{key!r}", value)
                for one in self.values[first:]:
                    one.is_optional = True
            elif key not in ("role", "name", "tool_call_id"):
                marked[key] = self._nested(i, f"{key!r}", value)
        return marked

    def _content(self, i: int, content: str, message: dict[str, Any]) -> str:
        is_once = message["role"] == "assistant"
        core = content.strip()
        if not core and self._is_bare:
            return content
        lead, trail = (_lead(content), _trail(content)) if core else (content, "")
        has_tags = self._tags and ("<" in core or "[" in core)
        plain = self._tags.split(core) if self._tags and has_tags else [core]  # text, tag, text
        pieces = list(plain)
        words = [n for n in range(0, len(plain), 2) if plain[n].strip()]
        thoughts = [n for n in range(1, len(plain), 2) if _THINK_TAG.search(plain[n])]
        first, before, after = len(self.values), "", ""
        if words:
            before = "".join(plain[: words[0]]) + _lead(plain[words[0]])
            after = _trail(plain[words[-1]]) + "".join(plain[words[-1] + 1 :])
        else:
            pieces = [self._wrap(i, CONTENT, core, is_once=is_once)]
        for n in words:
            is_thought = is_once and n < max(thoughts, default=0)
            pieces[n] = self._inside(i, CONTENT, plain[n], is_thought=is_thought, is_once=is_once)
        self.contents.append(_Content(i, content, first, len(self.values), before, after))
        front = self._spaces[0] if self._spaces and lead else ""
        back = self._spaces[1] if self._spaces and (trail or front) else ""
        return front + lead + "".join(pieces) + trail + back

    def _inside(self, i: int, what: str, text: str, **flags: Any) -> str:
        """`text` with marks inside its surrounding whitespace."""
        return _lead(text) + self._wrap(i, what, text.strip(), **flags) + _trail(text)

    def _wrap(self, i: int, what: str, text: str, **flags: Any) -> str:
        n = len(self.values)
        self.values.append(Value(i, what, text, **flags))
        return f"{self._prefix}{2 * n}x{text}{self._prefix}{2 * n + 1}x"

    def _call(self, i: int, call: dict[str, Any], what: str) -> dict[str, Any]:
        marked = dict(call)
        if isinstance(call.get("function"), dict):
            return {**marked, "function": self._call(i, call["function"], what)}
        marked["name"] = self._wrap(i, f"the name of {what}", call["name"])
        arguments, name = call.get("arguments"), f"an argument of {what}"
        if isinstance(arguments, str):  # JSON text: quoted once more, it would be a string
            marked["arguments"] = self._wrap(i, name, arguments, is_verbatim=True)
        elif arguments is not None:
            marked["arguments"] = self._nested(i, name, arguments)
        return marked

    def _nested(self, i: int, what: str, value: Any) -> Any:
        """A JSON value with marks on all keys and texts, and numbers in the place of the rest."""
        if isinstance(value, dict):
            return {self._key(i, what, k): self._nested(i, what, v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._nested(i, what, item) for item in value]
        if isinstance(value, str):
            return self._wrap(i, what, value)
        n = len(self.values)
        self.values.append(Value(i, what, json.dumps(value, default=str), is_scalar=True))
        return int(f"{self._digits}{n:07d}")

    def _key(self, i: int, what: str, key: Any) -> str:
        n = len(self.values)
        self.values.append(Value(i, what, str(key), is_key=True))
        return f"{key}{self._prefix}{2 * n + 1}x"

    def _tool(self, value: Any, what: str) -> Any:
        """A tool definition with marks on names, descriptions, parameters and their choices."""
        if isinstance(value, list):
            return [self._tool(item, what) for item in value]
        if not isinstance(value, dict):
            return value
        marked: dict[str, Any] = {}
        names: dict[str, str] = {}
        for key, item in value.items():
            if key in _SCHEMA_TEXTS and isinstance(item, str):
                marked[key] = self._inside(TOOLS, f"the {key} of {what}", item) if item else item
            elif key == "properties" and isinstance(item, dict):
                names = {name: self._key(TOOLS, f"a parameter of {what}", name) for name in item}
                marked[key] = {names[name]: self._tool(v, what) for name, v in item.items()}
            elif key == "enum" and isinstance(item, list):
                texts = (isinstance(v, str) for v in item)
                marked[key] = [
                    self._wrap(TOOLS, f"a choice of {what}", v) if is_text else v
                    for v, is_text in zip(item, texts, strict=True)
                ]
            else:
                marked[key] = self._tool(item, what)
        if isinstance(marked.get("required"), list):
            marked["required"] = [names.get(name, name) for name in marked["required"]]
        return marked

    # -- finding --

    def locate(self, text: str, marked: str) -> bool:
        """Set `found` of all values; False if `marked` without its marks is not `text`."""
        # All that was inserted gets the same prefix, which a search finds fast.
        inserted = {self._digits: "n", OPEN: "(", CLOSE: ")"}
        for character, letter in {
            **inserted,
            **dict(zip(self._spaces, "fb", strict=False)),
        }.items():
            if character in marked:
                marked = marked.replace(character, f"{self._prefix}{letter}")
        pattern = re.compile(
            f"{self._prefix}(?:(?P<mark>[0-9]+)x|n(?P<number>[0-9]{{7}})|(?P<other>[()fb]))"
        )
        hits: dict[int, list[int]] = {}
        position = last = 0
        for match in pattern.finditer(marked):
            literal = marked[last : match.start()]
            if not text.startswith(literal, position):
                return False
            position, last = position + len(literal), match.end()
            if match["mark"]:
                hits.setdefault(int(match["mark"]), []).append(position)
            elif match["number"]:
                value = self.values[int(match["number"])]
                form = next((f for f in _spellings(value) if text.startswith(f, position)), None)
                if form is None:
                    return False
                value.found.append((position, position + len(form)))
                position += len(form)
            elif match["other"] in "()":
                character = OPEN if match["other"] == "(" else CLOSE
                self.generation.append((character, position))
            else:
                (self._front if match["other"] == "f" else self._back).add(position)
        if text[position:] != marked[last:]:
            return False
        for n, value in enumerate(self.values):
            if not value.is_scalar:
                value.found = list(self._found(text, value, hits, n))
        return True

    def _found(self, text: str, value: Value, hits: dict[int, list[int]], n: int) -> Iterator[Span]:
        stops = hits.get(2 * n + 1, [])
        if value.is_key:
            for stop in stops:
                for form in _forms(value.text):
                    if text.endswith(form, 0, stop):
                        yield stop - len(form), stop
                        break
            return
        for start, stop in zip(hits.get(2 * n, []), stops, strict=False):
            forms = (value.text,) if value.is_verbatim else _forms(value.text)
            if start <= stop and text[start:stop] in forms:
                yield start, stop

    def whole(self, text: str, content: _Content) -> Span | None:
        """The span of a content with the space around it that the template kept.

        None if parts of it are missing, or its tags or the space between them have changed.
        """
        values = self.values[content.first : content.stop]
        if not all(value.found for value in values):
            return None
        start, stop = values[0].found[0][0], values[-1].found[0][1]
        core = content.text.strip()
        for encode in _ENCODINGS:
            a, b = start - len(encode(content.before)), stop + len(encode(content.after))
            if a >= 0 and text[a:b] == encode(core):
                break
        else:
            return None
        lead, trail = _lead(content.text), _trail(content.text) if core else ""
        kept_lead = a - len(lead) in self._front if self._spaces else text[:a].endswith(lead)
        kept_trail = b + len(trail) in self._back if self._spaces else text.startswith(trail, b)
        return a - len(lead) * kept_lead, b + len(trail) * kept_trail


# ---- texts and how templates encode them ----


def _html_safe_json(text: str) -> str:
    """As Jinja's own `tojson` filter writes it."""
    escaped = json.dumps(text)[1:-1]
    for character in "<>&'":
        escaped = escaped.replace(character, f"\\u{ord(character):04x}")
    return escaped


_ENCODINGS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: html.escape(text),
    _html_safe_json,
)


def _spellings(value: Value) -> Iterator[str]:
    """A number, true, false or null as JSON and Python write it."""
    yield value.text
    yield {"true": "True", "false": "False", "null": "None"}.get(value.text, value.text)


def _forms(text: str) -> Iterator[str]:
    return (encode(text) for encode in _ENCODINGS)


def _lead(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _trail(text: str) -> str:
    return text[len(text.rstrip()) :]


def _tag_pattern(template: str) -> re.Pattern[str] | None:
    tags = sorted(set(_TAG.findall(template)), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None


def _unused(text: str, candidates: Iterator[str]) -> str:
    found = next((candidate for candidate in candidates if candidate not in text), None)
    if found is None:
        raise ChatTemplateError("the chat contains everything that could mark its values")
    return found
