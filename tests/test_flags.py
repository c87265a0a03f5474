"""The command-line parser of all tools."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import environment

import megatron_hyperrouter
from megatron_hyperrouter.commands.models.finetune_flags import read_flags as finetune_flags
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.flags import PATHS
from megatron_hyperrouter.paths import unexpanded
from megatron_hyperrouter.routers import ROUTERS
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


@pytest.mark.parametrize("words", [["--load="], ["--load", " "], ["--output", ""], [""]])
def test_an_empty_path_is_not_the_working_folder(words: list[str]) -> None:
    flags = parser("")
    flags.add_argument("--load", metavar="RUN_DIR")
    flags.add_argument("--output", metavar="FILE", type=Path)
    flags.add_argument("rest", metavar="RUN", nargs="*")
    with pytest.raises(ConfigError, match=r" = ' ?': must not be empty\n +remedy: give the name of a file"):
        flags.parse_args(words)


@pytest.mark.parametrize("word", ["", " "])
def test_an_empty_word_that_belongs_to_no_flag(word: str) -> None:
    with pytest.raises(ConfigError, match=f"command line = '{word}': does not belong to a flag"):
        parser("").parse_args([word])


def test_an_empty_text_that_is_no_path() -> None:
    assert read("--own_name", "")["own_name"] == ""


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


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = parser("x")
    flags.add_argument("run", type=Path, metavar="RUN")
    flags.add_argument("--output", type=Path, metavar="DIR")
    name = "x" * 256  # bytes; file systems allow 255
    with pytest.raises(ConfigError, match=rf"--output = {name}: cannot be used"):
        flags.parse_args(["run", "--output", name])
    with pytest.raises(ConfigError, match=rf"RUN = {name}: cannot be used \(File name too long\)"):
        flags.parse_args([name])
    assert flags.parse_args([str(tmp_path / "new")]).run == tmp_path / "new"

    def closed(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("megatron_hyperrouter.paths.os.stat", closed)
    with pytest.raises(ConfigError, match=r"RUN = .*: cannot be used \(Permission denied\)"):
        flags.parse_args([str(tmp_path)])


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/elsewhere/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    monkeypatch.delenv("NO_SUCH", raising=False)


WORDS = [
    ("$SCRATCH/a", "/fast/a"),
    ("${SCRATCH}s/a", "/fasts/a"),
    ("~/a", "/elsewhere/me/a"),
    ("./~", "./~"),
    ("cost$$", "cost$"),
    ("a $ b", "a $ b"),
]


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(("word", "path"), WORDS)
def test_one_rule_for_paths_in_flags_of_tools_flags_of_the_program_and_yaml_files(
    tmp_path: Path, word: str, path: str
) -> None:
    flags = parser("")
    flags.add_argument("--load", metavar="RUN_DIR")
    flags.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    flags.add_argument("--prompt", metavar="TEXT")
    args = flags.parse_args(["--load", word, "--compare", word, "b", "--prompt", word])
    assert (args.load, args.compare, args.prompt) == (path, [Path(path), Path("b")], word)

    file = tmp_path / "run.yaml"
    file.write_text(f"mock_data: true\ndata_cache_path: '{word}'\n")
    config = parse(["--config", str(file), "--run-dir", word], routers=ROUTERS)
    assert (config.logging.run_dir, config.data.data_cache_path) == (path, path)

    (tmp_path / "finetune.yaml").write_text(f"load: r\ntask: '{word}'\noutput: o\n")
    args = finetune_flags(["--config", str(tmp_path / "finetune.yaml")], "")
    assert args.task == Path(path)


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize("path", ["/fast/a", "~/a", "~", "cost$", "$SCRATCH", "$$", "${", "a b"])
def test_a_path_reaches_another_program_of_ours_unchanged(path: str) -> None:
    flags = parser("")
    flags.add_argument("--output", type=Path)
    assert flags.parse_args(["--output", unexpanded(path)]).output == Path(path)


@pytest.mark.usefixtures("places")
def test_the_settings_file_is_a_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    (tmp_path / "run.yaml").write_text("mock_data: true\ntrain_iters: 7\n")
    assert parse(["--config", "$SCRATCH/run.yaml"], routers=ROUTERS).train.train_iters == 7
    (tmp_path / "finetune.yaml").write_text("load: r\ntask: t\noutput: o\nseeds: 7\n")
    assert finetune_flags(["--config", "$SCRATCH/finetune.yaml"], "").seeds == 7


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "$NO_SUCH/p"],
        ["preprocess", "--input", "$NO_SUCH/a", "--output-prefix", "p", "--tokenizer-type", "ByteTokenizer"],
        ["corpus", "--output", "${NO_SUCH}/c.jsonl"],
        ["status", "$NO_SUCH"],
        ["train", "--mock-data", "--run-dir", "$NO_SUCH/r"],
        ["train", "--config", "$NO_SUCH/r.yaml"],
        ["train", "--config", "written.yaml"],
        ["finetune", "--config", "$NO_SUCH/r.yaml"],
    ],
    ids=" ".join,
)
def test_a_variable_that_is_not_set_is_an_error_and_no_folder(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "written.yaml").write_text("mock_data: true\nrun_dir: $NO_SUCH/r\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hyperrouter", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("uses the environment variable NO_SUCH, which is not set") == 1
    assert "remedy: set NO_SUCH, or write $$ for a dollar sign" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["written.yaml"]
