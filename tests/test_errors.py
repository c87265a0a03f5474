"""Errors of libraries in words for a user."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.errors import in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("must be 1"), "ValueError: must be 1"),
        (ValueError(), "ValueError"),
        (RuntimeError("a\n  b\n"), "RuntimeError: a b"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (TypeError("x" * 188), f"TypeError: {'x' * 188}"),
        (TypeError("x" * 190), f"TypeError: {'x' * 186}..."),
    ],
)
def test_type_and_message_on_one_short_line(error: Exception, words: str) -> None:
    assert in_words(error) == words
