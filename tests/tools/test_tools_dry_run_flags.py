"""``--dry-run`` and ``--world-size`` leave the other words of a command line as they are."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.commands.training.dry_run_flags import asked_for
from megatron_hyperrouter.errors import ConfigError

BEFORE, AFTER = ["--data-path", "0.5", "a", "0.5", "b"], ["--lr=1e-3"]


@pytest.mark.parametrize(
    ("words", "asked", "world_size"),
    [
        (["--dry-run"], True, None),
        (["--dry_run", "--world_size", "8"], True, 8),
        (["--world-size=8", "--dry-run", "true"], True, 8),
        (["--dry-run=false"], False, None),
        ([], False, None),
    ],
)
def test_both_are_taken_out(words: list[str], asked: bool, world_size: int | None) -> None:
    assert asked_for([*BEFORE, *words, *AFTER]) == (asked, world_size, [*BEFORE, *AFTER])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-run", "0"], "--dry-run = 0: takes no value"),
        (["--dry-run=64"], "--dry-run = 64: takes no value"),
        (["--dry-run", "--world-size", "8", "4"], "--world-size = 8 4: takes one value"),
        (["--dry-run", "--world-size"], "--world-size: must be an integer >= 1"),
        (["--dry-run", "--world-size=0"], "--world-size = 0: must be an integer >= 1"),
        (["--dry-run", "--world-size", "-3"], "--world-size = -3: must be an integer >= 1"),
        (["--world-size", "8"], "works only with --dry-run"),
        (["--dry-run=false", "--world-size", "8"], "works only with --dry-run"),
    ],
)
def test_wrong_values(words: list[str], said: str) -> None:
    """A number after --dry-run is not a value of the flag before it."""
    with pytest.raises(ConfigError) as caught:
        asked_for([*BEFORE, *words, *AFTER])
    assert said in str(caught.value)
