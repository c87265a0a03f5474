"""Real starts with the ``deepspeed`` launcher and plain ``python``, including what hosts and
launchers print.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed import environment, free_port
from program.launched import PROGRAM, metrics, one_message
from program.settings import flags_of

from megatron_hyperrouter.data.store.token_files import IndexedWriter

pytestmark = pytest.mark.processes
Result = subprocess.CompletedProcess[str]


def launch(flags: list[str], folder: Path, *, launcher: bool) -> Result:
    """Run the program to its end in an empty folder."""
    command = [sys.executable, str(PROGRAM), *flags]
    if launcher:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--num_gpus", "2", "--master_port", str(free_port()), str(PROGRAM), *flags]
    env = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    env.pop("PYTHONWARNINGS")  # hosts may say all that they say to a user
    return subprocess.run(
        command, check=False, cwd=folder, env=env, capture_output=True, text=True, timeout=280
    )


def errors_told(result: Result) -> list[str]:
    """Our messages among the launcher's own lines, with the lines that belong to them."""
    lines = (result.stderr + result.stdout).splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("error")]
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    return [
        "\n".join([lines[head], *(line for line in lines[head + 1 : head + 9] if line.startswith("  "))])
        for head in heads
    ]


class TestPlainPython:
    def test_trains_in_silence(self, text: Path, tmp_path: Path) -> None:
        """Nothing on stderr, whatever the hosts have to say; two readers of data on top."""
        small = "--train-iters 2 --num-workers 2 --eval-interval 2 --save-interval 2".split()
        flags = flags_of(text, tmp_path / "run", *small, layout=["--moe-router-topk", "2"])
        result = launch(flags, tmp_path, launcher=False)
        assert result.returncode == 0, result.stderr
        assert "step 2/2" in result.stdout and "saved" in result.stdout
        assert [line for line in result.stderr.splitlines() if "Setting accelerator to CPU" not in line] == []
        assert [record["step"] for record in metrics(tmp_path / "run") if "split" not in record] == [1, 2]

    def test_settings(self, text: Path, tmp_path: Path) -> None:
        flags = flags_of(text, tmp_path / "run", "--moe-router-topk", 9, "--seq-lenght", 4, layout=[])
        result = launch(flags, tmp_path, launcher=False)
        assert result.returncode == 2 and result.stdout == ""
        message = one_message(result.stderr)
        assert "2 problems" in message and "--seq-length" in message and "--moe-router-topk = 9" in message


@pytest.mark.skipif(
    shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None,
    reason="no deepspeed launcher beside this Python",
)
class TestDeepSpeedLauncher:
    def test_settings(self, text: Path, tmp_path: Path) -> None:
        flags = flags_of(text, tmp_path / "run", "--moe-router-topk", 9, "--num-experts", 3)
        result = launch(flags, tmp_path, launcher=True)
        assert result.returncode == 2, result.stderr
        (message,) = errors_told(result)
        assert "2 problems in the settings" in message and not (tmp_path / "run").exists()

    def test_an_error_of_one_rank_alone_in_the_middle_of_a_step(self, tmp_path: Path) -> None:
        """One rank meets a token beyond the vocabulary, the other waits for it in a collective: both end,
        with 3.
        """
        with IndexedWriter(tmp_path / "numbers", np.uint16) as writer:
            for number in range(40):
                tokens = np.arange(50, dtype=np.uint16)
                if number == 17:
                    tokens[25] = 300
                writer.add_document(tokens)
        flags = flags_of(tmp_path / "numbers", tmp_path / "run", "--train-iters", 15, "--split", "1,0,0")
        result = launch(flags, tmp_path, launcher=True)
        assert result.returncode == 3, result.stderr
        (message,) = errors_told(result)
        assert "Warning" not in result.stderr  # of the hosts, at each collective
        assert f"{tmp_path / 'numbers'}.bin, byte {(17 * 50 + 25) * 2}, document 17: token id 300" in message
        steps = [
            json.loads(line)["step"]
            for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert steps and steps == list(range(1, len(steps) + 1)) and len(steps) < 15
