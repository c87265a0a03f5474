"""reading/: settings in a YAML file, and names and values from other programs."""

from __future__ import annotations

import os
import time

import pytest
from config.refused import DATA, problems_of

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.leaves import router_leaves, tree_leaves, value_of
from megatron_hyperrouter.config.reading import foreign


class TestFile:
    def problem_with(self, routers, path: str):
        (problem,) = problems_of(routers, "--config", path)
        assert path in f"{problem.field} {problem.value}"
        return problem

    def test_missing(self, routers, tmp_path):
        assert "No such file" in self.problem_with(routers, str(tmp_path / "none.yaml")).rule

    def test_a_folder(self, routers, tmp_path):
        assert "cannot be read" in self.problem_with(routers, str(tmp_path)).rule

    def test_a_device_without_an_end(self, routers):
        assert "more than 16 MB" in self.problem_with(routers, "/dev/zero").rule

    def test_not_text(self, routers, tmp_path):
        (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
        assert "UTF-8" in self.problem_with(routers, str(tmp_path / "x.yaml")).rule

    def test_broken_yaml_names_the_line(self, routers, write):
        assert (
            "line 3"
            in self.problem_with(
                routers, write("num_layers: 2\nhidden_size: 64\nlr: [1, 2]]\nseed: 1\n")
            ).rule
        )

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("seed: " + "9" * 5000, "an unreadable number in line 1"),
            ("seed: " + "[" * 5000, "nested too deeply"),
            ("num_layers: &a {b: *a}", "has a value that contains itself (*name), in line 1"),
            (
                "lr: 1\nseed: !!timestamp 2001-99X99",
                "has the value 2001-99X99 in line 2, which does not fit its tag !!timestamp",
            ),
            ("seed: !!python/object/apply:os.getpid []", "unsupported tag in line 1"),
            ("seed: !!int many", "has the value many in line 1, which does not fit its tag !!int"),
            ('run_dir: "a\\0b"', "has an invalid character in line 1"),
            ('run_dir: "\\ud800"', "has an invalid character in line 1"),
            ("[a, b]: 1", "has a key in line 1 that is not a plain name"),
            ("a: 1\n---\nb: 2", "another document"),
        ],
    )
    def test_odd_yaml_is_refused_and_named(self, routers, write, text, rule):
        assert rule in self.problem_with(routers, write(f"{text}\n")).rule

    def test_aliases_cannot_stand_for_a_billion_values(self, routers, write):
        lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
        started = time.perf_counter()
        assert "aliases" in self.problem_with(routers, write("\n".join(["a0: &a0 x", *lines]))).rule
        assert time.perf_counter() - started < 10

    def test_a_few_aliases_are_welcome(self, routers, write):
        path = write("train_data_path: &mix [0.3, a, 0.7, b]\nvalid_data_path: *mix\n")
        data = parse(["--config", path], routers=routers).data
        assert data.train_data_path == data.valid_data_path == ("0.3", "a", "0.7", "b")

    @pytest.mark.parametrize(
        ("text", "name", "value"),
        [
            ("seed: 010", "seed", 10),  # not 8
            ("seed: 1_000", "seed", 1000),
            ("lr: 1e-4", "lr", 1e-4),
            ("lr: 3E-4", "lr", 3e-4),
            ("bf16: no", "bf16", False),
            ("bf16: on", "bf16", True),
            ("run_dir: 1:30", "run_dir", "1:30"),  # not 90
            ("run_dir: 2001-01-01", "run_dir", "2001-01-01"),  # not a date
            ("run_dir: yes", "run_dir", "yes"),
            ("load: ~", "load", None),
        ],
    )
    def test_values_are_what_they_look_like(self, routers, write, text, name, value):
        config = parse(["--config", write(f"data_path: a\n{text}\n")], routers=routers)
        assert value_of(config, name) == value

    def test_a_time_is_not_a_number(self, routers, write):
        problem = self.problem_with(routers, write("data_path: a\nseed: 1:30\n"))
        assert problem.value == "1:30"

    def test_sections_are_reported_and_read(self, routers, write):
        problem = self.problem_with(routers, write("data_path: a\nmodel:\n  num_layers: 2\n"))
        assert problem.field.startswith("model in")
        assert problem.remedy == "remove model: and write its settings without indentation (num_layers: ...)"
        found = problems_of(routers, "--config", write("model: {num_layers: 0}\ndata_path: a\n"))
        assert [each.field.split()[0] for each in found] == ["model", "--num-layers"]

    def test_a_flags_spelling(self, routers, write):
        path = write("data-path: a\nnum-layers: 3\nrouter: {name: hyper, hypernet-width: 3}\n")
        config = parse(["--config", path], routers=routers)
        assert (config.model.num_layers, config.router.options.hypernet_width) == (3, 3)
        problem = self.problem_with(routers, write("data_path: a\nnum-layers: 3\nnum_layers: 4\n"))
        assert problem.rule == "appears twice"

    def test_not_a_mapping(self, routers, write):
        assert "must be a mapping" in self.problem_with(routers, write("- num_layers: 2\n")).rule

    def test_duplicated_keys(self, routers, write):
        problem = self.problem_with(routers, write("data_path: a\nnum_layers: 2\nlr: 1.0\nnum_layers: 3\n"))
        assert (problem.value, problem.rule) == ("lines 2 and 4", "appears twice")

    def test_duplicated_option_of_the_router(self, routers, write):
        problem = self.problem_with(routers, write("data_path: a\nrouter:\n  seed: 1\n  seed: 2\n"))
        assert problem.value == "lines 3 and 4"

    def test_an_option_inside_and_outside_the_mapping(self, routers, write):
        problem = self.problem_with(routers, write("data_path: a\nrouter.seed: 1\nrouter: {seed: 2}\n"))
        assert problem.rule == "appears twice"

    def test_keys_that_are_no_names(self, routers, write):
        assert self.problem_with(routers, write("data_path: a\n12: b\n")).rule == "unknown setting"

    def test_config_without_a_file(self, routers):
        (problem,) = problems_of(routers, "--config")  # and not also: no training data
        assert str(problem) == "--config: needs a file name\n    remedy: write --config FILE.yaml"

    def test_an_empty_file_sets_nothing(self, routers, write):
        assert parse([*DATA, "--config", write("# nothing\n")], routers=routers) == parse(
            DATA, routers=routers
        )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("top_k", "use --moe-router-topk, its name in this program"),
        ("learning_rate", "use --lr, its name in this program"),
        ("max_steps", "use --train-iters, its name in this program"),
        ("n_embd", "use --hidden-size, its name in this program"),
        ("dtype", "use --bf16 (bf16: true in a file) for bfloat16; float32 is the default"),
        # too unlike anything for a guess
        (
            "depth_of_it",
            "look for the right name in mhr train --help; the run may change if you only remove the setting",
        ),
    ],
)
def test_names_of_other_programs(routers, write, name, remedy):
    (problem,) = problems_of(routers, *DATA, f"--{name}", "2")
    assert problem.remedy == remedy
    (problem,) = problems_of(routers, "--config", write(f"data_path: a\n{name}: 2\n"))
    assert problem.remedy == remedy.replace("--moe-router-topk", "moe_router_topk").replace(
        "--lr,", "lr,"
    ).replace("--train-iters", "train_iters").replace("--hidden-size", "hidden_size")


def test_every_foreign_name_leads_to_a_setting_and_hides_none(routers):
    from megatron_hyperrouter.routers import ROUTERS

    leaves = {*tree_leaves(), "router.name", *router_leaves(ROUTERS["hyper"].Config)}
    assert set(foreign.OURS.values()) <= leaves
    assert not leaves & {*foreign.OURS, *foreign.REMEDIES}


class TestPaths:
    def test_home_and_variables_are_filled_in(self, routers, write, monkeypatch):
        monkeypatch.setenv("HOME", "/homes/me")
        monkeypatch.setenv("SCRATCH", "/fast")
        path = write('run_dir: "~/run"\ndata_path: [0.5, $SCRATCH/a, 0.5, "${SCRATCH}/b"]\nload: ~/x$$y\n')
        config = parse(["--config", path, "--tensorboard-dir=~/tb"], routers=routers)
        assert config.logging.run_dir == "/homes/me/run"
        assert config.logging.tensorboard_dir == "/homes/me/tb"
        assert config.data.data_path == ("0.5", "/fast/a", "0.5", "/fast/b")
        assert config.checkpoint.load == "/homes/me/x$y"

    @pytest.mark.parametrize("value", ["${SCRATCH:-/tmp}/a", "$(date)", "${"])
    def test_what_only_a_shell_can_expand_is_no_name(self, routers, write, value):
        (problem,) = problems_of(routers, "--config", write(f"data_path: a\nrun_dir: {value!r}\n"))
        assert "which only a shell can expand" in problem.rule

    def test_what_does_not_exist_is_refused(self, routers, write):
        for value, rule in [("$NO_SUCH_VARIABLE/a", "is not set"), ("~no-such-user/a", "unknown user")]:
            (problem,) = problems_of(routers, "--config", write(f"data_path: a\nrun_dir: {value}\n"))
            assert rule in problem.rule

    @pytest.mark.parametrize("flag", ["--run-dir", "--save", "--load", "--data-path", "--tensorboard-dir"])
    @pytest.mark.parametrize("value", ["", " ", "$EMPTY"])
    def test_an_empty_one_is_not_the_working_folder(self, routers, monkeypatch, flag, value):
        """``--load "$RUN"`` with a variable that is not set."""
        monkeypatch.setenv("EMPTY", "")
        (problem,) = problems_of(routers, *DATA, flag, value)
        assert problem.rule == "must not be empty"
        assert "unset variable" in problem.remedy
        shown = value if value.strip() else repr(value)
        assert f" = {shown}: must not be empty" in str(problem)

    def test_an_empty_one_in_a_file_is_refused(self, routers, write):
        (problem,) = problems_of(routers, "--config", write('data_path: a\nload: ""\n'))
        assert str(problem).startswith("--load (load in ")
        assert " = '': must not be empty" in str(problem)

    def test_a_byte_order_mark_is_no_text(self, routers, tmp_path):
        texts = {"run.yaml": "train_iters: 7", "ds.json": '{"steps_per_print": 5}', "data.txt": "0.5 a 0.5 b"}
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8-sig")
        argv = [f"--config={tmp_path}/run.yaml", f"--deepspeed-config={tmp_path}/ds.json"]
        config = parse([*argv, f"--data-args-path={tmp_path}/data.txt"], routers=routers)
        assert (config.train.train_iters, config.data.data_path) == (7, ("0.5", "a", "0.5", "b"))

    def test_a_file_that_is_a_pipe_is_read_once(self, routers):
        """``--config <(...)``: the command parses its settings twice."""
        read, write = os.pipe()
        os.write(write, b"train_iters: 7\n")
        os.close(write)
        argv = [*DATA, "--config", f"/dev/fd/{read}"]
        assert [parse(argv, routers=routers).train.train_iters for _ in range(2)] == [7, 7]

    def test_an_empty_name_of_the_file_itself(self, routers):
        (problem,) = problems_of(routers, *DATA, "--config", "")
        assert problem.rule == "needs a file name"

    def test_only_paths_are_filled_in(self, routers):
        assert parse([*DATA, "--wandb-project", "$x"], routers=routers).logging.wandb_project == "$x"

    def test_a_blend_in_one_text(self, routers, write):
        path = write('data_path: "0.3 my/a 0.7 my/b"\n')
        assert parse(["--config", path], routers=routers).data.data_path == ("0.3", "my/a", "0.7", "my/b")
        assert parse(["--data-path", "my data/a"], routers=routers).data.data_path == ("my data/a",)
