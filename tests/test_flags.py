"""The command-line parser of all tools."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.terminal import parser


def read(*words: str) -> dict[str, object]:
    flags = parser("")
    flags.add_argument("--max-bytes", type=int)
    flags.add_argument("--own_name")
    flags.add_argument("--texts", nargs="+")
    flags.add_argument("rest", nargs="*")
    return vars(flags.parse_args(words))


def test_underscores_count_as_dashes_in_the_name_alone() -> None:
    assert read("--max_bytes", "5")["max_bytes"] == read("--max_bytes=5")["max_bytes"] == 5
    assert read("--own_name", "a_b")["own_name"] == "a_b"
    assert read("--texts", "max_bytes", "a_b", "--max-bytes", "1")["texts"] == ["max_bytes", "a_b"]
    assert read("--own_name=--max_bytes")["own_name"] == "--max_bytes"
    assert read("--", "--max_bytes")["rest"] == ["--max_bytes"]


def test_a_misspelt_name_is_reported_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"--max_bites: unknown flag\n +remedy: did you mean --max-bytes\?"):
        read("--max_bites", "5")
