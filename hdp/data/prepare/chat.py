"""The characters of a rendered chat that the assistant wrote, for any chat template.

The loss covers what the model has to generate: the assistant's content, its tool calls, and the
token that ends its turn, but not headers or a line break after the end of turn. Templates differ in
everything else (they trim, move the system prompt, strip old reasoning, append a final token), so
nothing is assumed about their structure. A chat is rendered twice, however long it is:

  1. as it is: the text that is trained on
  2. with marks around everything that the row says (see `marks`), which shows where each value is;
     a chat of which something is missing is refused (see `found`)

A turn starts where the generation prompt ends, which a short example shows once per template, and
ends with the special token after its last value, if that closes a turn rather than opens one.
Templates with {% generation %} mark the turns themselves: in the second rendering, the tags are
replaced by marks, too. If marks change what a template does, each message is marked on its own.

A chat that fails a check raises ChatTemplateError: spans are exact or absent. Invariants, each with
a test of the same name in tests/data/test_chat.py:

* marks_change_nothing     the text is what the template renders, character for character
* spans_cover_the_turns    content and end of turn are inside, headers and other roles outside
* both_methods_agree       a template gives the same spans with and without {% generation %}
* marks_at_once_equal_marks_one_by_one  and so do marks on all messages and on one after the other
* two_renderings           are enough, for a chat of any length
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from hdp.errors import ChatTemplateError

from .found import Found
from .marks import CLOSE, OPEN, TOOLS, Marks, Span
from .messages import (
    CALLS,
    CONTENT,
    Messages,
    normalize,
    with_empty_content,
    with_json_arguments,
    with_parts,
)

Render = Callable[..., str]

_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_OTHER = "\U000f8a33other\U000f8a33"  # a content unlike any other
_MAX_ONE_BY_ONE = 64  # messages; it takes a rendering for each
_MAX_GROWTH, _FREE_GROWTH = 100, 1 << 20  # characters rendered per character, and on top of it


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
        self._has_generation = bool(_GENERATION.search(template))
        self._prompts: dict[str, str | None] = {}

    def render_spans(
        self, messages: Messages, tools: Any = None, *, one_by_one: bool = False
    ) -> tuple[str, list[Span]]:
        """The rendered chat, and each turn with a loss in it as a [start, stop) character range.

        one_by_one: mark one message at a time, which is slow and needs no other message's marks.

        Raises ChatTemplateError if a part of the chat is not in the result or the turns cannot be
        found, and whatever the template raises.
        """
        if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
            raise ChatTemplateError("'tools' is not a list of objects")
        messages, learns = normalize(messages, self._template)
        problem: Exception | None = None
        for form in self._forms(messages):
            try:
                return self._render_spans(form, learns, tools, one_by_one)
            except Exception as error:  # templates may raise anything
                is_ours = isinstance(error, ChatTemplateError)  # which says more than theirs
                if problem is None or (is_ours and not isinstance(problem, ChatTemplateError)):
                    problem = error
        assert problem is not None
        raise problem

    def _forms(self, messages: Messages) -> Iterator[Messages]:
        """`messages`, and in other forms that templates may expect, those that differ."""
        tried: list[Messages] = []
        for with_json in (False, True):
            for is_filled in (False, True):
                form = with_json_arguments(messages) if with_json else messages
                form = with_empty_content(form) if is_filled else form
                form = self._shaped(form)
                if form not in tried:
                    tried.append(form)
                    yield form

    def _render_spans(
        self, messages: Messages, learns: list[bool], tools: Any, one_by_one: bool
    ) -> tuple[str, list[Span]]:
        text = self._text(messages, tools)
        if any(mark in text for mark in (OPEN, CLOSE, _OTHER[0])):
            raise ChatTemplateError("the chat contains characters that are reserved for marks")
        marks = None if one_by_one else self._mark_all(text, messages, tools)
        blocks: list[Span] = []
        if self._has_generation:
            generation = marks.generation if marks else self._generation(text, messages, tools)
            blocks = _blocks(generation)
        parts = [marks] if marks else self._mark_one_by_one(text, messages, tools)
        found = Found(text, messages, parts)
        found.check(self._template)
        if self._has_generation:
            spans = _learned_blocks(blocks, messages, learns, found)
        else:
            turns = [i for i in sorted(found.spans) if learns[i] and i not in found.lost_thoughts]
            spans = [self._turn(text, messages, i, tools, found) for i in turns]
        for (_, stop), (start, _) in pairwise(spans):
            if start < stop:
                raise ChatTemplateError(f"assistant turns overlap at character {start} of the chat")
        return text, spans

    def _text(self, messages: Messages, tools: Any, *, prompt: bool = False, template=None) -> str:
        text = self._render(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            chat_template=template or self._template,
        )
        if len(text) > _FREE_GROWTH and len(text) > _FREE_GROWTH + _MAX_GROWTH * (
            len(repr(messages)) + len(repr(tools)) + len(self._template)
        ):
            raise ChatTemplateError(f"the template renders {len(text):,} characters")
        return text

    # -- marks --

    def _mark_all(self, text: str, messages: Messages, tools: Any) -> Marks | None:
        """Marks on everything at once; None if they change what the template does."""
        everything = text + repr(messages) + repr(tools)
        for is_bare in (False, True):
            marks = Marks(everything, self._template, is_bare=is_bare)
            marked, marked_tools = marks.mark(messages, tools)
            try:
                result = self._text(marked, marked_tools, template=self._marked_template)
            except Exception:
                continue  # a template may reject marks
            if marks.locate(text, result):
                return marks
        return None

    def _mark_one_by_one(self, text: str, messages: Messages, tools: Any) -> list[Marks]:
        if len(messages) > _MAX_ONE_BY_ONE:
            raise ChatTemplateError(
                f"the template treats marks as content, and {len(messages)} messages are too many "
                "to look at one by one"
            )
        everything = text + repr(messages) + repr(tools)
        parts = []
        for only in [*range(len(messages)), *([TOOLS] if tools else [])]:
            for is_bare in (False, True):
                marks = Marks(everything, self._template, is_bare=is_bare)
                marked, marked_tools = marks.mark(messages, tools, only)
                try:
                    result = self._text(marked, marked_tools)
                except Exception as error:
                    raise ChatTemplateError(
                        f"the template rejects replaced content in message {only}: {error}"
                    ) from error
                if marks.locate(text, result):
                    parts.append(marks)
                    break
            else:
                raise ChatTemplateError(
                    f"the template changes the content of message {only}, or depends on it"
                )
        return parts

    @cached_property
    def _marked_template(self) -> str:
        """The template with each generation tag replaced by tags that print a mark.

        Whitespace control is preserved: the first of the three new tags trims to the left like the
        original tag, and the last one to the right.
        """

        def mark(character: str) -> str:
            return r"{%\1 set hdp_mark = 0 -%}{{ '" + character + r"' }}{%- set hdp_mark = 0 \2%}"

        marked = _GENERATION.sub(mark(OPEN), self._template)
        return _END_GENERATION.sub(mark(CLOSE), marked)

    def _generation(self, text: str, messages: Messages, tools: Any) -> list[tuple[str, int]]:
        """(OPEN or CLOSE, position in the text) for the ends of {% generation %} blocks."""
        marks = Marks("", self._template)
        if not marks.locate(text, self._text(messages, tools, template=self._marked_template)):
            raise ChatTemplateError(
                "marking the template's {% generation %} blocks changes its output"
            )
        return marks.generation

    # -- turns of templates without {% generation %} --

    def _turn(self, text: str, messages: Messages, i: int, tools: Any, found: Found) -> Span:
        start, stop = found.spans[i]
        before, after = found.around(i)
        prompt = self._prompt(messages[i - 1]["role"]) if i else None
        if prompt is not None and (place := before.rfind(prompt)) >= 0:
            start += place + len(prompt) - len(before)
        if CALLS in messages[i]:
            stop = self._end_of_calls(text, messages, i, tools, stop, after)
        closer = self._closer.match(text, stop) if self._closer else None
        if closer and closer["token"] not in self._openers:
            return start, closer.end()
        # Plain-text templates end a turn with text, such as an empty line.
        is_ending = not closer and text.startswith(self._ending, stop)
        return start, stop + len(self._ending) * is_ending

    def _end_of_calls(
        self, text: str, messages: Messages, i: int, tools: Any, stop: int, after: str
    ) -> int:
        """Where the template's text around the last tool call of message i ends."""
        closer = self._closer.match(self._ending) if self._closer else None
        if closer and closer["token"] not in self._openers and after.count(closer["token"]) == 1:
            return stop + after.index(closer["token"])
        # The turn ends unlike one without calls: compare with one.
        other: dict[str, Any] = {"role": "assistant", CONTENT: _OTHER}
        [other] = self._shaped([other])
        try:
            replaced = self._text([*messages[:i], other, *messages[i + 1 :]], tools)
        except Exception as error:
            raise ChatTemplateError(
                f"the template does not show where message {i} ends: {error}"
            ) from error
        longest = min(len(text) - stop, len(replaced))
        end = len(text) - min(longest, _common_prefix(text[::-1], replaced[::-1]))
        # Two tokens may end alike, such as <|eom_id|> and <|eot_id|>; they differ as a whole.
        for token in self._special_tokens:
            place = text.find(token, max(stop, end - len(token) + 1), end + len(token) - 1)
            if 0 <= place < end:
                return place
        return end

    def _prompt(self, role: str) -> str | None:
        """What the template prints after a message of `role` for the model to go on from.

        An example tells, and not the chat, as the same turn must not depend on other rows.
        """
        if role not in self._prompts:
            self._prompts[role] = None
            for example in map(self._shaped, (_example(role), _example(role)[-1:])):
                try:
                    prompt = self._text(example, None, prompt=True)
                    has_header = prompt != self._text(example, None)
                except Exception:
                    continue
                _, word, header = prompt.rpartition(_OTHER)
                self._prompts[role] = header if word and has_header else None
                break
        return self._prompts[role]

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows contents only if they are lists of parts."""
        message = [{"role": "user", CONTENT: _OTHER}]
        return _OTHER not in self._try(message) and _OTHER in self._try(with_parts(message))

    @cached_property
    def _ending(self) -> str:
        """What the template prints after the content of an assistant's turn."""
        return self._try(self._shaped(_example("assistant"))).rpartition(_OTHER)[2]

    @cached_property
    def _closer(self) -> re.Pattern[str] | None:
        tokens = sorted(self._special_tokens, key=len, reverse=True)
        return re.compile(rf"\s*(?P<token>{'|'.join(map(re.escape, tokens))})") if tokens else None

    @cached_property
    def _openers(self) -> set[str]:
        """Special tokens that start a turn: those before a lone user turn's content, not after."""
        before, _, after = self._try(self._shaped(_example("user"))).partition(_OTHER)
        return {
            token
            for token in self._special_tokens
            if token in before and token not in after and token != self._eos_token
        }

    def _shaped(self, messages: Messages) -> Messages:
        return with_parts(messages) if self._wants_parts else messages

    def _try(self, messages: Messages) -> str:
        """The rendering of an example; empty if the template rejects it."""
        try:
            return self._text(messages, None)
        except Exception:
            return ""


def _example(role: str) -> Messages:
    """A short chat that ends with a message of `role`, with _OTHER as its content."""
    last = {"role": role, CONTENT: _OTHER}
    user = {"role": "user", CONTENT: "u"}
    if role in ("user", "system", "developer"):
        return [last]
    if role == "assistant":
        return [user, last]
    function = {"name": "f", "arguments": {}}
    call = {"id": "call00000", "type": "function", "function": function}
    caller = {"role": "assistant", CONTENT: "", CALLS: [call]}
    return [user, caller, {**last, "name": "f", "tool_call_id": "call00000"}]


def _blocks(generation: Sequence[tuple[str, int]]) -> list[Span]:
    """The spans of {% generation %} blocks. Raises ChatTemplateError if they are nested."""
    spans: list[Span] = []
    start = None
    for character, position in generation:
        if (character == OPEN) != (start is None):
            raise ChatTemplateError("the template nests {% generation %} blocks")
        if character == CLOSE and start is not None:
            spans.append((start, position))
        start = position if character == OPEN else None
    return spans


def _learned_blocks(
    blocks: list[Span], messages: Messages, learns: list[bool], found: Found
) -> list[Span]:
    """The blocks without those of assistant turns that carry no loss."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (learns[i] and i not in found.lost_thoughts):
            continue
        # An empty turn may have no place of its own: its block touches no other message.
        start, stop = found.spans.get(i) or found.gap(i)
        if i in found.spans:
            blocks = [block for block in blocks if block[1] < start or stop < block[0]]
        else:
            blocks = [block for block in blocks if block[0] < start or stop < block[1]]
    return blocks


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
