"""First trials on a new machine: made-up data, forced balance, a trace, a dry run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from program.launched import Zygote, metrics, one_message
from program.settings import TINY

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.data.tokenize.bpe import train_bpe

pytestmark = pytest.mark.processes
TRIAL = """--mock-data --tokenizer-type NullTokenizer --vocab-size 60 --train-iters 4 --log-params-norm
--moe-router-force-load-balancing --moe-router-topk 2 --log-num-zeros-in-grad --save-interval 0""".split()
TRACE = "--profile --profile-step-start 1 --profile-step-end 3 --profile-ranks 0".split()


@pytest.fixture(scope="module")
def trials(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on both engines: on one rank, and with experts on two."""
    root = tmp_path_factory.mktemp("trials")
    flags = [*TINY, *TRIAL]
    zygote.run([*flags, *TRACE, "--run-dir", str(root / "deepspeed")], ranks=1)
    other = ["--engine", "megatron", "--expert-model-parallel-size", "2"]
    zygote.run([*flags, *other, "--run-dir", str(root / "megatron")], ranks=2)
    return {name: root / name for name in ("deepspeed", "megatron")}


def steps_of(run_dir: Path) -> list[dict]:
    return [record for record in metrics(run_dir) if "split" not in record]


def test_made_up_data_is_the_same_run_everywhere_and_is_learned(trials: dict[str, Path]) -> None:
    losses = {name: [record["lm_loss"] for record in steps_of(path)] for name, path in trials.items()}
    assert losses["megatron"] == pytest.approx(losses["deepspeed"], rel=1e-5)
    assert losses["deepspeed"][0] == pytest.approx(math.log(64), rel=0.1)
    assert losses["deepspeed"][-1] < losses["deepspeed"][0]
    assert {record["split"] for record in metrics(trials["deepspeed"]) if "split" in record} == {
        "valid",
        "test",
    }


def test_forced_balance_gives_all_experts_the_same_load(trials: dict[str, Path]) -> None:
    for path in trials.values():
        for record in steps_of(path):
            assert record["router/load_max_over_mean/1"] == record["router/load_max_over_mean/2"] == 1.0


def test_the_norm_of_the_parameters_is_that_of_the_saved_weights(trials: dict[str, Path]) -> None:
    for path in trials.values():
        folder = find(path)
        assert folder is not None
        squares = 0.0
        for name, tensor in read_tensors(folder, weight_names(folder)).items():
            if ".mlp.router." not in name or name.endswith("embedding_S"):  # not the frozen hypernetwork
                squares += float(tensor.double().square().sum())
        assert steps_of(path)[-1]["params_norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_zeros_of_the_gradient_are_counted_where_they_can_be(trials: dict[str, Path]) -> None:
    assert all("num_zeros" not in record for record in steps_of(trials["deepspeed"]))
    assert all(record["num_zeros"] >= 0 for record in steps_of(trials["megatron"]))


def test_zeros_do_not_depend_on_the_stages(zygote: Zygote, tmp_path: Path) -> None:
    """With multi-token prediction, megatron-core's last stage also has a matrix that it never uses."""
    flags = [*TINY, *TRIAL, "--engine", "megatron", "--mtp-num-layers", "1"]
    zygote.run([*flags, "--run-dir", str(tmp_path / "one")], ranks=1)
    stages = ["--pipeline-model-parallel-size", "2", "--run-dir", str(tmp_path / "two")]
    zygote.run([*flags, *stages], ranks=2)
    one, two = ([each["num_zeros"] for each in steps_of(tmp_path / name)] for name in ("one", "two"))
    assert two == one


def test_a_trace_of_the_steps_asked_for(trials: dict[str, Path]) -> None:
    trace = json.loads((trials["deepspeed"] / "profile" / "rank-0.json").read_text())
    assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])
    assert not (trials["megatron"] / "profile").exists()


def test_a_dry_run_shows_the_run_and_starts_nothing(zygote: Zygote, tmp_path: Path) -> None:
    flags = [*TINY, *TRIAL, "--run-dir", str(tmp_path / "run"), "--dry-run"]
    done = zygote.run([*flags, "--world-size", "4", "--expert-model-parallel-size", "4"], ranks=1)
    assert "4 ranks; parallel sizes: data 4, expert 4" in done.stdout
    assert "on the rank that needs the most" in done.stdout and "parameters" in done.stdout
    assert not (tmp_path / "run").exists()
    refused = zygote.run(
        [*flags, "--world-size", "3", "--expert-model-parallel-size", "2"], ranks=1, expect=2
    )
    assert "--expert-model-parallel-size = 2" in refused.stderr


def test_a_dry_run_where_neither_tokenizer_nor_data_is(zygote: Zygote, tmp_path: Path) -> None:
    """As on a login node: the embedding is counted where --vocab-size gives its size."""
    flags = [*TINY, "--data-path", "no/such/data", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    flags += ["--tokenizer-model", "no/such/tokenizer.json", "--tokenizer-type", "HuggingFaceTokenizer"]
    done = zygote.run(flags, ranks=1)
    assert (
        "the dry run cannot show the number of epochs and the size of the embedding: "
        in done.stdout + done.stderr
    )
    assert "on the rank that needs the most" in done.stdout and "the settings are valid" in done.stdout


@pytest.fixture(scope="module")
def stopped(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout that --exit-interval has stopped after two of four steps."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    flags = [*TINY, *TRIAL, "--hidden-dropout", "0.3", "--exit-interval", "2", "--run-dir", str(run_dir)]
    job = zygote.run(flags, ranks=1, expect=6)
    assert "stopped by --exit-interval after step 2" in job.stdout
    return run_dir


@pytest.fixture(scope="module")
def not_stopped(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The steps of the same run to its end."""
    run_dir = tmp_path_factory.mktemp("not-stopped") / "run"
    zygote.run([*TINY, *TRIAL, "--hidden-dropout", "0.3", "--run-dir", str(run_dir)], ranks=1)
    return steps_of(run_dir)


@pytest.mark.parametrize(
    ("left_out", "third", "fourth"),
    [([], True, True), (["--no-load-optim"], False, False), (["--no-load-rng"], False, False)],
    ids=["nothing", "optimizer", "random state"],
)
def test_parts_of_a_checkpoint_that_are_not_loaded(
    zygote: Zygote,
    stopped: Path,
    not_stopped: list[dict],
    tmp_path: Path,
    left_out: list[str],
    third: bool,
    fourth: bool,
) -> None:
    """Without dropout's numbers the third step has another loss; without Adam's moments the fourth has."""
    flags = [*TINY, *TRIAL, "--hidden-dropout", "0.3"]
    zygote.run([*flags, *left_out, "--load", str(stopped), "--run-dir", str(tmp_path / "rest")], ranks=1)
    rest = steps_of(tmp_path / "rest")
    assert [record["step"] for record in rest] == [3, 4]
    same = [one["lm_loss"] == other["lm_loss"] for one, other in zip(not_stopped[2:], rest, strict=True)]
    assert same == [third, fourth]


def test_a_checkpoint_without_the_optimizer_serves_its_weights_alone(zygote: Zygote, tmp_path: Path) -> None:
    flags = [*TINY, *TRIAL, "--run-dir", str(tmp_path / "run")]
    zygote.run([*flags, "--train-iters", "2", "--no-save-optim"], ranks=1)
    refused = zygote.run([*flags, "--load", str(tmp_path / "run")], ranks=1, expect=4)
    assert "no optimizer state" in refused.stderr
    zygote.run([*flags, "--load", str(tmp_path / "run"), "--no-load-optim"], ranks=1)
    assert [record["step"] for record in steps_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_recomputed_layers_change_no_loss(zygote: Zygote, trials: dict[str, Path], tmp_path: Path) -> None:
    """Of two layers the first is recomputed, on the Megatron engine."""
    more = "--engine megatron --recompute-granularity full --recompute-method block --recompute-num-layers 1"
    zygote.run([*TINY, *TRIAL, *more.split(), "--run-dir", str(tmp_path / "run")], ranks=1)
    losses = [record["lm_loss"] for record in steps_of(tmp_path / "run")]
    assert losses == pytest.approx([record["lm_loss"] for record in steps_of(trials["megatron"])], rel=1e-6)


def test_a_run_continues_after_its_tokenizer_file_has_gone(zygote: Zygote, tmp_path: Path) -> None:
    """Whoever gets a checkpoint alone can continue it; a misspelt name is still an error."""
    train_bpe(iter(["a text of a few words, a text of a few words"]), 260, str(tmp_path / "own.json"))
    words = [*TINY, "--mock-data", "--tokenizer-type", "HuggingFaceTokenizer", "--eval-iters", "0"]
    words += ["--train-iters", "4", "--run-dir", str(tmp_path / "run"), "--tokenizer-model"]
    zygote.run([*words, str(tmp_path / "own.json"), "--exit-interval", "2"], ranks=1, expect=6)
    (tmp_path / "own.json").rename(tmp_path / "elsewhere.json")
    resumed = ["--load", str(tmp_path / "run")]
    job = zygote.run([*words, str(tmp_path / "ovn.json"), *resumed], ranks=1, expect=3)
    assert "ovn.json: there is no such tokenizer file" in one_message(job.stderr)
    zygote.run([*words, str(tmp_path / "own.json"), *resumed], ranks=1)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    folder = find(tmp_path / "run")
    assert folder is not None
    assert (folder / "tokenizer" / "own.json").read_bytes() == (tmp_path / "elsewhere.json").read_bytes()
