"""The command-line parser of all tools."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import megatron_hyperrouter
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.flags import PATHS
from megatron_hyperrouter.terminal import parser


def read(*words: str) -> dict[str, object]:
    flags = parser("")
    flags.add_argument("--max-bytes", type=int)
    flags.add_argument("--factor", type=float)
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


@pytest.mark.parametrize(
    "metavar", ["FILE", "FILE.json", "DIR", "P", "RUN_DIR", "RUN_OR_FOLDER", "tokenizer.json"]
)
def test_the_home_folder_in_paths_alone(monkeypatch: pytest.MonkeyPatch, metavar: str) -> None:
    monkeypatch.setenv("HOME", "/elsewhere/me")
    flags = parser("")
    flags.add_argument("--load", metavar=metavar)
    flags.add_argument("--output", metavar=metavar, type=Path)
    flags.add_argument("--prompt", metavar="TEXT")
    flags.add_argument("rest", metavar=metavar, nargs="*")
    args = flags.parse_args(["~/a", "./~", "b~", "--load=~/run", "--output", "~", "--prompt", "~/x"])
    assert args.rest == ["/elsewhere/me/a", "./~", "b~"]
    assert (args.load, args.output, args.prompt) == ("/elsewhere/me/run", Path("/elsewhere/me"), "~/x")
    with pytest.raises(
        ConfigError, match=r"--load = ~nobody-here/run: starts with the home folder of an unknown"
    ):
        flags.parse_args(["--load=~nobody-here/run"])


def test_each_command_reads_the_home_folder_in_its_paths() -> None:
    """A flag for a path has one of the metavars that mark a path: found by the words of its help."""
    for file in Path(megatron_hyperrouter.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
            if name not in ("add_argument", "add"):  # some commands write add = flags.add_argument
                continue
            options = {word.arg: word.value for word in call.keywords}
            about = ast.unparse(options.get("help", ast.Constant(""))).lower()
            metavar = getattr(options.get("metavar"), "value", None)
            takes_value = "action" not in options and "choices" not in options
            if takes_value and re.match(
                r"f?['\"](also write .* to this|folder|\w+ file|file|prefix|run folder)", about
            ):
                assert metavar and PATHS.fullmatch(metavar), (file.name, ast.unparse(call)[:80])


def test_a_description_is_wrapped_and_its_commands_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "42")
    command = "  mhr plan --config FILE.yaml --gpus 1024 --per-node 8"
    text = f"""A sentence that is
longer than a line of the terminal.

{command}
  runs.csv   one row per run, with its
             seed
  table.md   means
The end."""
    assert parser(text).format_help().split("\n\n", 1)[1].partition("\n\noptions:")[0].splitlines() == [
        "A sentence that is longer than a line of",
        "the terminal.",
        "",
        command,
        "  runs.csv   one row per run, with its",
        "             seed",
        "  table.md   means",
        "The end.",
    ]


@pytest.mark.parametrize("word", ["inf", "nan", "-Infinity", "much"])
def test_a_number_is_finite(word: str) -> None:
    assert read("--factor", "1e-3")["factor"] == 1e-3
    with pytest.raises(ConfigError, match=f"--factor = {word}: must be a finite number"):
        read(f"--factor={word}")
