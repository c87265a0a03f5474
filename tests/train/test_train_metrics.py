"""Records and ``metrics.jsonl``: names of the public interface, full precision, valid JSON, no step twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter import files
from megatron_hyperrouter.engines.base import EvalResult, StepResult
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.train.metrics import (
    MetricsFile,
    StepFacts,
    evaluation_record,
    tags,
    to_json,
    training_record,
)

REPOSITORY = Path(__file__).parents[2]


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(**more: Any) -> StepFacts:
    layers = {
        "entropy": (1.0, 0.5),
        "load_max_over_mean": (1.5, 2.0),
        "dead_experts": (0.0, 3.0),
        "aux": (1.1, 1.1),
    }
    result = StepResult(2.5, 1.1, 0.3, 0.9, layers, stop=False, peak_memory=7)
    known = {"step": 3, "learning_rate": 0.01, "topk": 2, "tokens": 40, "consumed": (12, 120), "devices": 4}
    return StepFacts(result=result, step_time=0.5, data_time=0.125, **(known | more))


FIELDS = {
    "step": 3,
    "lm_loss": 2.5,
    "aux_loss": 1.1,
    "z_loss": 0.3,
    "grad_norm": 0.9,
    "learning_rate": 0.01,
    "topk": 2,
    "consumed_samples": 12,
    "consumed_tokens": 120,
    "step_time": 0.5,
    "data_time": 0.125,
    "tokens_per_second": 80.0,
    "peak_memory": 7,
    "router/entropy/1": 1.0,
    "router/entropy/2": 0.5,
    "router/load_max_over_mean/1": 1.5,
    "router/load_max_over_mean/2": 2.0,
}


class TestTrainingRecord:
    def test_holds_the_fields_of_the_contract(self) -> None:
        assert training_record(facts(), with_all_layers=False) == FIELDS

    def test_other_layer_metrics_come_when_asked_for(self) -> None:
        dead = {"router/dead_experts/1": 0.0, "router/dead_experts/2": 3.0}
        assert training_record(facts(), with_all_layers=True) == FIELDS | dead

    def test_speed_of_the_model(self) -> None:
        # 6e13 FLOPs in half a second on 4 devices: 30 TFLOP/s each, a quarter of a peak of 120
        record = training_record(facts(flops=6e13), with_all_layers=False)
        assert record["tflops_per_gpu"] == pytest.approx(30.0) and "mfu" not in record
        record = training_record(facts(flops=6e13, peak_flops=120e12), with_all_layers=False)
        assert record["mfu"] == pytest.approx(0.25)

    def test_every_number_has_a_tag_in_a_group(self) -> None:
        record = training_record(facts(flops=6e13, peak_flops=120e12), with_all_layers=True)
        found = tags(record)
        assert {tag.split("/")[0] for tag in found} == {"train", "speed", "router"}
        assert len(found) == len(record) - 1  # all but the step


def test_evaluation_record() -> None:
    # 8 tokens at ln 4 nats each = 16 bits, over 32 bytes
    record = evaluation_record(EvalResult(8 * math.log(4), 8, 32), step=7, split="valid", topk=2)
    assert list(record) == ["step", "split", "topk", "lm_loss", "perplexity", "bits_per_byte"]
    assert record["step"] == 7 and record["split"] == "valid" and record["topk"] == 2
    assert [record["lm_loss"], record["perplexity"], record["bits_per_byte"]] == pytest.approx(
        [math.log(4), 4.0, 0.5]
    )
    assert evaluation_record(EvalResult(1.0, 1, 0), step=1, split="test", topk=1)["bits_per_byte"] is None


@given(st.floats())
def test_floats_come_back_equal_and_others_are_null(value: float) -> None:
    back = json.loads(to_json({"x": value}), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))[
        "x"
    ]
    assert back == value if math.isfinite(value) else back is None


class TestFile:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "run" / "metrics.jsonl"

    def fill(self, path: Path, *, steps: range) -> MetricsFile:
        file = MetricsFile(path)
        for step in steps:
            file.append({"step": step, "lm_loss": 1 / step})
            if step % 2 == 0:
                file.append({"step": step, "split": "valid", "lm_loss": 2 / step})
        return file

    def test_cut_keeps_training_and_evaluation_up_to_the_step(self, path: Path) -> None:
        file = self.fill(path, steps=range(1, 8))
        before = path.read_bytes().splitlines(keepends=True)
        file.cut_after(4)
        assert path.read_bytes().splitlines(keepends=True) == before[:6]  # steps 1 2 2v 3 4 4v, byte for byte
        file.append({"step": 5})
        assert read(path)[-1] == {"step": 5}
        assert path.with_name("metrics-earlier.jsonl").read_bytes().splitlines(keepends=True) == before[6:]

    def test_a_link_to_another_disk_stays_one(self, path: Path, tmp_path: Path) -> None:
        file, target = self.fill(path, steps=range(1, 4)), tmp_path / "elsewhere.jsonl"
        path.rename(target)
        path.symlink_to(target)
        file.cut_after(1)
        assert path.is_symlink() and [record["step"] for record in read(target)] == [1]

    def test_a_link_to_a_device_leaves_the_device(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "write_bytes", lambda *_, **__: pytest.fail("it would replace the device"))
        path.parent.mkdir()
        path.symlink_to(os.devnull)
        file = MetricsFile(path)
        file.cut_after(0)
        file.append({"step": 1})
        file.sync()
        file.close()

    def test_a_new_run_cuts_everything(self, path: Path) -> None:
        self.fill(path, steps=range(1, 4)).cut_after(0)
        assert path.read_bytes() == b""

    @pytest.mark.parametrize(
        "half",
        [
            '{"step": 3, "lm_lo',
            '{"step": 3}',
            "",
            "\x00\x00\n",
            "[3]\n",
            '{"lm_loss": 3}\n',
            '{"step": 1e999}\n',
        ],
    )
    def test_half_a_line_goes(self, path: Path, half: str) -> None:
        self.fill(path, steps=range(1, 3)).close()
        with path.open("a") as file:
            file.write(half)
        again = MetricsFile(path)
        again.cut_after(10)
        again.append({"step": 3})
        assert [record["step"] for record in read(path)] == [1, 2, 2, 3]

    def test_a_killed_writer_leaves_whole_lines(self, path: Path) -> None:
        code = """
            import os, signal, sys
            from pathlib import Path
            from megatron_hyperrouter.train.metrics import MetricsFile
            file = MetricsFile(Path(sys.argv[1]))
            for step in range(1, 4):
                file.append({"step": step})
            os.kill(os.getpid(), signal.SIGKILL)
        """
        killed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(path)], check=False, cwd=REPOSITORY, timeout=60
        )
        assert killed.returncode == -signal.SIGKILL
        assert [record["step"] for record in read(path)] == [1, 2, 3]

    def test_a_full_disk_is_told(self, path: Path) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full on this system")
        path.parent.mkdir()
        path.symlink_to("/dev/full")
        with pytest.raises(HyperRouterError, match=r"metrics\.jsonl cannot be written.*No space left"):
            MetricsFile(path).append({"step": 1})
