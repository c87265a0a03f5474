"""help/: what ``--help`` shows, at the terminal's width, without torch."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.help.router_listing import listed_routers
from megatron_hyperrouter.config.help.text import help_text
from megatron_hyperrouter.config.leaves import router_leaves, tree_leaves
from megatron_hyperrouter.errors import ConfigError


class TestHelp:
    def text(self, routers, capsys) -> str:
        with pytest.raises(SystemExit) as leaving:
            parse(["--help"], routers=routers, prog="train.py")
        assert leaving.value.code == 0
        return capsys.readouterr().out

    def test_every_flag_is_there_once_with_its_help(self, routers, capsys):
        text = self.text(routers, capsys)
        flat = " ".join(text.split())
        assert "usage: train.py" in text
        for leaf in tree_leaves().values():
            lines = [line for line in text.splitlines() if re.match(rf"  {leaf.flag}(?:[ ,]|$)", line)]
            assert len(lines) == 1, leaf.flag
            meaning, _, default = " ".join(leaf.help.split()).partition("; default: ")
            assert f"{meaning} (" in flat
            assert f"default: {default}" in flat
        assert text.index("examples:") < text.index("--num-layers")

    @pytest.mark.parametrize("columns", [60, 80, 100, 120, 250])
    def test_it_fits_the_terminal(self, routers, capsys, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, self.text(routers, capsys).splitlines())) < min(columns, 120)

    def test_the_value_of_a_flag_has_a_name_that_says_what_it_is(self, routers):
        text = help_text(routers, prog="train")
        for leaf in tree_leaves().values():
            if leaf.is_path:
                assert re.search(rf"^  {leaf.flag} (FILE|DIR|PREFIX)\b", text, flags=re.M), leaf.flag
        assert "  --rampup-batch-size START INCREMENT SAMPLES\n" in text
        assert "  --alarm NAME=ACTION [NAME=ACTION ...]\n" in text

    def test_a_long_list_of_choices_is_not_cut_inside_a_name(self, routers):
        for width in (60, 80, 120):
            words = set(re.split(r"[^A-Za-z0-9_-]+", help_text(routers, prog="train", width=width)))
            assert {str(each) for leaf in tree_leaves().values() for each in leaf.choices} <= words

    @pytest.mark.parametrize(
        ("topic", "there", "missing"),
        [
            (["data"], "--data-path", "--num-layers"),
            (["router", "hyper"], "--router.hypernet-width", "--router.init-std"),
            (["router.hyper"], "--router.hypernet-width", "--router.init-std"),
            (["router"], "--router.name", "--num-layers"),
        ],
    )
    def test_one_section(self, routers, topic, there, missing):
        text = help_text(routers, prog="train", topic=topic)
        assert there in text
        assert missing not in text

    def test_a_section_that_there_is_not(self, routers):
        with pytest.raises(ConfigError, match="did you mean --help optimizer"):
            help_text(routers, prog="train", topic=["optimiser"])

    def test_every_router_lists_its_own_options(self, routers, capsys):
        text = self.text(routers, capsys)
        hyper, plain = text.split("router hyper: A generated router.")[1].split(
            "router plain: A trained router."
        )
        assert "--router.hypernet-width" in hyper and "{width,paper}" in hyper and "default: width" in hyper
        assert "--router.init-std" in plain and "--router.init-std" not in hyper

    def test_options_that_many_routers_have_are_explained_once(self):
        text = help_text(listed_routers(), prog="train")
        flat = " ".join(text.split())
        for flag in ("--router.lr-mult", "--router.jitter-eps"):
            assert len(re.findall(rf"^  {flag} ", text, flags=re.M)) == 1
        also = flat.split("router topk: ")[1].split("router xmoe: ")[0]
        assert "Also these options of router hyper: " in also and "--router.jitter-eps" in also
        one = help_text(listed_routers(), prog="train", topic=["router", "topk"])
        assert "--router.lr-mult X" in one and "--router.jitter-eps X" in one

    def test_it_wins_over_problems_and_one_rank_speaks(self, routers, capsys, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit):
            parse(["--no-such-flag", "-h"], routers=routers)
        assert capsys.readouterr().out == ""


def test_help_says_of_the_routers_what_their_files_say():
    """Read from the sources, without importing them, it is what importing them gives."""
    from megatron_hyperrouter.routers import ROUTERS

    listed = listed_routers()
    assert sorted(listed) == sorted(ROUTERS)
    for name, router in ROUTERS.items():
        assert router_leaves(listed[name].Config) == router_leaves(router.Config)
        assert inspect.cleandoc(router.__doc__ or "") == listed[name].__doc__


def test_a_router_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(
        'class Mine(Router, name="mine"):\n    class Config:\n        width: torch.Tensor = 1\n'
    )
    with pytest.raises(ValueError, match=r"mine\.py"):
        listed_routers(tmp_path)


def test_help_takes_less_than_a_second_of_cpu_and_no_torch(tmp_path):
    program = (
        "import resource, sys; from megatron_hyperrouter.commands.training.train import main\n"
        "main(['--help'])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert 'torch' not in sys.modules\n"
        "assert used.ru_utime + used.ru_stime < 1, used"
    )
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=folder, stdout=PIPE)
    assert b"--router.hypernet-width" in done.stdout
