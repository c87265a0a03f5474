"""The control that a comparison adds automatically, and the default comparisons."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_hyperrouter.analysis.power import PairedTest
from megatron_hyperrouter.commands.studies.controls import (
    CONTROL,
    comparisons_of,
    control_among,
    control_for,
    scale_of,
    write_study,
)
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.studies.verdicts import Named, Verdict
from megatron_hyperrouter.studies.verdicts import parse as parse_comparisons


def config(name: str, *flags: str) -> RunConfig:
    words = ["--mock-data", "--hidden-size", "64", "--num-experts", "16", "--moe-router-topk", "4"]
    return parse([*words, "--router.name", name, *flags], routers=ROUTERS, world_size=1)


def test_the_control_has_the_scale_of_hyperrouter() -> None:
    found = control_for({"topk": config("topk"), "hyper": config("hyper")})
    assert found == {"name": "smoe_dropout", "logit_std": 1.0}
    control = config("smoe_dropout", "--router.logit-std", str(found["logit_std"]))
    assert scale_of(control) == 1.0
    flags = ("--router.num-groups", "4", "--router.group-topk", "2", "--router.score-function", "sigmoid")
    limited = control_for({"hyper": config("hyper", *flags, "--router.lr-mult", "3")})
    alike = {"num_groups": 4, "group_topk": 2, "score_function": "sigmoid"}
    assert limited == {"name": "smoe_dropout", "logit_std": 1.0, **alike}
    paper = config("hyper", "--router.init", "paper")
    assert control_for({"paper": paper}) == {"name": "smoe_dropout", "logit_std": scale_of(paper)}


def test_no_control_where_none_is_needed() -> None:
    assert control_for({"topk": config("topk"), "xmoe": config("xmoe")}) is None
    matched = config("smoe_dropout", "--router.init-std", "0.125")
    assert control_for({"hyper": config("hyper"), "fixed": matched}) is None
    frozen = config("topk", "--router.init-std", "0.125", "--router.freeze")
    assert control_for({"hyper": config("hyper"), "fixed": frozen}) is None
    assert control_among({"hyper": config("hyper"), "fixed": frozen}) == "fixed"
    small = config("smoe_dropout")  # 0.02: another scale
    assert control_for({"hyper": config("hyper"), "small": small}) is not None


def test_questions_by_default() -> None:
    configs = {"hyper": config("hyper"), "topk": config("topk"), CONTROL: config("smoe_dropout")}
    args = Namespace(comparisons=None)
    found = comparisons_of(args, configs, [1, 2, 4], CONTROL)
    assert list(map(str, found)) == [f"hyper:{CONTROL}@1", f"hyper:{CONTROL}@4"]
    assert comparisons_of(args, configs, [1, 2, 4], None) == []
    named = comparisons_of(Namespace(comparisons=["topk:hyper@2"]), configs, [1, 2], None)
    assert named == [Named("topk", "hyper", 2)]


def test_questions_stand_once_runs_are_finished(tmp_path: Path) -> None:
    content = {"comparisons": ["a:b@1"], "jobs": 2}
    write_study(tmp_path / "out", content, started=False)
    write_study(tmp_path / "out", {**content, "comparisons": ["a:b@2"]}, started=False)
    with pytest.raises(ConfigError, match="cannot be changed once a run is finished; this study has a:b@2"):
        write_study(tmp_path / "out", content, started=True)


@pytest.mark.parametrize("word", ["a:b", "a@1", "a:a@1", "a:b@x", "a b:c@1"])
def test_words_that_are_no_comparison(word: str) -> None:
    with pytest.raises(ValueError, match="LEFT:RIGHT@K"):
        parse_comparisons([word])


def test_words_of_a_verdict() -> None:
    named = Named("hyper", "control", 1)

    def words(mean: float, p: float | None) -> str:
        return Verdict(named, PairedTest(3, mean), p, 0.1, 9, 0.02).words

    assert words(-0.2, 0.01) == "hyper is better"
    assert words(0.2, 0.01) == "hyper is worse"
    assert words(-0.2, 0.05) == "no difference shown"
    assert words(-0.2, None) == "not testable with one seed"
