"""Words and cuts: bounded training, and pieces that give exactly the ids of the whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.data.prepare.words import MAX_WORD, SPLIT, pieces

library = pytest.importorskip("tokenizers")
split = library.pre_tokenizers.Split(library.Regex(SPLIT), behavior="isolated")

# Characters of every class of the split, and those that classes of Python and of the library differ
# on; long runs cross MAX_WORD.
ALPHABET = list(
    "aZ \t\n\r19-_./\x00\x7f'\u00e9\u0301\u4e00\u3042\u0416\u00a0\u2028\u0660\u00b2\u3002"
)
ALPHABET += ["\U0001f600", "\x85", "\x1c", "\u200b"]
RUN = st.tuples(st.sampled_from(ALPHABET), st.sampled_from([1, 2, 3, 5, 63, 64, 65, 130, 200, 400]))
TEXT = st.lists(st.one_of(RUN, st.tuples(st.sampled_from(ALPHABET), st.just(1))), max_size=30).map(
    lambda runs: "".join(character * count for character, count in runs)
)


def words(text: str) -> list[str]:
    return [word for word, _ in split.pre_tokenize_str(text)]


@given(TEXT, st.sampled_from([4, 17, 64, 200, 500]))
def test_pieces_have_the_words_of_the_whole(text, max_characters):
    parts = list(pieces(text, max_characters))
    assert "".join(parts) == text and (all(parts) or parts == [""])
    assert [word for part in parts for word in words(part)] == words(text)


@pytest.mark.parametrize(
    "text",
    ["word " * 5000, "\u4e00" * 20000, "aGVsbG8x" * 3000, "-" * 20000, " " * 20000, "\n" * 20000,
     "1" * 20000, "a" * 20000, "x = {1: 'y'}\n" * 2000, "\u4e00\u4e8c\uff0c" * 9000],
)  # fmt: skip
def test_long_texts_of_any_kind_are_cut(text):
    parts = list(pieces(text, 1000))
    if "\uff0c" not in text:  # no ASCII after a letter, and no run: not cut, and the same words
        assert max(map(len, parts)) <= 1000 + MAX_WORD
    assert [word for part in parts for word in words(part)] == words(text)


@given(TEXT)
def test_words_are_bounded(text):
    assert all(len(word) <= 2 * MAX_WORD + 1 for word in words(text))
    assert "".join(words(text)) == text


def test_split_of_prose_is_as_before():
    """Words up to MAX_WORD are those of the split without a limit."""
    unlimited = re.sub(rf"\{{([01]),{MAX_WORD}\}}", lambda m: "*" if m[1] == "0" else "+", SPLIT)
    before = library.pre_tokenizers.Split(library.Regex(unlimited), behavior="isolated")
    text = (
        Path(__file__).read_text(encoding="utf-8")
        + "\r\n\r\n  caf\u00e9 \u00a0 12345 \u4e00\u4e8c!\n"
    )
    assert words(text) == [word for word, _ in before.pre_tokenize_str(text)]
