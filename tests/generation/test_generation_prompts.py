"""Prompts from stdin are UTF-8, whatever the terminal shows."""

from __future__ import annotations

import io
import sys
from argparse import Namespace

import pytest

from megatron_hyperrouter.commands.models.generate import prompts_of
from megatron_hyperrouter.errors import DataError

FROM_STDIN = Namespace(prompt=None, prompt_file=None)


def test_a_terminal_without_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO("héllo\n\nwörld\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, "ascii", "backslashreplace"))
    assert prompts_of(FROM_STDIN) == ["héllo", "wörld"]


def test_other_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"h\xe9llo\n"), "latin-1"))
    with pytest.raises(DataError, match="stdin cannot be read"):
        prompts_of(FROM_STDIN)
