"""A run that was started with relative paths is used from another folder, which has other files of the same
names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from distributed import REPOSITORY, environment
from program.launched import Zygote, metrics, one_message
from program.settings import TINY, write_numbers

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.config.reading.yaml_text import load_yaml
from megatron_hyperrouter.data.tokenize.bpe import train_bpe

pytestmark = pytest.mark.processes
TOOLS = REPOSITORY / "tools"
PATHS = "--data-path text --tokenizer-type HuggingFaceTokenizer --tokenizer-model tok.json --run-dir run"


@pytest.fixture(scope="module")
def home(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run was started, with a folder beside its files that has others of their names."""
    home = tmp_path_factory.mktemp("home")
    for folder, first, words in ((home, 0, "a text of a few words"), (home / "elsewhere", 60, "other words")):
        folder.mkdir(exist_ok=True)
        train_bpe(iter([words] * 9), 270, str(folder / "tok.json"))
        write_numbers(folder / "text", range(first, first + 200), documents=20)
    zygote.run([*TINY, *PATHS.split(), "--train-iters", "2"], cwd=str(home))
    return home


def test_an_evaluation_from_there_is_the_same(zygote: Zygote, home: Path) -> None:
    found = []
    for folder, run in ((home, "run"), (home / "elsewhere", "../run")):
        words = ["--load", run, "--topk", 1, 2, "--output", "evaluation.json"]
        job = zygote.run(words, program=TOOLS / "evaluate.py", cwd=str(folder))
        assert "changed since" not in job.stderr
        found.append(json.loads((folder / "evaluation.json").read_text())["results"])
    assert found[0] == found[1] and [each["topk"] for each in found[0]] == [1, 2]


def test_an_export_from_there_is_the_same(zygote: Zygote, home: Path) -> None:
    for folder, run in ((home, "run"), (home / "elsewhere", "../run")):
        words = ["--load", run, "--output", "exported", "--no-proof"]
        zygote.run(words, program=TOOLS / "export_hf.py", cwd=str(folder))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        here, there = (folder / "exported" / name for folder in (home, home / "elsewhere"))
        assert here.read_bytes() == there.read_bytes(), name
    own = json.loads((home / "tok.json").read_text())["model"]
    assert json.loads((home / "elsewhere/exported/tokenizer.json").read_text())["model"] == own


def test_a_report_from_there(zygote: Zygote, home: Path) -> None:
    job = zygote.run(
        ["../run", "--output", "r.html"], program=TOOLS / "report.py", cwd=str(home / "elsewhere")
    )
    assert (home / "elsewhere" / "r.html").exists() and "Traceback" not in job.stderr


def test_the_settings_say_where_the_run_was_started_and_start_it_again_from_there(
    zygote: Zygote, home: Path
) -> None:
    settings = home / "run/config.yaml"
    assert str(home) in settings.read_text().splitlines()[0]
    assert load_yaml(str(settings))["run_dir"] == "run"
    before = metrics(home / "run")
    zygote.run(["--config", settings], cwd=str(home))
    assert metrics(home / "run") == before


def test_names_beyond_ascii_where_python_does_not_expect_them(tmp_path: Path) -> None:
    """Settings, run folder, checkpoint, report: with ``LC_ALL=C`` and without Python's UTF-8 mode."""
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    (tmp_path / "настройки.yaml").write_text(yaml.safe_dump({"run_dir": "日本-é", "train_iters": 3}))
    train_bpe(iter(["a text of a few words"] * 9), 270, str(tmp_path / "слова.json"))
    model = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "слова.json"]
    for words in (
        ["train", "--mock-data", *model, "--config", "настройки.yaml", *TINY, "--train-iters", "2"],
        ["status", "日本-é"],
        ["report", "日本-é", "--output", "отчёт.html"],
    ):
        command = [sys.executable, "-m", "megatron_hyperrouter", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        shown = "отчёт.html" if words[0] == "report" else "日本-é"
        said = done.stdout + done.stderr
        assert said.isascii() and shown.encode("ascii", "backslashreplace").decode() in said
    assert load_yaml(str(tmp_path / "日本-é/config.yaml"))["run_dir"] == "日本-é"
    assert (find(tmp_path / "日本-é") or Path()).name == "step_0000002"
    assert "日本-é" in (tmp_path / "отчёт.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_continues_from_another_folder(zygote: Zygote, tmp_path: Path, moved: bool) -> None:
    """With the settings that it has left; the loss is that of a run that continues where it was started."""
    for name in ("stays", "goes"):
        (tmp_path / name).mkdir()
        train_bpe(iter(["a text of a few words"] * 9), 270, str(tmp_path / name / "tok.json"))
        write_numbers(tmp_path / name / "text", range(200), documents=20)
        words = [*TINY, *PATHS.split(), "--train-iters", 4, "--exit-interval", 2]
        zygote.run(words, cwd=str(tmp_path / name), expect=6)
    here = tmp_path / "stays"
    zygote.run(["--config", "run/config.yaml", "--load", "run", "--exit-interval", 4], cwd=str(here))
    home = (tmp_path / "goes").rename(tmp_path / "gone") if moved else tmp_path / "goes"
    (home / "elsewhere").mkdir()
    words = [
        "--config",
        "../run/config.yaml",
        "--load",
        "../run",
        "--run-dir",
        "../run",
        "--exit-interval",
        4,
    ]
    job = zygote.run(words, cwd=str(home / "elsewhere"))
    assert f"text does not exist; using {home / 'text'}" in job.stdout.replace("\n", " ")
    assert metrics(home / "run") == metrics(here / "run")
    assert [record["step"] for record in metrics(here / "run") if "split" not in record] == [1, 2, 3, 4]


def test_other_data_that_are_missing_stay_an_error(zygote: Zygote, home: Path) -> None:
    words = ["--config", "../run/config.yaml", "--load", "../run", "--train-iters", 3, "--data-path", "tezt"]
    job = zygote.run([*words, "--run-dir", "new"], cwd=str(home / "elsewhere"), expect=3)
    assert "tezt.idx: no such file" in one_message(job.stderr)
