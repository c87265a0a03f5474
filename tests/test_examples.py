"""The examples' settings are accepted, and their scripts name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_hyperrouter.analysis.shapes import shapes_of
from megatron_hyperrouter.analysis.size import size_of
from megatron_hyperrouter.config.cli import parse, replace_leaves
from megatron_hyperrouter.routers import ROUTERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [
        ("quickstart.yaml", 2, ["--data-path", "somewhere"]),
        ("quickstart.yaml", 1, ["--data-path", "somewhere", "--expert-model-parallel-size", "1"]),
        ("compare.yaml", 1, []),
        ("cluster.yaml", 64, []),
        ("cluster.yaml", 64, ["--engine", "megatron"]),
    ],
)
def test_settings_are_accepted(name: str, ranks: int, more: list[str]) -> None:
    config = parse(["--config", str(ROOT / "examples" / name), *more], routers=ROUTERS, world_size=ranks)
    assert config.router.name == "hyper"


def test_readme_settings_are_accepted(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (tmp_path / "readme.yaml").write_text(block, encoding="utf-8")
    config = parse(["--config", str(tmp_path / "readme.yaml")], routers=ROUTERS, world_size=64)
    assert config.data.data_path[1] == "data/web_text_document"


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(f"examples/{name}.sh" for name in ("quickstart", "cluster", "cluster/slurm")),
    ],
)
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"\b((?:tools|examples|tests|benchmarks)/[\w/]+\.(?:py|sh|yaml)|pretrain_gpt_hyperrouter\.py)\b",
            text,
        )
    )
    assert named, document
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


MODELS = sorted((ROOT / "examples" / "models").glob("*.yaml"))
# Vocabulary, and trained parameters as published: the sum over the tensors of the checkpoint's index.
PUBLISHED = {
    "mixtral-8x7b": (32000, 46_702_792_704),
    "qwen3-30b-a3b": (151936, 30_532_122_624),
    "deepseek-v2-lite": (102400, 15_706_484_224),
    # less the correction biases of the experts, which no gradient trains
    "deepseek-v3": (129280, 671_026_419_200 - 58 * 256),
    # less the difference that the file names
    "olmoe-like": (50304, 6_919_161_856 - 61_440),
}
OURS = ("glam-like-small", "switch-like-small")
LAYOUTS = [
    (path, int(ranks), flags)
    for path in MODELS
    for ranks, flags in re.findall(
        r"^# layout, (\d+) ranks: (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
]


@pytest.mark.parametrize("router", ["topk", "hyper"])
@pytest.mark.parametrize(("path", "ranks", "flags"), LAYOUTS, ids=lambda value: getattr(value, "stem", None))
def test_a_model_is_accepted_on_the_layouts_that_it_names(
    path: Path, ranks: int, flags: str, router: str
) -> None:
    argv = ["--config", str(path), *flags.split()]
    if path.stem != "hyperrouter-paper":
        argv += ["--router.name", router]
    assert parse(argv, routers=ROUTERS, world_size=ranks).parallel.expert_model_parallel_size > 1


def test_each_model_names_layouts() -> None:
    assert {path for path, _, _ in LAYOUTS} == set(MODELS)
    assert {path.stem for path in MODELS} == {*PUBLISHED, *OURS, "hyperrouter-paper"}


@pytest.mark.parametrize("name", OURS)
def test_a_small_model_has_as_many_parameters_as_its_file_says(name: str) -> None:
    path = ROOT / "examples" / "models" / f"{name}.yaml"
    config = parse(["--config", str(path)], routers=ROUTERS)
    said = re.search(r"([\d,]+) parameters with 384 rows", path.read_text())
    assert said is not None
    assert f"{size_of(config, shapes_of(config, 384)).total:,}" == said[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_as_many_parameters_as_were_published(name: str) -> None:
    vocabulary, parameters = PUBLISHED[name]
    config = parse(["--config", str(ROOT / "examples" / "models" / f"{name}.yaml")], routers=ROUTERS)
    assert size_of(config, shapes_of(config, vocabulary)).total == parameters
    if name == "deepseek-v3":
        config = replace_leaves(config, mtp_num_layers=1)
        assert size_of(config, shapes_of(config, vocabulary)).total - parameters == 11_610_067_968
