"""cli.py: defaults < YAML < flags; every problem in one error; what is dumped starts the same run again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from config.refused import DATA, problems_of
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.config import check
from megatron_hyperrouter.config.cli import (
    dump,
    launched_world_size,
    load_file,
    parse,
    replace_leaves,
)
from megatron_hyperrouter.config.leaves import Leaf, router_leaves, tree_leaves, value_of
from megatron_hyperrouter.config.run_folder import write_settings
from megatron_hyperrouter.config.tree import RouterChoice, RunConfig
from megatron_hyperrouter.errors import ConfigError


class TestPrecedence:
    def test_defaults(self, routers):
        config = parse(DATA, routers=routers)
        expected = RunConfig()
        assert config.router == RouterChoice(name="hyper", options=routers["hyper"].Config())
        assert config.data == dataclasses.replace(expected.data, data_path=("corpus",))
        assert dataclasses.replace(config, router=expected.router, data=expected.data) == expected

    def test_flags_over_yaml_over_defaults(self, routers, write):
        path = write(
            "num_layers: 6\nhidden_size: 128\nlr: 1e-4\ndata_path: [0.3, a, 0.7, b]\nrouter: {name: hyper, "
            "hypernet_width: 32}\n"
        )
        config = parse(["--hidden-size", "64", "--config", path, "--router.init=paper"], routers=routers)
        assert (config.model.num_layers, config.model.hidden_size, config.model.num_experts) == (6, 64, 8)
        assert config.optimizer.lr == 1e-4
        assert config.data.data_path == ("0.3", "a", "0.7", "b")
        assert config.router.options == routers["hyper"].Config(hypernet_width=32, init="paper")

    def test_the_last_of_equal_flags_wins(self, routers):
        assert parse([*DATA, "--num-layers", "1", "--num-layers=2"], routers=routers).model.num_layers == 2

    def test_a_flag_that_is_given_again_with_another_value_is_noted(self, routers):
        notes: list[str] = []
        words = [*DATA, "--lr", "1e-3", "--num-layers", "3", "--num_layers=3", "--skip-steps", "1-2"]
        words += ["--skip-steps", "5-6", "--local_rank=0", "--local_rank=1", "--lr=2e-3"]
        config = parse(words, routers=routers, notes=notes)
        assert config.optimizer.lr == 2e-3 and len(config.guard.skip_steps) == 2
        assert notes == ["--lr is given more than once; the last value is used: 2e-3"]

    def test_what_repeated_flags_name_adds_up(self, routers):
        argv = [
            "--alarm",
            "entropy=stop",
            "--skip_steps",
            "3",
            "--alarm=collapse=snapshot",
            "--skip-steps=5-6",
        ]
        guard = parse([*DATA, *argv, "--alarm", "imbalance=note", "entropy=note"], routers=routers).guard
        assert guard.alarm == ("entropy=stop", "collapse=snapshot", "imbalance=note", "entropy=note")
        assert guard.skip_steps == ("3", "5-6")
        with pytest.raises(ConfigError, match=r"--alarm = \(none\)|--alarm: needs a value"):
            parse([*DATA, "--alarm"], routers=routers)

    def test_a_bad_value_that_is_overridden_does_no_harm(self, routers, write):
        path = write("num_layers: many\ndata_path: a\n")
        assert parse(["--config", path, "--num-layers", "2"], routers=routers).model.num_layers == 2

    def test_booleans(self, routers, write):
        path = write("bf16: true\ndata_path: a\nrouter: {bias: yes}")
        for argv, value in [
            (["--bf16"], True),
            (["--bf16", "true"], True),
            (["--bf16=false"], False),
            (["--no-bf16"], False),
            (["--config", path], True),
            (["--config", path, "--no-bf16"], False),
        ]:
            assert parse([*DATA, *argv], routers=routers).train.bf16 is value, argv
        assert parse(["--config", path], routers=routers).router.options.bias is True
        assert parse(["--config", path, "--router.no-bias"], routers=routers).router.options.bias is False

    def test_a_key_that_switches_off_is_another_value(self, routers, write):
        path = write("data_path: a\nno_bf16: true\nconfig: b\nrouter: {name: hyper, no_bias: true}\n")
        found = [problem.remedy for problem in problems_of(routers, "--config", path)]
        assert found[::2] == ["write bf16: false", "write bias: false"] and "into one file" in found[1]

    @pytest.mark.parametrize("argv", [["--run-dir", "a\r"], ["--run-dir", "a", "\r"], ["--mock-data\r"]])
    def test_a_script_with_the_line_ends_of_windows_is_one_problem(self, routers, argv):
        (problem,) = problems_of(routers, *([] if "--mock-data\r" in argv else DATA), *argv)
        assert problem.rule == "has the line ends of Windows"

    @pytest.mark.parametrize("name", ["--run-dir", "--wandb-exp-name", "--sample-prompt"])
    def test_bytes_that_a_file_of_settings_could_not_contain(self, routers, name):
        found = problems_of(routers, *DATA, name, os.fsdecode(b"caf\xe9"))
        assert "not UTF-8" in found[0].rule and found[0].field == name

    def test_the_launchers_flag_is_ignored(self, routers):
        for first in (["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "0"]):
            assert parse([*first, *DATA], routers=routers) == parse(DATA, routers=routers)

    def test_negative_numbers_are_values(self, routers):
        (problem,) = problems_of(routers, *DATA, "--lr", "-1e-4")
        assert (problem.field, problem.value) == ("--lr", "-1e-4")


class TestRouter:
    def test_the_name_decides_on_the_options(self, routers):
        config = parse([*DATA, "--router.init-std", "0.5", "--router.name", "plain"], routers=routers)
        assert config.router == RouterChoice(name="plain", options=routers["plain"].Config(init_std=0.5))

    def test_another_name_on_the_command_line_replaces_the_files_router(self, routers, write):
        path = write("data_path: a\nrouter: {name: hyper, hypernet_width: 64, seed: 7}")
        config = parse(["--config", path, "--router.name", "plain"], routers=routers)
        # not seed 7, which was said to another router
        assert config.router.options == routers["plain"].Config()
        same = parse(["--config", path, "--router.name", "hyper"], routers=routers)
        assert same.router.options == routers["hyper"].Config(hypernet_width=64, seed=7)

    def test_a_typing_mistake_in_the_replaced_router_is_still_told(self, routers, write):
        path = write("data_path: a\nrouter: {name: hyper, hypernet_widht: 64}")
        (problem,) = problems_of(routers, "--config", path, "--router.name", "plain")
        assert "hypernet_widht" in problem.field

    def test_unknown_router_is_one_problem(self, routers, write):
        path = write("data_path: a\nrouter: {name: hypr, hypernet_width: 64}")
        (problem,) = problems_of(routers, "--config", path, "--router.bias")
        assert problem.remedy == "did you mean hyper?"
        assert "--router.name" in problem.field

    def test_an_option_of_another_router(self, routers):
        (problem,) = problems_of(routers, *DATA, "--router.name", "plain", "--router.hypernet-width", "3")
        assert problem.field == "--router.hypernet-width"
        assert "is not an option of router plain; it is an option of hyper" in problem.rule

    def test_the_routers_own_rules(self, routers):
        (problem,) = problems_of(routers, *DATA, "--router.hypernet-width", "999999")
        assert problem.rule == "is wider than what it makes"

    @pytest.mark.parametrize("text", ["router: hyper", "router: [hyper]", "router: 3"])
    def test_router_must_be_a_mapping(self, routers, write, text):
        (problem,) = problems_of(routers, "--config", write(f"data_path: a\n{text}"))
        assert "must be a mapping" in problem.rule


class TestEveryProblemAtOnce:
    def test_unknown_names_bad_values_and_rules_together(self, routers, write):
        path = write("data_path: a\nnum_layer: 3\nlr: fast\n")
        found = problems_of(
            routers,
            "--config",
            path,
            "--hiden-size",
            "64",
            "--num-experts",
            "6",
            "--expert-model-parallel-size",
            "4",
            "--router.bias",
            "7",
            "stray",
        )
        text = str(ConfigError(found))
        assert text.startswith("5 problems in the settings:")
        for expected in (
            "--hiden-size = 64: unknown flag\n    remedy: did you mean --hidden-size?",
            f"num_layer in {path} = 3: unknown setting\n    remedy: did you mean num_layers?",
            f"--lr (lr in {path}) = fast: must be a number >= 0",
            "--num-experts = 6: must be divisible by --expert-model-parallel-size = 4",
            "--router.bias = 7 stray: takes one value, got 2",
        ):
            assert expected in text, text

    def test_words_before_any_flag(self, routers):
        (problem,) = problems_of(routers, "train", *DATA)
        assert (problem.field, problem.value) == ("command line", "train")

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("--no-bf61", "--no-bf16"),
            ("--router.nam", "--router.name"),
            ("--confg", "--config"),
            ("--router.hypernet-widht", "--router.hypernet-width"),
        ],
    )
    def test_nearest_flag(self, routers, written, meant):
        (problem,) = problems_of(routers, *DATA, written, "1")
        assert (problem.field, problem.remedy) == (written, f"did you mean {meant}?")

    def test_a_flag_like_no_other(self, routers):
        (problem,) = problems_of(routers, *DATA, "--zzzzzz")
        assert "--help" in problem.remedy

    def test_consequences_of_a_mistake_are_not_told(self, routers):
        # seven heads do not divide the default width either, but nobody asked for that width
        (problem,) = problems_of(routers, *DATA, "--hidden-size", "wide", "--num-attention-heads", "7")
        assert problem.field == "--hidden-size"
        (problem,) = problems_of(routers, "--data-pth", "a")  # and not also: no training data
        assert problem.field == "--data-pth"

    def test_both_flags_of_a_boolean(self, routers):
        (problem,) = problems_of(routers, *DATA, "--bf16", "--no-bf16")
        assert "contradicts --bf16" in problem.rule
        (problem,) = problems_of(routers, *DATA, "--no-bf16", "true")
        assert "takes no value" in problem.rule

    def test_world_size_is_checked_where_it_is_known(self, routers):
        argv = [*DATA, "--expert-model-parallel-size", "2"]
        assert parse(argv, routers=routers, world_size=2) == parse(argv, routers=routers)
        (problem,) = problems_of(routers, *argv, world_size=3)
        assert problem.field == "--expert-model-parallel-size"


def value_strategy(leaf: Leaf) -> st.SearchStrategy:
    """Good values of a leaf, as its rules have it."""
    low = max(
        [rule.ge for rule in leaf.rules if hasattr(rule, "ge")]
        + [rule.gt for rule in leaf.rules if hasattr(rule, "gt")],
        default=0,
    )
    high = min(
        [rule.le for rule in leaf.rules if hasattr(rule, "le")]
        + [rule.lt for rule in leaf.rules if hasattr(rule, "lt")],
        default=2**40,
    )
    excluded = {
        "exclude_min": any(hasattr(r, "gt") for r in leaf.rules),
        "exclude_max": any(hasattr(r, "lt") for r in leaf.rules),
    }
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(
        lambda word: (
            (not leaf.optional or word.strip().lower() != "none")
            and not word.startswith("~")
            and not (leaf.is_path and not word.strip())
        )
    )
    if leaf.choices:
        values = st.sampled_from(leaf.choices)
    elif leaf.base is bool:
        values = st.booleans()
    elif leaf.base is int:
        values = st.integers(low, high)
    elif leaf.base is float:
        values = st.floats(low, high, **excluded)
    elif leaf.is_tuple:
        items = st.integers() if leaf.item is int else text
        if leaf.length is not None:
            items = st.integers(1, 10**6)
        values = st.lists(items, min_size=leaf.length or 2, max_size=leaf.length or 3).map(tuple)
    else:
        values = text
    return st.none() | values if leaf.optional else values


@given(data=st.data())
def test_what_is_dumped_parses_to_an_equal_tree(data, routers, tmp_path_factory):
    name = data.draw(st.sampled_from(sorted(routers)))
    config = RunConfig(router=RouterChoice(name=name, options=routers[name].Config()))
    leaves = {**tree_leaves(), **router_leaves(routers[name].Config)}
    chosen = data.draw(st.sets(st.sampled_from(sorted(leaves)), max_size=12))
    values = {each: data.draw(value_strategy(leaves[each]), label=each) for each in chosen}
    if values.get("sequence_parallel"):  # without tensor parallelism it would be switched off
        values["tensor_model_parallel_size"] = 2
    config = replace_leaves(config, **values)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    # rules that join settings may object; that is another matter
    with mock.patch.object(check, "problems", return_value=[]):
        again = parse(["--config", str(path)], routers=routers)
    assert again == config
    for leaf in leaves:  # 1 == 1.0 == True
        assert type(value_of(again, leaf)) is type(value_of(config, leaf)), leaf


@pytest.mark.parametrize(
    "name",
    [
        "a\x85b",
        "a: b",
        "# no comment",
        "1e5",
        "yes",
        "010",
        "null",
        "1:30",
        ".inf",
        "",
        " ",
        "a\n b",
        "\u2028",
        "läuft",
        "\U0001f600",
    ],
)
def test_names_that_yaml_could_take_for_something_else(name, routers, write):
    config = parse([*DATA, f"--wandb-exp-name={name}"], routers=routers)
    assert parse(["--config", write(dump(config))], routers=routers).logging.wandb_exp_name == name


def test_dump_is_readable(routers):
    config = parse([*DATA, "--router.hypernet-width", "64", "--lr", "1e-5"], routers=routers)
    document = yaml.safe_load(dump(config))
    assert document["router"] == {
        "name": "hyper",
        "hypernet_width": 64,
        "init": "width",
        "bias": False,
        "seed": None,
    }
    assert document["lr"] == 1e-5
    assert document["data_path"] == ["corpus"]
    assert set(document) == {*tree_leaves(), "router"}


class TestHelpers:
    def test_replace_leaves(self, routers):
        config = parse(DATA, routers=routers)
        changed = replace_leaves(config, num_layers=2, lr=0.5, **{"router.seed": 7})
        assert (changed.model.num_layers, changed.optimizer.lr, changed.router.options.seed) == (2, 0.5, 7)
        assert replace_leaves(changed, num_layers=4, lr=3e-4, **{"router.seed": None}) == config

    def test_replace_leaves_refuses_bad_values_all_at_once(self, routers):
        with pytest.raises(ConfigError) as error:
            replace_leaves(parse(DATA, routers=routers), num_layers=0, zero_stage=9)
        assert [problem.field for problem in error.value.problems] == ["--num-layers", "--zero-stage"]

    def test_replace_leaves_refuses_unknown_names(self, routers):
        with pytest.raises(KeyError, match="widht"):
            replace_leaves(parse(DATA, routers=routers), widht=1)

    def test_load_file(self, routers, write):
        path = write(
            "data_path: a\nnum_layers: 3\nexpert_model_parallel_size: 2\nrouter: {name: hyper, bias: true}"
        )
        config = load_file(
            path,
            routers=routers,
            overrides={"expert_model_parallel_size": 1, "num_workers": 0, "router.bias": False},
        )
        assert (
            config.model.num_layers,
            config.parallel.expert_model_parallel_size,
            config.data.num_workers,
        ) == (3, 1, 0)
        assert config.router.options.bias is False

    def test_load_file_reports_bad_overrides(self, routers, write):
        with pytest.raises(ConfigError) as error:
            load_file(write("data_path: a"), routers=routers, overrides={"num_wokers": 0, "num_layers": 0})
        assert [problem.field for problem in error.value.problems] == ["--num-layers", "--num-wokers"]

    def test_launched_world_size(self):
        assert launched_world_size({}) == 1
        assert launched_world_size({"WORLD_SIZE": "8"}) == 8


class TestWriteSettings:
    def test_the_folder_of_the_start_may_have_any_name(self, routers, tmp_path, monkeypatch):
        odd = tmp_path / "a\x1b[1m\nb: {"
        odd.mkdir()
        monkeypatch.chdir(odd)
        config = parse([*DATA, "--run-dir", "run"], routers=routers)
        path = write_settings(config)
        assert load_file(path, routers=routers) == config
        assert "a?[1m?b: {" in path.read_text(encoding="utf-8").splitlines()[0]

    def test_a_runs_own_file_starts_the_same_run_again(self, routers, tmp_path):
        config = parse(
            [*DATA, "--run-dir", str(tmp_path / "run"), "--load", str(tmp_path / "other"), "--router.bias"],
            routers=routers,
        )
        path = write_settings(config)
        assert path == tmp_path / "run/config.yaml"
        assert parse(["--config", str(path)], routers=routers) == config
        # nothing unfinished beside it
        assert [each.name for each in path.parent.iterdir()] == ["config.yaml"]

    def test_a_run_that_goes_on_is_still_the_same_run(self, routers, tmp_path):
        first = parse([*DATA, "--run-dir", str(tmp_path)], routers=routers)
        resumed = replace_leaves(first, load=f"{tmp_path}/../{tmp_path.name}")
        assert load_file(write_settings(resumed), routers=routers) == first


def test_the_room_needs_no_torch():
    program = (
        "import sys; import megatron_hyperrouter.config.cli, megatron_hyperrouter.config.check\n"
        "heavy = {'torch', 'deepspeed', 'megatron', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[2])
