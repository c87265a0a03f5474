"""Words of a text, against the standard library's own way to split bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.data.tokenize.encode import count_words

LETTERS = st.sampled_from(
    ["a", "é", "東", "\u00a0", "\u2003", "\0", "\x1f", " ", "\t", "\n", "\r", "\v", "\f", "ab cd"]
)


@given(st.lists(st.text() | st.lists(LETTERS).map("".join), max_size=5))
def test_words_are_what_white_space_separates(texts: list[str]) -> None:
    assert count_words(texts) == sum(len(text.encode().split()) for text in texts)
