"""The characters of a rendered chat that the assistant wrote, for any chat template.

The loss covers what the model has to generate: the assistant's content, its tool calls, and the
token that ends its turn, but not headers or a line break after the end of turn. Templates differ in
everything else (they trim, move the system prompt, strip old reasoning, append a final token), so
nothing is assumed about their structure. Spans are found in the actual rendering:

* templates with {% generation %} mark the spans themselves: the tags are replaced by marker
  characters, which are then located in the rendered text
* for all others, each assistant turn is rendered two more times. First, the chat before the turn
  with the generation prompt: if that is a prefix of the chat, the turn starts where it ends.
  Second, the chat with the turn's content replaced: where the two renderings differ is the turn's
  body. The special token after it belongs to the turn if it closes a turn rather than opens one.

Each step is checked against the plain rendering, and a chat that fails a check raises
ChatTemplateError: spans are exact or absent. Invariants, each with a test of the same name in
tests/data/test_chat.py:

* marks_change_nothing     the text is what the template renders, character for character
* spans_cover_the_turns    content and end of turn are inside, headers and other roles outside
* both_methods_agree       a template gives the same spans with and without {% generation %}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from hdp.errors import ChatTemplateError

Messages = list[dict[str, Any]]
Span = tuple[int, int]
Render = Callable[..., str]

_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
# Private-use characters, which do not occur in text: a mark where a span opens, a mark where it
# closes, and replacement content whose first and last characters differ from those of any other.
_OPEN, _CLOSE, _OTHER = "\U000f8a31", "\U000f8a32", "\U000f8a33other\U000f8a33"


class ChatTemplate:
    """A chat template and the special tokens that it may use.

    Args:
        render: `render(messages, tools=, add_generation_prompt=, chat_template=) -> str`.
        template: its Jinja source.
        special_tokens: the tokenizer's special tokens, as text.
        eos_token: the special token that always ends a turn or a text, or None.
    """

    def __init__(
        self,
        render: Render,
        template: str,
        *,
        special_tokens: Sequence[str] = (),
        eos_token: str | None = None,
    ) -> None:
        self._render, self._template = render, template
        self._special_tokens, self._eos_token = tuple(filter(None, special_tokens)), eos_token

    def render_spans(self, messages: Messages, tools: Any = None) -> tuple[str, list[Span]]:
        """The rendered chat, and each assistant turn in it as a [start, stop) range of characters.

        Raises ChatTemplateError if the turns cannot be found, and whatever the template raises.
        """
        text = self._text(messages, tools)
        if any(mark in text for mark in (_OPEN, _CLOSE, _OTHER[0])):
            raise ChatTemplateError("the chat contains characters that are reserved for marks")
        if _GENERATION.search(self._template):
            spans = self._marked_spans(text, messages, tools)
        else:
            spans = [
                self._turn_span(text, messages, i, tools)
                for i, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        for (_, stop), (start, _) in pairwise(spans):
            if start < stop:
                raise ChatTemplateError(f"assistant turns overlap at character {start} of the chat")
        return text, spans

    def _text(self, messages: Messages, tools: Any, *, prompt: bool = False, template=None) -> str:
        return self._render(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            chat_template=template or self._template,
        )

    # -- templates with {% generation %} --

    @cached_property
    def _marked_template(self) -> str:
        """The template with each generation tag replaced by tags that print a mark.

        Whitespace control is preserved: the first of the three new tags trims to the left like the
        original tag, and the last one to the right.
        """

        def mark(character: str) -> str:
            return r"{%\1 set hdp_mark = 0 -%}{{ '" + character + r"' }}{%- set hdp_mark = 0 \2%}"

        marked = _GENERATION.sub(mark(_OPEN), self._template)
        return _END_GENERATION.sub(mark(_CLOSE), marked)

    def _marked_spans(self, text: str, messages: Messages, tools: Any) -> list[Span]:
        marked = self._text(messages, tools, template=self._marked_template)
        pieces = re.split(f"([{_OPEN}{_CLOSE}])", marked)
        if "".join(pieces[::2]) != text:
            raise ChatTemplateError(
                "marking the template's {% generation %} blocks changes its output"
            )
        spans: list[Span] = []
        position, start = 0, None
        for piece in pieces:
            if piece == _OPEN and start is None:
                start = position
            elif piece == _CLOSE and start is not None:
                spans.append((start, position))
                start = None
            elif piece in (_OPEN, _CLOSE):
                raise ChatTemplateError("the template nests {% generation %} blocks")
            else:
                position += len(piece)
        return spans

    # -- all others --

    def _turn_span(self, text: str, messages: Messages, i: int, tools: Any) -> Span:
        body_start, body_stop = self._turn_body(text, messages, i, tools)
        start = self._turn_start(text, messages[:i], tools)
        if start is None or start > body_stop:
            start = body_start
        self._check_tools_outside(text, messages, i, body_stop, tools)
        closer = self._closer.match(text, body_stop) if self._closer else None
        if closer and closer["token"] not in self._openers:
            return start, closer.end()
        # Plain-text templates end a turn with text, such as an empty line.
        try:
            until = self._text(messages[: i + 1], tools)
        except Exception:
            return start, body_stop
        is_prefix = len(until) >= body_stop and text.startswith(until)
        return start, len(until) if is_prefix and not closer else body_stop

    def _turn_start(self, text: str, history: Messages, tools: Any) -> int | None:
        """Where the model starts to generate; None if the generation prompt does not show it."""
        if not history:
            return None
        try:
            prompt = self._text(history, tools, prompt=True)
            has_header = prompt != self._text(history, tools)
        except Exception:  # a template may reject an incomplete chat
            return None
        return len(prompt) if has_header and text.startswith(prompt) else None

    def _turn_body(self, text: str, messages: Messages, i: int, tools: Any) -> Span:
        """The part of the text that depends on the content of message i."""
        is_list = isinstance(messages[i].get("content"), list)
        content = [{"type": "text", "text": _OTHER}] if is_list else _OTHER
        other = {"role": messages[i]["role"], "content": content}
        try:
            replaced = self._text([*messages[:i], other, *messages[i + 1 :]], tools)
        except Exception as error:
            raise ChatTemplateError(
                f"the template rejects replaced content in message {i}: {error}"
            ) from error
        if replaced.count(_OTHER) != 1:
            raise ChatTemplateError(
                f"the template renders message {i} {replaced.count(_OTHER)} times"
            )
        start = _common_prefix(text, replaced)
        longest = min(len(text), len(replaced)) - start
        return start, len(text) - min(longest, _common_prefix(text[::-1], replaced[::-1]))

    def _check_tools_outside(
        self, text: str, messages: Messages, i: int, stop: int, tools: Any
    ) -> None:
        """Check that the template does not render a tool's answer inside the calling turn."""
        count = 0
        while messages[i + 1 + count : i + 2 + count] and messages[i + 1 + count]["role"] == "tool":
            count += 1
        if not count:
            return
        answers = [{**m, "content": _OTHER} for m in messages[i + 1 : i + 1 + count]]
        try:
            replaced = self._text([*messages[: i + 1], *answers, *messages[i + 1 + count :]], tools)
        except Exception as error:
            raise ChatTemplateError(
                f"the template rejects a replaced tool answer: {error}"
            ) from error
        if _common_prefix(text, replaced) < stop:
            raise ChatTemplateError(f"the template renders the tool's answer inside message {i}")

    @cached_property
    def _closer(self) -> re.Pattern[str] | None:
        tokens = sorted(self._special_tokens, key=len, reverse=True)
        return re.compile(rf"\s*(?P<token>{'|'.join(map(re.escape, tokens))})") if tokens else None

    @cached_property
    def _openers(self) -> set[str]:
        """Special tokens that start a turn: those before a lone user turn's content, not after."""
        try:
            before, _, after = self._text([{"role": "user", "content": _OTHER}], None).partition(
                _OTHER
            )
        except Exception:
            return set()
        return {
            token
            for token in self._special_tokens
            if token in before and token not in after and token != self._eos_token
        }


def spans2mask(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """(num_tokens,) bool: tokens with a character in one of the spans.

    Args:
        offsets: (num_tokens, 2) integers, each token's [start, stop) range of characters.
        spans: sorted, disjoint [start, stop) ranges of characters.
    """
    offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    bounds = np.array([span for span in spans if span[0] < span[1]], dtype=np.int64).reshape(-1, 2)
    if not len(bounds):
        return np.zeros(len(offsets), dtype=bool)
    # The first span that stops after the token's start; does it start before the token's stop?
    first = np.searchsorted(bounds[:, 1], offsets[:, 0], side="right")
    starts = bounds[np.minimum(first, len(bounds) - 1), 0]
    return (first < len(bounds)) & (starts < offsets[:, 1])


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix. Bisects, because comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
