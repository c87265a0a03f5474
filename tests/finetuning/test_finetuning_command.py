"""What ``mhr finetune`` refuses, with which status, and how it compares two fine-tunings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fakes import Alone, FakeEngine

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.commands.models import finetune
from megatron_hyperrouter.commands.models.finetune_flags import read_flags, settings_of
from megatron_hyperrouter.commands.studies import analyze
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError, HyperRouterError
from megatron_hyperrouter.finetuning.saved import Course, SeedFolder
from megatron_hyperrouter.finetuning.settings import Settings, fitted, overrides
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.run_meta import run_meta

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tasks"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 8 experts and a task."""
    home = tmp_path_factory.mktemp("home")
    flags = f"--mock-data --tokenizer-type ByteTokenizer --seq-length 8 --run-dir {home / 'run'}"
    config = parse(flags.split(), routers=ROUTERS, world_size=1)
    described = describe(config, tokenizer=tokenizer_of(config.data).identity())
    engine = FakeEngine(257)
    meta = run_meta(config, engine) | described.meta
    CheckpointFolders(home / "run/checkpoints", Alone()).save(5, engine.save, meta, texts=described.texts)
    (home / "task").mkdir()
    (home / "task/labels.json").write_text('["a", "b"]')
    for part in ("train", "dev", "test"):
        (home / f"task/{part}.jsonl").write_text(f'{{"text": "{part}", "label": 0}}\n')
    return home


def command(home: Path, more: str, *, load: str = "run", task: str = "task") -> None:
    words = f"--load {home / load} --task {home / task} --output {home / 'out'} {more}"
    finetune.main(words.split())


@pytest.mark.parametrize(
    "more, status, words",
    [
        ("--topk 1 9", 2, "--topk = 9: must be from 1 to 8, the largest number of experts"),
        ("--topk 0", 2, "--topk = 0"),
        ("--finetune-k 9", 2, "--finetune-k = 9"),
        ("--freeze router,head", 2, "'head' cannot be frozen"),
        ("--seeds 0 --epochs 0 --warmup 1", 2, "3 problems"),
        ("--batch-size 6 --micro-batch-size 4", 2, "  - --batch-size = 6"),
        ("--aux-loss-coeff -1", 2, "  - --aux-loss-coeff = -1.0"),
        ("--config missing.yaml", 2, "cannot be read"),
    ],
)
def test_settings_that_cannot_be(home: Path, more: str, status: int, words: str) -> None:
    with pytest.raises(HyperRouterError) as refused:
        command(home, more)
    assert refused.value.exit_status == status and words in str(refused.value)
    assert not (home / "out").exists()


def test_the_batch_need_not_fit_the_micro_batch_of_pretraining(home: Path, tmp_path: Path) -> None:
    work = finetune.Work.of(
        read_flags(f"--load {home}/run --task {home}/task --output {tmp_path} --batch-size 5".split(), "")
    )
    assert work.run.settings.train.global_batch_size == 5
    assert fitted(work.run.settings, work.settings, longest=3, world_size=1).train.micro_batch_size == 1


def test_no_run_no_task_and_an_output_that_is_there(home: Path) -> None:
    for given, status, words in (
        ({"load": "nothing"}, 4, "the folder has no finished checkpoint"),
        ({"task": "nothing"}, 3, "there is no such folder"),
        ({"task": "run"}, 3, "train.jsonl is missing"),
    ):
        with pytest.raises(HyperRouterError, match=words) as refused:
            command(home, "", **given)
        assert refused.value.exit_status == status
    (home / "earlier").mkdir()
    (home / "earlier/results.json").touch()
    for place, words in (("earlier", "already contains results"), ("task/labels.json", "cannot be created")):
        with pytest.raises(HyperRouterError, match=words) as refused:
            command(home, f"--output {home / place}")
        assert refused.value.exit_status == 2


def test_tasks_of_srun_are_ranks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, both tasks would fine-tune into the same folder.  mhr analyze refuses several tasks."""
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    tasks = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"} | {
        "SLURM_STEP_NUM_NODES": "1"
    }
    for start in (lambda: command(home, "", task="nothing"), analyze.refuse_several_ranks):
        monkeypatch.setattr(os, "environ", environ | tasks)
        with pytest.raises(HyperRouterError, match=r"no such folder|ranks = 2"):
            start()
        assert os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--load run", "--task and --output: must be given"), ("--tpk 3", "--tpk: unknown flag")],
)
def test_flags_that_are_missing_or_unknown(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        finetune.main(flags.split())


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(
        "lr: 0.5\ntopk: [1, 4]\nfreeze: router,experts\nload: there\ntask: t\n"
    )
    args = read_flags(["--config", str(tmp_path / "ours.yaml"), "--lr", "2e-3", "--output", "o"], "")
    settings = settings_of(args)
    assert (settings.lr, settings.topk, settings.freeze) == (2e-3, (1, 4), ("router", "experts"))
    assert args.load == Path("there")


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_the_papers_settings_are_read(name: str) -> None:
    words = ["--config", str(EXAMPLES / name), "--load", "r", "--task", "t", "--output", "o"]
    settings = settings_of(read_flags(words, ""))
    assert not list(settings.problems()) and settings != Settings()


def test_methods_fine_tune_without_their_further_objectives() -> None:
    for router in ("competesmoe", "simsmoe", "hyper"):
        options = overrides(Settings(), router=router, trained_topk=2, layout={}, steps=10)
        expected = {
            "competesmoe": {"router.schedule": "fixed", "router.rate": 0.0},
            "simsmoe": {"router.similarity_coeff": 0.0},
        }.get(router, {})
        assert {name: value for name, value in options.items() if name.startswith("router.")} == expected
        known = parse(
            ["--mock-data", "--router.name", router, "--tokenizer-type", "ByteTokenizer"], routers=ROUTERS
        )
        assert all(hasattr(known.router.options, name.removeprefix("router.")) for name in expected)


# ------------------------------------------------------------------------------------------------- comparison
def outcome(folder: Path, right: list[int], seed: int = 1, label: int = 1) -> Path:
    """A folder of predictions: 1 right, 0 wrong."""
    folder.mkdir(exist_ok=True)
    with (folder / "predictions.jsonl").open("a") as file:
        for index, hit in enumerate(right):
            line = {"seed": seed, "topk": 2, "index": index, "label": label, "predicted": label if hit else 0}
            file.write(json.dumps(line) + "\n")
    return folder


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for seed in (1, 2):
        outcome(first, [1] * 18 + [0] * 2, seed)
        outcome(second, [1] * (8 + seed) + [0] * (12 - seed), seed)
    finetune.main(["--compare", str(first), str(second), "--output", str(tmp_path / "c.json")])
    found = json.loads((tmp_path / "c.json").read_text())["results"]
    assert [row["difference"] for row in found] == pytest.approx([0.45, 0.4])
    assert found[0]["mcnemar_p"] == pytest.approx(2 * 0.5**9)  # 9 texts that the first alone has right
    low, high = found[0]["interval"]
    assert 0.2 <= low < 0.45 < high <= 0.7
    shown = capsys.readouterr().out
    assert "Do these two checkpoints differ?" in shown and "Do the two methods differ?" in shown
    assert "+0.4250 +- 0.3177" in shown  # t of 1 degree of freedom, 12.706, times 0.025


def test_comparisons_that_cannot_be(tmp_path: Path) -> None:
    first = outcome(tmp_path / "first", [1, 0, 1])
    for second, words in (
        (outcome(tmp_path / "labels", [1, 0, 1], label=2), "not tested on the same texts"),
        (outcome(tmp_path / "seed", [1, 0, 1], seed=9), "have no pair of seed and k in common"),
        (tmp_path / "nothing", "is missing"),
    ):
        with pytest.raises(HyperRouterError, match=words) as refused:
            finetune.main(["--compare", str(first), str(second)])
        assert refused.value.exit_status == 3
    with pytest.raises(ConfigError, match="is not a file"):
        finetune.main(["--compare", str(first), str(first), "--output", str(tmp_path)])


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_description_is_a_message(home: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "finetuning.json").write_text(content)
    with pytest.raises(DataError, match=r"finetuning\.json"):
        finetune.check_output(tmp_path, {})


def test_weights_that_an_earlier_attempt_chose_do_not_stay(tmp_path: Path) -> None:
    """A seed that starts again keeps nothing of its earlier weights."""
    folder = SeedFolder(tmp_path, Alone(), 5, {}, {})  # type: ignore[arg-type]
    (tmp_path / "checkpoints/step_0000007").mkdir(parents=True)
    assert folder.load() == Course() and not (tmp_path / "checkpoints").exists()


def test_remedies_name_no_flags_that_finetune_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "unfinished/step_0000007").mkdir(parents=True)
    (tmp_path / "unfinished/step_0000007/manifest.json").write_text("{")
    with pytest.raises(CheckpointError) as refused:
        SeedFolder(tmp_path, Alone(), 5, {}, {}).load()  # type: ignore[arg-type]
    assert refused.value.remedy.startswith(f"remove {tmp_path}")
