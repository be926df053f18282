"""Found: the messages of a chat in its rendering, and what the rendering left out.

A chat is trained on only if everything that it says is in its rendering: each text, once where the
model has to write it, in the order of the messages (a template may move the system prompt and tool
definitions), with space at its ends trimmed at most, and under a header that tells its role from
others. Reasoning is the exception: many templates that know it leave out that of earlier turns on
purpose. `lost_thoughts` are the turns that it happened to; after the last user message, where no
template means to, it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hdp.errors import ChatTemplateError

from .marks import TOOLS, Marks, Span, Value
from .messages import CONTENT, Messages

_SYSTEM = ("system", "developer")
_TOOL = ("tool", "function", "ipython", "observation")


class Found:
    """Spans of the messages in a rendered chat.

    Attributes:
        spans: message -> the span from its first to its last value, with the space that was kept.
        lost_thoughts: messages whose reasoning the template left out.
    """

    def __init__(self, text: str, messages: Messages, marks: Sequence[Marks]) -> None:
        self._text, self._messages, self._marks = text, messages, marks
        self.spans: dict[int, Span] = {}
        self.lost_thoughts: set[int] = set()
        for value in self._values():
            if not value.found and value.is_thought:
                self.lost_thoughts.add(value.message)
            for span in value.found[:1]:
                self._extend(value.message, span)
        self._changed: set[int] = set()
        for one in marks:
            for content in one.contents:
                values = one.values[content.first : content.stop]
                whole = one.whole(text, content)
                if whole is not None:
                    self._extend(content.message, whole)
                elif not any(value.is_thought for value in values):
                    self._changed.add(content.message)
        self._in_text_order = sorted(self.spans, key=lambda i: (*self.spans[i], i))
        self._place = {message: n for n, message in enumerate(self._in_text_order)}

    def _values(self) -> Iterator[Value]:
        return (value for one in self._marks for value in one.values)

    def _extend(self, message: int, span: Span) -> None:
        if message != TOOLS:
            start, stop = self.spans.get(message, span)
            self.spans[message] = min(start, span[0]), max(stop, span[1])

    def around(self, message: int) -> tuple[str, str]:
        """What the template prints between the message before it, itself, and the one after it."""
        start, stop = self.spans[message]
        order, place = self._in_text_order, self._place[message]
        before = self.spans[order[place - 1]][1] if place else 0
        after = self.spans[order[place + 1]][0] if place + 1 < len(order) else len(self._text)
        return self._text[before:start], self._text[stop:after]

    def gap(self, message: int) -> Span:
        """Where a message without a span can be: between the messages around it that have one."""
        before = [self.spans[i][1] for i in self.spans if i < message]
        after = [self.spans[i][0] for i in self.spans if i > message]
        return max(before, default=0), min(after, default=len(self._text))

    def check(self, template: str) -> None:
        """Raise ChatTemplateError unless everything is found; `template`: its source."""
        self._check_order()
        # Turns that carry a loss come first: what is wrong there matters most.
        needed = (v for v in self._values() if not v.is_thought and not v.is_optional)
        missing = [value for value in needed if not value.found]
        doubled = [value for value in self._values() if value.is_once and len(value.found) > 1]
        for value in sorted(doubled, key=self._is_context):
            raise ChatTemplateError(
                f"the template renders message {value.message} {len(value.found)} times"
            )
        for value in sorted(missing, key=self._is_context):
            raise ChatTemplateError(self._missing(value))
        for message in sorted(self._changed):
            raise ChatTemplateError(f"message {message}: the template changes its content")
        self._check_thoughts(template)
        self._check_roles(template)

    def _is_context(self, value: Value) -> bool:
        i = value.message
        return i == TOOLS or self._messages[i]["role"] != "assistant"

    def _missing(self, value: Value) -> str:
        text = value.text if len(value.text) <= 40 else f"{value.text[:40]}..."
        if value.message == TOOLS:
            return f"{value.what} ({text!r}) is not in the rendered chat"
        role = self._messages[value.message]["role"]
        what = "the content" if value.what == CONTENT else value.what
        return f"message {value.message} ({role}): {what} ({text!r}) is not in the rendered chat"

    def _check_order(self) -> None:
        stop, last = 0, None
        for i, message in enumerate(self._messages):
            if i not in self.spans or message["role"] in _SYSTEM:
                continue
            if last is not None and self.spans[i][0] < stop:
                what = f"message {i} before the end of"
                if message["role"] in _TOOL:
                    what = "the tool's answer inside"
                raise ChatTemplateError(f"the template renders {what} message {last}")
            stop, last = self.spans[i][1], i

    def _check_thoughts(self, template: str) -> None:
        lost = [value for value in self._values() if value.is_thought and not value.found]
        asked = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        for value in lost:
            is_known = value.what == CONTENT or value.what in template
            if value.message > max(asked, default=-1) or not is_known:
                raise ChatTemplateError(
                    f"message {value.message} (assistant): its reasoning is not in the rendered "
                    "chat"
                )

    def _check_roles(self, template: str) -> None:
        headers: dict[str, set[tuple[str, str]]] = {}
        for i in self.spans:
            role = self._messages[i]["role"]
            around = self.around(i)
            headers.setdefault(role, set()).add(around)
            is_known = role in ("user", "assistant") or (role == "system" and not i)
            is_named = re.search(rf"['\"]{re.escape(role)}['\"]", template)
            if not is_known and not is_named and role.lower() not in around[0].lower():
                raise ChatTemplateError(f"message {i}: the template does not know role {role!r}")
        for role, some in headers.items():
            for other, others in headers.items():
                if role < other and _kind(role) != _kind(other) and _share(some, others):
                    raise ChatTemplateError(f"the template renders {role} and {other} the same")


def _kind(role: str) -> str:
    """Roles that are names of one another may look the same."""
    return next((group[0] for group in (_SYSTEM, _TOOL) if role in group), role)


def _share(some: set[tuple[str, str]], others: set[tuple[str, str]]) -> bool:
    """Whether there are two messages with the same text before them, and the same end after.

    What is after a message goes on with the next one's header, so only its start can be compared.
    """
    return any(
        before
        and other_before
        and (before.endswith(other_before) or other_before.endswith(before))
        and (after[:1] == other_after[:1] or not after or not other_after)
        for before, after in some
        for other_before, other_after in others
    )
