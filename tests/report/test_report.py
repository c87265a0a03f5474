"""The report page: the same bytes for the same files, nothing loaded from elsewhere, and the
files' numbers.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.report_folders import write_analysis, write_comparison, write_finetuning, write_run, write_scaling

from megatron_hyperrouter.commands.studies import report as report_command
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.report.build import write_report
from megatron_hyperrouter.report.comparisons import pareto
from megatron_hyperrouter.report.figures import Drawing, smoothed, thinned

VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Tables, ids and links of a page; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids.update([found["id"]] if found.get("id") else [])
        self.links += [found[key] or "" for key in ("href", "src", "xlink:href") if key in found]
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)

    def row(self, *start: str) -> list[str]:
        """The first row that begins with these cells."""
        return next(row for row in self.rows if row[: len(start)] == list(start))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("report")
    run = write_run(home / "first")
    write_analysis(run / "analysis.json")
    return {
        "run": run,
        "other": write_run(home / "second", name="topk"),
        "compare": write_comparison(home / "compare"),
        "finetune": write_finetuning(home / "sst2"),
        "scaling": write_scaling(home / "scaling"),
    }


@pytest.fixture(scope="module")
def text(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("page") / "report.html"
    write_report(list(folders.values()), target)
    return target.read_text(encoding="utf-8")


def test_the_same_files_give_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report([folders["run"], folders["compare"]], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_it_stands_alone(text: str) -> None:
    page = Page(text)
    assert not page.open
    assert "<script" not in text.lower() and "@import" not in text and "url(http" not in text
    assert all(link.startswith(("#", "data:")) for link in page.links)
    inside = {link[1:] for link in page.links if link.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert inside and inside <= set(page.ids)
    assert max(page.ids.values()) == 1
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) > 12
    for svg in svgs:
        ElementTree.fromstring(svg)


def test_a_run(folders: dict[str, Path], tmp_path: Path) -> None:
    write_report([folders["run"]], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.row("state") == ["state", "finished"]
    assert page.row("last validation loss")[1] == "0.1333 nats per token, 1.2345 bits per byte (k = 2)"
    assert page.row("training tokens")[1] == "1,920" and page.row("alarms")[1] == "1"
    assert page.row("first", "alarm") == ["first", "alarm", "7", "1.0", "name collapse, layer 2"]
    assert page.row("2", "1")[2:4] == ["1.200", "0.800"]  # of analysis.json in the folder
    assert "&lt;b&gt;" in text and "<b>" not in text  # settings are text, not HTML
    assert {"Loss", "Routing in training", "Similarity of experts", "Router and Jacobian", "Speed"} <= set(
        page.titles
    )


def test_two_runs_show_what_differs(folders: dict[str, Path], tmp_path: Path) -> None:
    write_report([folders["run"], folders["other"]], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.row("router.name") == ["router.name", "hyper", "topk"]
    assert not [row for row in page.rows if row[:1] == ["hidden_size"]]


def test_paths_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As in ``A/x/run B/x/run``: as many folders above as it takes, for runs and for files."""
    runs = [write_run(tmp_path / side / "x/run", name=name) for side, name in (("A", "hyper"), ("B", "topk"))]
    files = []
    for side, loss in (("A", 1.5), ("B", 2.5)):
        files.append(tmp_path / side / "x/evaluation.json")
        row = {"topk": 2, "lm_loss": loss, "perplexity": 9.0, "bits_per_byte": None}
        files[-1].write_text(json.dumps({"results": [row]}))
    write_report([*runs, *files], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert ["A/x/run", "B/x/run"] in page.rows  # the heads of a table
    assert page.row("router")[1:] == ["hyper", "topk"]
    assert page.row("A/x/evaluation")[2] == "1.5000" and page.row("B/x/evaluation")[2] == "2.5000"


def test_verdicts_of_a_comparison(text: str) -> None:
    """0.2 with a spread of 0.01 is plain to see; a level control is not told from it."""
    page = Page(text)
    better, level = page.row("hyper minus plain"), page.row("hyper minus control")
    assert better[1:3] == ["1", "4"] and better[5] == "hyper is better"
    differences = [
        -0.2 + 0.01 * (math.sin(3 * seed + len("hyper")) - math.sin(3 * seed + len("plain")))
        for seed in range(4)
    ]
    assert float(better[3].split(" ± ")[0]) == pytest.approx(sum(differences) / 4, abs=6e-5)
    assert level[5] == "no difference shown" and float(level[4]) > 0.05
    assert page.row("control", "4")[2].startswith("1.70")
    assert "control is the control: a random router" in html.unescape(text)


def test_transfer_and_scaling(text: str) -> None:
    page = Page(text)
    assert page.row("sst2", "test", "2")[3:5] == ["2", "0.7200 ± 0.0000"]
    assert page.row("all runs", "-", "alpha")[3:5] == ["0.31", "0.2 to 0.4"]
    assert page.row("topk", "2")[-1] == "too few sizes"


def test_a_run_without_steps_and_a_half_written_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", steps=2)
    (run / "metrics.jsonl").write_text("")
    write_report([run], tmp_path / "r.html")
    assert "No optimizer step has been recorded yet." in (tmp_path / "r.html").read_text()
    whole = json.dumps({"step": 1, "lm_loss": None, "topk": 1})  # a step that was left out
    (run / "metrics.jsonl").write_text(f'{whole}\n{{"step": 2, "lm_lo')
    write_report([run], tmp_path / "r.html")
    assert Page((tmp_path / "r.html").read_text()).row("steps taken")[1] == "1"


def test_an_event_without_a_usable_time_has_no_minutes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", steps=2)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "odd", "time": "noon"}\n{"event": "none"}\n')
    write_report([run], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert page.row("new", "alarm")[3] == "1.0"
    assert page.row("new", "odd")[3] == page.row("new", "none")[3] == "-"


def test_losses_that_are_not_finite_are_dashes(tmp_path: Path) -> None:
    """In the files, they are null."""
    run = write_run(tmp_path / "run", steps=2)
    score = {"topk": 2, "lm_loss": None, "perplexity": None, "bits_per_byte": None}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "split": "valid", **score}) + "\n")
    (run / "evaluation.json").write_text(json.dumps({"results": [score]}))
    write_report([run], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert page.row("last validation loss")[1] == "- nats per token (k = 2)"
    assert page.row("run", "2")[2:5] == ["-", "-", "-"]


def test_names_that_matplotlib_would_read_as_markup(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    names = ["_first", "a$^$b", "日本"]
    write_report([write_run(tmp_path / name, steps=2) for name in names], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(f">{name}, training</text>" in text for name in names)
    assert not list(recwarn)


def test_ticks_of_a_logarithmic_axis_are_powers() -> None:
    svg = Drawing().draw(lambda axes: axes.loglog([1e3, 1e9], [2.0, 3.0], label="a"))
    assert not re.search(r"<(text|tspan)[^>]*>\$", svg)


def test_other_files_in_a_run_folder(tmp_path: Path) -> None:
    """evaluation.json counts, whatever else is there."""
    run = write_run(tmp_path / "run", steps=2)
    for name, loss in (("evaluation", 1.5), ("other", 2.5)):
        row = {"topk": 7, "lm_loss": loss, "perplexity": 9.0, "bits_per_byte": None}
        (run / f"{name}.json").write_text(json.dumps({"results": [row]}))
    (run / "notes.json").write_text("{")
    write_report([run], tmp_path / "r.html")
    assert Page((tmp_path / "r.html").read_text()).row("run", "7")[2] == "1.5000"
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        write_report([run], tmp_path / "r.html")


@pytest.mark.parametrize("content", ["[1]", '{"results": [1]}', '{"results": {"a": 1}}'])
def test_results_of_another_program_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match="must be the folder of a run or of a study"):
        write_report([tmp_path], tmp_path / "r.html")


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_an_output_that_is_no_file_is_refused_and_stays(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=rf"--output = .*{name}: is not a file"):
        report_command.main([str(run), "--output", str(tmp_path / name)])
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe", "run"]
    assert (tmp_path / "pipe").is_fifo()


def test_refusals_name_every_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text('{"results": 3}')
    with pytest.raises(ConfigError) as raised:
        write_report([tmp_path / "empty", tmp_path / "gone", tmp_path / "odd.json"], tmp_path / "r.html")
    rules = [problem.rule for problem in raised.value.problems]
    assert rules == [
        "must be the folder of a run or of a study with finished runs, but is not",
        "must be an existing file or folder",
        "must be an output file of mhr evaluate or mhr analyze, but is not",
    ]
    assert not (tmp_path / "r.html").exists()


def test_pareto() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0)]
    assert pareto(points) == [(1.0, 5.0), (2.0, 4.0), (4.0, 1.0)]


def test_lines_of_long_runs() -> None:
    assert smoothed([1.0, math.nan, 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]
    x, y = thinned(list(range(10_001)), list(range(10_001)))
    assert len(x) <= 802 and x[0] == 0 and x[-1] == 10_000 and x == y
