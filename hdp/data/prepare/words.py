"""Words: where byte-pair training and encoding split text, and where long text can be cut.

Byte pairs are merged within words, never across them. A word has at most MAX_WORD characters of one
class, so that text without spaces (another script, base64, a line of dashes) costs no more per byte
than prose: both training and merging are quadratic in the length of a word.

The library needs some 170 bytes per byte of a text that it encodes at once. `pieces` cuts a long
text so that its pieces give exactly the ids of the whole. That holds at a position which (1) is a
boundary between words in the whole text, and (2) stays one when the text ends there. A search for
matches from left to right without lookbehind then finds the same words before it and, starting
there, the same words after it. For SPLIT:

* after an ASCII character that is not a space, before a space or tab: no alternative goes on from
  anything else to a space, and those that look ahead match only whitespace
* after "\\n", before an ASCII character that is not a space: only the first alternative may begin
  with the character before a word, and that is no line break; text up to "\\n" is matched by the
  alternatives before those that look ahead
* after a letter, before ASCII that is no letter; after a digit, before ASCII that is no digit:
  words of letters or digits end there, whatever comes
* in a long run of one class that starts a piece: every MAX_WORD letters, punctuation characters or
  spaces, 3 digits, or 2 * MAX_WORD line breaks, except near the end of the run

Text without any such position is not cut. tests/data/test_words.py holds the property.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_WORD = 64
_N = MAX_WORD
# Words with the character before them, up to three digits, and runs of punctuation or whitespace:
# indentation and line ends of code become few tokens.
SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}{{1,{_N}}}|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]{{1,{_N}}}[\r\n]{{0,{_N}}}|\s{{0,{_N}}}[\r\n]{{1,{_N}}}"
    rf"|\s{{1,{_N}}}(?!\S)|\s{{1,{_N}}}"
)
# Letters of every version of Unicode, so that Python and the library agree on them: ASCII,
# Cyrillic, kana, the unified ideographs, Hangul.
_LETTER = "A-Za-z\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_CUTS = (
    r"[!-~](?=[ \t])",
    r"\n(?=[!-~])",
    rf"[{_LETTER}](?=[\x00-@\[-`{{-\x7f])",
    r"[0-9](?=[\x00-/:-\x7f])",
)
_FIRST_CUT = re.compile("|".join(_CUTS))
_LAST_CUT = re.compile(rf"(?s:.*)(?:{'|'.join(_CUTS)})")
_RUNS = (  # (characters of one class, the length of their words)
    (re.compile(rf"[{_LETTER}]+"), MAX_WORD),
    (re.compile(r"[0-9]+"), 3),
    (re.compile(r"[!-/:-@\[-`{-~]+"), MAX_WORD),
    (re.compile(r" +"), MAX_WORD),
    (re.compile(r"\n+"), 2 * MAX_WORD),
)
_NEAR_THE_END = 2 * MAX_WORD + 2


def pieces(text: str, max_characters: int) -> Iterator[str]:
    """`text` in pieces of about max_characters, whose ids together are those of the whole."""
    start = 0
    while len(text) - start > max_characters:
        stop = _cut(text, start, start + max_characters)
        if not start < stop < len(text):
            break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    """The last cut before `end`; without one, the first after it; 0 if there is none."""
    if last := _LAST_CUT.match(text, start, end):
        return last.end()
    for characters, length in _RUNS:
        if run := characters.match(text, start, end):
            cut = (run.end() - start - _NEAR_THE_END) // length * length
            if cut > 0:
                return start + cut
    first = _FIRST_CUT.search(text, end - 1)
    return first.end() if first else 0
