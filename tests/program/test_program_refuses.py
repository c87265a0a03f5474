"""A command that cannot run ends with its exit status and one message with the remedy, and
leaves no files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from distributed import environment
from program.launched import PROGRAM, Zygote, metrics, one_message
from program.settings import flags_of

from megatron_hyperrouter.data.store.token_files import IndexedWriter

pytestmark = pytest.mark.processes
ONE_RANK = "--router.name hyper --moe-router-topk 2".split()
Refused = Callable[..., str]


@pytest.fixture
def refused(zygote: Zygote, text: Path, tmp_path: Path) -> Refused:
    """Starts a run that has to end with ``status``; returns its one message."""

    def start(*flags: object, status: int, ranks: int = 1) -> str:
        job = zygote.run(
            flags_of(text, tmp_path / "run", *flags, layout=ONE_RANK), ranks=ranks, expect=status
        )
        assert not list((tmp_path / "run").glob("checkpoints/*"))
        assert "step 1/" not in job.stdout  # the first facts may stand there, no step
        return one_message(job.stderr)

    return start


class TestSettings:
    """Exit status 2, before anything is made."""

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--num-layer 3", ["--num-layer = 3", "did you mean --num-layers"]),
            (
                "--router.hypernet_with 8",
                ["--router.hypernet-with = 8: unknown flag", "did you mean --router.hypernet-width"],
            ),
            ("--router.name hypr", ["--router.name = hypr", "hyper"]),
            ("--moe-router-topk 5", ["--moe-router-topk = 5", "--num-experts = 4", "use 1 to 4"]),
            ("--global-batch-size 9", ["--global-batch-size = 9", "--micro-batch-size", "use 8 or 10"]),
            ("--hidden-size 30", ["--hidden-size = 30", "--num-attention-heads = 4", "use 28 or 32"]),
            ("--lr fast", ["--lr = fast"]),
            (
                "--zero-stage 3",
                [
                    "--zero-stage = 3: is not supported by DeepSpeed's mixture-of-experts layers",
                    "use --zero-stage 2",
                ],
            ),
            (
                "--expert-model-parallel-size 2",
                ["--expert-model-parallel-size = 2", "data-parallel ranks, 1"],
            ),
            ("--load nowhere --finetune --engine quick", ["--engine = quick", "deepspeed"]),
        ],
    )
    def test_one_problem(self, refused: Refused, tmp_path: Path, flags: str, words: list[str]) -> None:
        message = refused(*flags.split(), status=2)
        assert message.startswith("error: 1 problem in the settings:\n  - ") and all(
            word in message for word in words
        ), message
        assert not (tmp_path / "run").exists()

    def test_all_problems_at_once_on_two_ranks(self, refused: Refused) -> None:
        flags = (
            "--num-experts 3 --expert-model-parallel-size 2 --moe-router-topk 4 --global-batch-size 6 "
            "--num-layer 3 --lr -1"
        )
        message = refused(*flags.split(), status=2, ranks=2)
        assert message.startswith("error: 5 problems in the settings:")
        for words in (
            "--num-experts = 3: must be divisible by --expert-model-parallel-size = 2",
            "--moe-router-topk = 4: must be at most --num-experts = 3",
            "--global-batch-size = 6: must be divisible by --micro-batch-size x data-parallel ranks = 2 x 2",
            "--num-layer = 3",
            "--lr = -1",
        ):
            assert words in message

    def test_a_deepspeed_config_that_contradicts(self, refused: Refused, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text(
            json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 8, "gradient_clipping": 3.0}),
            encoding="utf-8",
        )
        message = refused("--deepspeed-config", path, status=2)
        assert "2 problems" in message and "train_batch_size" not in message
        assert f"zero_optimization.stage in {path} = 2: contradicts the flags, which set it to 1" in message
        assert f"gradient_clipping in {path} = 3.0: contradicts the flags, which set it to 1.0" in message

    def test_folders_that_cannot_be_written(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        message = refused("--run-dir", tmp_path / "file/run", status=2)
        assert f"--run-dir = {tmp_path / 'file/run'}: cannot be written (Not a directory)" in message
        message = refused("--tensorboard-dir", tmp_path / "file", status=2)
        assert "--tensorboard-dir" in message and "cannot be written (it is a file)" in message


class TestData:
    """Exit status 3, with the file."""

    def test_missing_bin(self, refused: Refused, tmp_path: Path) -> None:
        prefix = numbers(tmp_path / "numbers")
        Path(f"{prefix}.bin").unlink()
        message = refused("--data-path", prefix, status=3)
        assert f"{prefix}.bin: no such file" in message and "remedy: " in message

    def test_missing_prefix(self, refused: Refused, tmp_path: Path) -> None:
        assert f"{tmp_path}/nothing.idx: no such file" in refused(
            "--data-path", tmp_path / "nothing", status=3
        )

    def test_truncated_bin(self, refused: Refused, tmp_path: Path) -> None:
        prefix = numbers(tmp_path / "numbers")
        file = Path(f"{prefix}.bin")
        file.write_bytes(file.read_bytes()[:-8])
        message = refused("--data-path", prefix, status=3)
        assert f"{prefix}.bin, byte {file.stat().st_size}" in message and "copy both files again" in message

    def test_foreign_index(self, refused: Refused, tmp_path: Path) -> None:
        prefix = numbers(tmp_path / "numbers")
        Path(f"{prefix}.idx").write_bytes(
            b"PK\x03\x04 something else altogether, and long enough for a header"
        )
        message = refused("--data-path", prefix, status=3)
        assert (
            f"{prefix}.idx, byte 0: expected the magic" in message
            and "give the prefix of an index" in message
        )

    def test_samples_longer_than_the_data(self, refused: Refused, tmp_path: Path) -> None:
        prefix = numbers(tmp_path / "numbers")
        message = refused("--data-path", prefix, "--seq-length", 5000, status=3)
        assert (
            f"{prefix}.bin" in message
            and "one sample needs 5001" in message
            and "a smaller --seq-length" in message
        )

    def test_token_beyond_the_vocabulary(self, refused: Refused, tmp_path: Path) -> None:
        prefix = numbers(tmp_path / "numbers", wrong=300)
        message = refused("--data-path", prefix, status=3)
        assert f"{prefix}.bin, byte " in message and "token id 300 is outside the vocabulary" in message

    def test_other_tokens_than_the_checkpoint_has_read(self, zygote: Zygote, tmp_path: Path) -> None:
        """With the same settings; a copy of the same tokens goes on."""
        prefix, run_dir = numbers(tmp_path / "numbers"), tmp_path / "run"
        flags = flags_of(
            prefix, run_dir, "--load", run_dir, "--eval-iters", 0, "--eod-mask-loss", layout=ONE_RANK
        )
        job = zygote.run([*flags, "--train-iters", "1", "--lr-warmup-iters", "0"])
        assert (
            job.stderr.count(
                f"{prefix}: none of the first documents ends with id 256, but --eod-mask-loss needs"
            )
            == 1
        )
        before = Path(f"{prefix}.bin").read_bytes()
        Path(f"{prefix}.bin").write_bytes(bytes([before[0] ^ 1]) + before[1:])
        job = zygote.run([*flags, "--train-iters", "2"], expect=3)
        message = one_message(job.stderr)
        assert f"has read a different file under this name:\n  - {prefix}: " in message
        assert "remedy: restore the files that the run has read" in message
        assert [line["step"] for line in metrics(run_dir)] == [1]
        Path(f"{prefix}.bin").write_bytes(before)
        zygote.run([*flags, "--train-iters", "2"])
        assert [line["step"] for line in metrics(run_dir)] == [1, 2]


class TestCheckpoint:
    """Exit status 4."""

    def test_nothing_to_load(self, refused: Refused, tmp_path: Path) -> None:
        message = refused("--load", tmp_path / "nowhere", status=4)
        assert f"--load = {tmp_path / 'nowhere'}: the folder has no finished checkpoint" in message


class TestLibraries:
    """Exit status 5, with what to run."""

    def message(self, command: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 5 and done.stdout == "", done.stderr
        return one_message(done.stderr)

    def test_an_interpreter_without_any(self) -> None:
        message = self.message(["-E", "-S", str(PROGRAM), "--help"])
        assert (
            message.startswith("error: the ")
            and "is not installed" in message
            and "bash tools/setup_env.sh" in message
        )

    @pytest.mark.parametrize("library", ["torch", "pydantic", "numpy"])
    def test_one_that_is_missing(self, library: str) -> None:
        program = (
            f"import runpy, sys; sys.modules[{library!r}] = None; runpy.run_path({str(PROGRAM)!r}, "
            "run_name='__main__')"
        )
        assert f"the {library} library is not installed" in self.message(["-c", program])


def numbers(prefix: Path, *, wrong: int | None = None) -> Path:
    """40 documents of 50 random bytes; ``wrong`` replaces every tenth token, so that any sample shows it."""
    dice = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            tokens = dice.integers(0, 256, 50).astype(np.uint16)
            if wrong is not None:
                tokens[::10] = wrong
            writer.add_document(tokens)
    return prefix
