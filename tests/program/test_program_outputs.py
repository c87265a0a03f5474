"""What a run leaves behind: settings that start it again, metrics, checkpoints that tools and other layouts
read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from distributed import REPOSITORY
from program.launched import Record, Zygote, metrics, one_message
from program.settings import BATCH, EXPERTS, LAYERS, RANKS, SEQ, flags_of, write_text
from safetensors.torch import load_file

from megatron_hyperrouter.checkpoint.folder import find, read_manifest
from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

pytestmark = pytest.mark.processes
ON_LOGGED_STEPS = ("dead_experts", "logit_std", "mutual_information")  # of these runs, every step
ONE_RANK = ["--expert-model-parallel-size", 1]


@pytest.fixture(scope="module")
def lines(whole: Path) -> list[Record]:
    return metrics(whole, times=True)


@pytest.fixture(scope="module")
def steps(lines: list[Record]) -> list[Record]:
    return [line for line in lines if "split" not in line]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = find(run_dir)
    assert folder is not None
    return read_tensors(folder, weight_names(folder))


class TestMetrics:
    @staticmethod
    def flops(run_dir: Path, topk: int) -> float:
        """Of a token, forward and backward: 6 for each parameter that it meets, by the tensors on disk, and
        12 for each channel of attention and position before it.
        """
        found = 6.0 * 2 * LAYERS * 32 * (SEQ + 1) / 2 * 1.0
        for name, tensor in weights_of(run_dir).items():
            if ".mlp.router." in name and not name.endswith("embedding_S"):
                continue  # the frozen hypernetwork
            share = topk / EXPERTS if ".experts." in name else 1.0
            found += 6.0 * tensor.numel() * share
        return found

    def test_fields_of_a_step(self, whole: Path, steps: list[Record]) -> None:
        # 1 + 2 t / 12 after t steps, rounded with halves to even.
        assert [record["topk"] for record in steps] == [1] * 4 + [2] * 5 + [3] * 3
        per_layer = {
            f"router/{name}/{layer}"
            for name in ("entropy", "load_max_over_mean", *ON_LOGGED_STEPS)
            for layer in range(1, LAYERS + 1)
        }
        named = {
            "step",
            "lm_loss",
            "aux_loss",
            "grad_norm",
            "learning_rate",
            "topk",
            "consumed_samples",
            "consumed_tokens",
        }
        for step, record in enumerate(steps, start=1):
            assert record.keys() - {"z_loss"} == named | per_layer | {
                "step_time",
                "data_time",
                "tokens_per_second",
                "tflops_per_gpu",
                "peak_memory",
            }
            assert record["step"] == step
            assert (
                record["consumed_samples"] == step * BATCH and record["consumed_tokens"] == step * BATCH * SEQ
            )
            assert 0 < record["data_time"] < record["step_time"]
            assert record["tokens_per_second"] == pytest.approx(BATCH * SEQ / record["step_time"])
            for layer in range(1, LAYERS + 1):
                assert 0 < record[f"router/entropy/{layer}"] <= math.log(EXPERTS) + 1e-6
                assert 1 <= record[f"router/load_max_over_mean/{layer}"] <= EXPERTS / record["topk"]
                assert 0 <= record[f"router/dead_experts/{layer}"] <= EXPERTS - record["topk"]
                assert record[f"router/logit_std/{layer}"] > 0
                information = record[f"router/mutual_information/{layer}"]
                assert -1e-6 <= information <= math.log(EXPERTS) - record[f"router/entropy/{layer}"] + 1e-6
            assert record["tflops_per_gpu"] * 1e12 * RANKS == pytest.approx(
                self.flops(whole, record["topk"]) * BATCH * SEQ / record["step_time"]
            )
            assert 2**25 < record["peak_memory"] < 2**36
            assert record["grad_norm"] > 0 and 0.9 < record["aux_loss"] < EXPERTS

    def test_the_model_learns_from_near_a_uniform_guess(self, steps: list[Record]) -> None:
        # 257 ids, padded to a multiple of 8
        assert steps[0]["lm_loss"] == pytest.approx(math.log(264), rel=0.05)
        assert steps[-1]["lm_loss"] < steps[0]["lm_loss"] - 1

    def test_evaluations(self, lines: list[Record]) -> None:
        evaluations = [line for line in lines if "split" in line]
        assert [(line["step"], line["split"], line["topk"]) for line in evaluations] == [
            (6, "valid", 2),
            (12, "valid", 3),
            (12, "test", 3),
        ]
        for line in evaluations:
            assert line.keys() == {"step", "split", "topk", "lm_loss", "perplexity", "bits_per_byte"}
            assert line["perplexity"] == pytest.approx(math.exp(line["lm_loss"]))
            # A byte is a token, but the end of a document is no byte.
            assert 1 <= line["bits_per_byte"] / (line["lm_loss"] / math.log(2)) < 1.05

    def test_floats_are_whole(self, whole: Path) -> None:
        text = (whole / "metrics.jsonl").read_text(encoding="utf-8")
        assert all(json.dumps(json.loads(line)) == line for line in text.splitlines())
        assert max(len(str(line["lm_loss"])) for line in map(json.loads, text.splitlines())) >= 15


class TestSettings:
    def test_start_the_same_run_again(self, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
        zygote.run(["--config", whole / "config.yaml", "--run-dir", tmp_path / "again"], ranks=RANKS)
        assert metrics(tmp_path / "again") == metrics(whole)
        first, second = (
            yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            for run in (whole, tmp_path / "again")
        )
        assert second == first | {"run_dir": str(tmp_path / "again")}

    def test_hold_the_schedule_of_data(self, zygote: Zygote, text: Path, tmp_path: Path) -> None:
        """Which needs no --data-path: its first mix is that of validation, too.  Then the run starts again
        from its folder alone.
        """
        other, schedule = write_text(tmp_path / "other", 30), tmp_path / "mixes.yaml"
        schedule.write_text(
            f"- {{from_step: 0, data_path: [{text}]}}\n- {{from_step: 2, data_path: [0.5, {text}, 0.5, "
            f"{other}]}}\n"
        )
        short = [*ONE_RANK, "--train-iters", 4, "--topk-schedule-steps", 4, "--data-schedule", schedule]
        zygote.run(flags_of(text, tmp_path / "both", *short))
        alone = flags_of(text, tmp_path / "alone", *short)
        place = alone.index("--data-path")
        zygote.run([*alone[:place], *alone[place + 2 :]])
        schedule.unlink()
        zygote.run(["--config", tmp_path / "alone/config.yaml", "--run-dir", tmp_path / "again"])
        told = metrics(tmp_path / "alone")
        assert {record.get("split") for record in told} == {None, "valid", "test"}
        assert told == metrics(tmp_path / "both") == metrics(tmp_path / "again")
        ledger = read_manifest(tmp_path / "again/checkpoints/step_0000004")["meta"]["data"]
        assert [(part["from_step"], part["mix"]) for part in ledger] == [
            (0, [str(text)]),
            (2, ["0.5", str(text), "0.5", str(other)]),
        ]


class TestCheckpoints:
    def test_latest_names_the_last_of_whole_folders(self, whole: Path) -> None:
        root = whole / "checkpoints"
        assert sorted(path.name for path in root.iterdir()) == [
            "latest",
            "proved",
            *(f"step_{step:07d}" for step in (3, 6, 9, 12)),
        ]
        assert (root / "latest").read_text(encoding="utf-8").strip() == "step_0000012"
        assert read_manifest(root / "step_0000006")["step"] == 6

    def test_hold_each_weight_once_and_of_the_hypernetwork_no_more_than_seed_and_hash(
        self, whole: Path
    ) -> None:
        folder = whole / "checkpoints/step_0000012"
        found = weights_of(whole)
        router = {name: tensor for name, tensor in found.items() if ".mlp.router." in name}
        prefixes = [f"decoder.layers.{layer}.mlp.router." for layer in range(LAYERS)]
        assert {name: (tensor.dtype, tensor.numel()) for name, tensor in router.items()} == {
            f"{prefix}{name}": described
            for prefix in prefixes
            for name, described in (
                ("embedding_S", (torch.float32, 32)),
                ("frozen_seed", (torch.int64, 1)),
                ("frozen_hash", (torch.uint8, 32)),
            )
        }
        experts = [
            f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}."
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        ]
        names = [prefix + part for prefix in experts for part in ("linear_fc1.weight", "linear_fc2.weight")]
        assert {name for name in found if ".experts." in name} == set(names)
        numbers = sum(tensor.numel() for tensor in found.values())
        on_disk = sum(path.stat().st_size for path in folder.glob("weights-*"))
        # nothing twice, no float32 hypernetwork of 32 * 256 + 256 * 4 * 32 numbers a layer
        assert on_disk < 4 * numbers + 20_000

    def test_optimizer_keeps_state_of_trained_numbers_alone(self, whole: Path) -> None:
        trained = sum(tensor.numel() for tensor in weights_of(whole).values() if tensor.is_floating_point())
        moments = {"exp_avg": 0, "exp_avg_sq": 0, "master": 0}
        for path in (whole / "checkpoints/step_0000012").glob("optimizer-*.safetensors"):
            for name, tensor in load_file(path).items():
                moments[name.rsplit("#", 1)[1]] += tensor.numel()
        # The master weights of a float32 run are the weights themselves.
        assert moments == {"exp_avg": trained, "exp_avg_sq": trained, "master": 0}

    def test_another_layout_reads_the_same_weights(
        self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path
    ) -> None:
        """Two ranks -> one -> two; a step with a learning rate of 0 leaves weights as they are."""
        still = [
            "--finetune",
            "--train-iters",
            1,
            "--lr",
            0,
            "--lr-warmup-iters",
            0,
            "--eval-iters",
            0,
            "--topk-schedule-steps",
            1,
        ]
        zygote.run(flags_of(text, tmp_path / "one", "--load", whole, *still, *ONE_RANK))
        zygote.run(flags_of(text, tmp_path / "two", "--load", tmp_path / "one", *still), ranks=RANKS)
        there = weights_of(whole)
        for run_dir in (tmp_path / "one", tmp_path / "two"):
            here = weights_of(run_dir)
            assert here.keys() == there.keys()
            for name, tensor in here.items():
                assert torch.equal(tensor, there[name]), name
            assert metrics(run_dir)[0]["step"] == 1

    def test_refused_where_the_settings_are_others(
        self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path
    ) -> None:
        """Exit status 4, one message with what to do."""

        def refused(*flags: object, ranks: int = RANKS) -> str:
            return one_message(
                zygote.run(
                    flags_of(text, tmp_path / "run", "--load", whole, *flags), ranks=ranks, expect=4
                ).stderr
            )

        sizes = refused("--hidden-size", 64, "--num-experts", 8)
        assert (
            "--hidden-size was 32 in the checkpoint and is now 64" in sizes
            and "--num-experts was 4" in sizes
            and "settings.yaml" in sizes
        )
        seed = refused("--router.seed", 77)
        assert "--router.seed was none and is now 77" in seed and "--override" in seed
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoints/*"))

    def test_another_layout_continues_and_says_what_cannot_move(
        self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path
    ) -> None:
        """Two ranks of DeepSpeed -> one of Megatron; the dropout of this run is drawn by place."""
        flags = flags_of(text, tmp_path / "run", "--load", whole, "--engine", "megatron", *ONE_RANK)
        told = zygote.run(flags).stdout
        assert "the number of ranks was 2 in the checkpoint and is now 1: the optimizer state is" in told
        assert "so dropout draws different random numbers from step" in told


class TestDamaged:
    def test_checkpoint_is_told_with_the_one_before_it(
        self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path
    ) -> None:
        """Loads a copy, in which a byte of a file of the second rank has turned."""
        copy = tmp_path / "run/checkpoints"
        for step in (9, 12):
            folder = copy / f"step_{step:07d}"
            folder.mkdir(parents=True)
            for path in (whole / "checkpoints" / folder.name).iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
        (copy / "latest").write_text("step_0000012\n", encoding="utf-8")
        damaged = copy / "step_0000012/weights-00001.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-5] ^= 1
        damaged.write_bytes(content)
        message = one_message(
            zygote.run(
                flags_of(text, tmp_path / "run", "--load", tmp_path / "run"), ranks=RANKS, expect=4
            ).stderr
        )
        assert f"{damaged} has changed" in message and f"--load {copy / 'step_0000009'}" in message


class TestTools:
    def test_evaluate_and_baselines(
        self, zygote: Zygote, whole: Path, lines: list[Record], tmp_path: Path
    ) -> None:
        """One process scores a run of two."""
        output = tmp_path / "scores.json"
        program = REPOSITORY / "tools/evaluate.py"
        zygote.run(
            ["--load", whole, "--topk", 1, 2, 3, EXPERTS, "--eval-iters", 2, "--output", output],
            program=program,
        )
        results = json.loads(output.read_text(encoding="utf-8"))["results"]
        assert [row["topk"] for row in results] == [1, 2, 3, EXPERTS]
        for row in results:
            assert row.keys() == {"topk", "lm_loss", "perplexity", "bits_per_byte", "tokens"}
            assert row["tokens"] == 2 * BATCH * SEQ and row["perplexity"] == pytest.approx(
                math.exp(row["lm_loss"])
            )
        own = lines[-1]
        assert own["split"] == "test" and own["topk"] == 3
        assert {
            name: results[2][name] for name in ("lm_loss", "perplexity", "bits_per_byte")
        } == pytest.approx({name: own[name] for name in ("lm_loss", "perplexity", "bits_per_byte")}, rel=1e-5)
        assert len({row["lm_loss"] for row in results}) == 4

        table = tmp_path / "table.json"
        job = zygote.run(
            ["--load", whole, "--results", output, "--output", table],
            program=REPOSITORY / "tools/baselines.py",
        )
        rows = json.loads(table.read_text(encoding="utf-8"))["bits_per_byte"]
        assert list(rows) == ["unigram", "bigram", *(f"model, k = {k} of 4" for k in (1, 2, 3, 4))]
        assert (
            rows["model, k = 3 of 4"] == results[2]["bits_per_byte"]
            and 1 < rows["bigram"] < rows["unigram"] < 8
        )
        assert all(name in job.stdout for name in rows)

    def test_evaluate_refuses(self, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
        program, output = REPOSITORY / "tools/evaluate.py", tmp_path / "scores.json"
        job = zygote.run(["--load", whole, "--topk", 0, 5, "--output", output], program=program, expect=2)
        assert "--topk = 0" in job.stderr and "--topk = 5" in job.stderr
        zygote.run(["--load", tmp_path, "--topk", 1, "--output", output], program=program, expect=4)
        below = output.parent / "file" / "scores.json"
        (output.parent / "file").touch()
        job = zygote.run(["--load", whole, "--topk", 1, "--output", below], program=program, expect=2)
        assert f"--output = {below}: cannot be written: " in job.stderr
        assert not output.exists()

    def test_export_to_megatron_core(self, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
        """A DeepSpeed run of two ranks; that the weights serve in megatron-core's model is tested with the
        engine.
        """
        program, output = REPOSITORY / "tools/export_megatron.py", tmp_path / "megatron"
        job = zygote.run(["--load", whole, "--output", output], program=program)
        assert (output / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "12\n"
        assert str(output / "iter_0000012") in job.stdout and "--num-experts 4" in job.stdout
        assert list((output / "iter_0000012").glob("*.distcp"))
        again = zygote.run(["--load", whole, "--output", output], program=program, expect=4)
        assert "already exists" in again.stderr
