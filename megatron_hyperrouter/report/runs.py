"""Chapters about training runs: one run by itself, or several in the same plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from megatron_hyperrouter.report.figures import Drawing, Line, lines, smoothed, thinned
from megatron_hyperrouter.report.findings import analysis_chapters, cell, quality_chapter
from megatron_hyperrouter.report.page import Section
from megatron_hyperrouter.report.sources import TrainingRun, names_of

_MOST_LAYERS = 8  # a plot shows
_MOST_EVENTS = 200  # a table shows
_FACTS = (  # of a run's settings: what to call each, and its name
    ("engine", "engine"),
    ("layers", "num_layers"),
    ("hidden size", "hidden_size"),
    ("experts", "num_experts"),
    ("active experts k", "moe_router_topk"),
    ("schedule of k", "topk_schedule"),
    ("sequence length", "seq_length"),
    ("global batch size", "global_batch_size"),
    ("planned steps", "train_iters"),
    ("learning rate", "lr"),
    ("seed", "seed"),
)


def chapters(runs: Sequence[TrainingRun], drawing: Drawing) -> list[Section]:
    """All chapters; a run is called by the name of its folder."""
    named = dict(zip(names_of([run.folder for run in runs]), runs, strict=True))
    found = [facts_chapter(named), loss_chapter(named, drawing), router_chapter(named, drawing)]
    for name, run in named.items():
        title = f" of {name}" if len(named) > 1 else ""
        if "evaluation" in run.extra:
            found.append(
                quality_chapter({name: run.extra["evaluation"]}, drawing, f"Quality against k{title}")
            )
        if "analysis" in run.extra:
            found += analysis_chapters(run.extra["analysis"], drawing, title)
    return [*found, speed_chapter(named, drawing), events_chapter(named), settings_chapter(named)]


def facts_chapter(named: Mapping[str, TrainingRun]) -> Section:
    """What was trained, and how it ended."""
    section = Section("Runs" if len(named) > 1 else "The run")
    rows: list[list[object]] = []
    for title, measure in _summary():
        rows.append([title, *(measure(run) for run in named.values())])
    for title, name in _FACTS:
        rows.append([title, *(shown(run.settings.get(name)) for run in named.values())])
    section.table(["", *named], rows, name="runs")
    return section


def _summary() -> list[tuple[str, Callable[[TrainingRun], str]]]:
    return [
        ("router", lambda run: str((run.settings.get("router") or {}).get("name", "hyper"))),
        ("state", state),
        ("steps taken", lambda run: str(run.steps[-1]["step"]) if run.steps else "0"),
        ("training tokens", lambda run: f"{run.steps[-1].get('consumed_tokens', 0):,}" if run.steps else "0"),
        ("training loss at the last step, nats per token", lambda run: cell(last(run, "lm_loss"), ".4f")),
        ("last validation loss", lambda run: last_score(run, "valid")),
        ("test loss", lambda run: last_score(run, "test")),
        ("alarms", lambda run: str(sum(event.get("event") == "alarm" for event in run.events))),
    ]


def state(run: TrainingRun) -> str:
    """How the last attempt ended, according to its events."""
    ends = {"end": "finished", "stop": "stopped on request", "failure": "failed"}
    for event in reversed(run.events):
        if event.get("event") in ends:
            return ends[str(event["event"])]
        if event.get("event") in ("start", "resume"):
            return "not finished"
    return "unknown"


def loss_chapter(named: Mapping[str, TrainingRun], drawing: Drawing) -> Section:
    """Training and validation loss, gradient norm, learning rate, and k."""
    section = Section("Loss")
    losses = {name: run.column("lm_loss") for name, run in named.items()}
    if not any(steps for steps, _ in losses.values()):
        section.text("No optimizer step has been recorded yet.")
        return section
    window = max(max(len(steps) for steps, _ in losses.values()) // 100, 1)

    def fill(axes: Any) -> None:
        series = {}
        for name, (steps, values) in losses.items():
            series[f"{name}, training"] = Line(*thinned(steps, smoothed(values, window)))
            valid = [record for record in named[name].evaluations if record["split"] == "valid"]
            if valid:
                steps = [float(record["step"]) for record in valid]
                scores = [math.nan if record["lm_loss"] is None else record["lm_loss"] for record in valid]
                series[f"{name}, validation"] = Line(steps, scores, style="--", marker="o")
        lines(axes, series, xlabel="step", ylabel="loss, nats per token")

    mean = "" if window == 1 else f" Each training loss is the mean of {window} steps."
    section.figure(drawing.draw(fill), f"Loss at each step.{mean}")
    panels = [("grad_norm", "gradient norm"), ("learning_rate", "learning rate"), ("topk", "k")]
    section.figure(
        _panels(named, panels, drawing),
        "Gradient norm before clipping, learning rate, and number of active experts k.",
    )
    return section


def _panels(named: Mapping[str, TrainingRun], panels: Sequence[tuple[str, str]], drawing: Drawing) -> str:
    def fill(axes: Any) -> None:
        for each, (measure, title) in zip(axes, panels, strict=True):
            series = {name: Line(*thinned(*run.column(measure))) for name, run in named.items()}
            lines(each, series, xlabel="step", ylabel=title)

    return drawing.draw(fill, size=(8.0, 2.6), grid=(1, len(panels)))


def router_chapter(named: Mapping[str, TrainingRun], drawing: Drawing) -> Section:
    """What was recorded of the routers while they trained."""
    section = Section("Routing in training")
    measures = (
        ("entropy", "entropy, nats"),
        ("logit_std", "logit std"),
        ("mutual_information", "mutual information, nats"),
        ("load_max_over_mean", "largest load / mean"),
        ("dead_experts", "dead experts"),
    )
    for name, run in named.items():
        if len(named) > 1:
            section.heading(name)
        present = [(measure, title) for measure, title in measures if run.layers(measure)]
        for first in range(0, len(present), 3):
            part = present[first : first + 3]
            section.figure(_layers(run, part, drawing, legend=first == 0))
    if section.parts:
        section.text(
            "For each layer, measured on training batches. Entropy: the entropy of the softmax of a "
            "token's logits over all experts. The entropy depends on the scale of the logits, so read "
            "it together with the logit std, the standard deviation of a token's logits. Mutual "
            "information: the mutual information between token and expert, which is 0 if the router "
            "scores are the same for every token. If both entropy and mutual information are low, the "
            "router has collapsed. An expert is dead if it has less than 5 % of the mean load."
        )
    return section


def _layers(run: TrainingRun, panels: Sequence[tuple[str, str]], drawing: Drawing, *, legend: bool) -> str:
    def fill(axes: Any) -> None:
        for number_of, (measure, title) in enumerate(panels):
            found = run.layers(measure)
            every = -(-len(found) // _MOST_LAYERS)
            series = {}
            for layer in found[::every]:
                steps, values = run.column(f"router/{measure}/{layer}")
                window = max(len(values) // 100, 1)
                series[f"layer {layer}"] = Line(*thinned(steps, smoothed(values, window), 300))
            lines(axes[number_of], series, xlabel="step", ylabel=title, legend=legend and number_of == 0)
        for empty in axes[len(panels) :]:
            empty.set_visible(False)

    return drawing.draw(fill, size=(8.0, 2.6), grid=(1, 3))


def speed_chapter(named: Mapping[str, TrainingRun], drawing: Drawing) -> Section:
    """How fast the steps were."""
    section = Section("Speed")
    rows: list[list[object]] = []
    for name, run in named.items():
        _, times = run.column("step_time")
        if times:
            memory = [value for value in run.column("peak_memory")[1] if math.isfinite(value)]
            rows.append(
                [
                    name,
                    f"{1e3 * statistics.median(times):,.1f}",
                    cell(middle(run, "tokens_per_second"), ",.0f"),
                    cell(middle(run, "tflops_per_gpu"), ".3g"),
                    f"{max(memory) / 2**30:.2f}" if memory else "-",
                    f"{sum(times) / 60:,.1f}",
                ]
            )
    heads = ["run", "step, ms", "tokens/s", "TFLOP/s per device", "peak memory, GiB", "all steps, minutes"]
    section.table(
        heads, rows, name="speed", note="Step time, tokens/s and TFLOP/s are medians over all steps."
    )
    if rows:
        panels = [("tokens_per_second", "tokens/s"), ("step_time", "step, s")]
        section.figure(_panels(named, panels, drawing))
    return section


def events_chapter(named: Mapping[str, TrainingRun]) -> Section:
    """What happened to the runs, saves left out."""
    section = Section("Events")
    rows: list[list[object]] = []
    for name, run in named.items():
        times = (event.get("time") for event in run.events)  # a damaged line may have a text or nothing
        numbers = [float(each) for each in times if isinstance(each, int | float)]
        began = numbers[0] if numbers else 0.0
        for event in run.events:
            if event.get("event") == "save":
                continue
            known = ("event", "time", "step", "attempt")
            rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known)
            now = event.get("time")
            minutes = f"{(now - began) / 60:.1f}" if isinstance(now, int | float) else "-"
            rows.append([name, event.get("event"), event.get("step"), minutes, rest])
    note = "Column minutes: time since the first event of the run."
    if len(rows) > _MOST_EVENTS:
        note += (
            f" The table shows the first {_MOST_EVENTS} of {len(rows)} events; events.jsonl has all of them."
        )
    heads = ["run", "event", "step", "minutes", "details"]
    section.table(heads, rows[:_MOST_EVENTS], name="events", note=note)
    return section


def settings_chapter(named: Mapping[str, TrainingRun]) -> Section:
    """All settings, to be opened; of several runs, those that differ as a table."""
    section = Section("Settings")
    flat = {name: flattened(run.settings) for name, run in named.items()}
    keys = sorted({key for each in flat.values() for key in each} - {"run_dir"})
    differ = [key for key in keys if len({str(each.get(key)) for each in flat.values()}) > 1]
    section.table(
        ["setting", *named], [[key, *(shown(each.get(key)) for each in flat.values())] for key in differ]
    )
    for name, run in named.items():
        if run.settings:
            section.hidden(f"config.yaml of {name}", yaml.safe_dump(dict(run.settings), sort_keys=False))
    return section


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the router's as ``router.NAME``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else None
        found |= {key: value} if inner is None else inner
    return found


def shown(value: object) -> str:
    """A setting in a cell."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def last(run: TrainingRun, name: str) -> float | None:
    """The last value that was recorded."""
    values = [value for value in run.column(name)[1] if math.isfinite(value)]
    return values[-1] if values else None


def middle(run: TrainingRun, name: str) -> float | None:
    """The median over the steps."""
    values = [value for value in run.column(name)[1] if math.isfinite(value)]
    return statistics.median(values) if values else None


def last_score(run: TrainingRun, split: str) -> str:
    """The last evaluation of a split, in words."""
    found = [record for record in run.evaluations if record["split"] == split]
    if not found:
        return "-"
    record = found[-1]
    bits = "" if record.get("bits_per_byte") is None else f", {record['bits_per_byte']:.4f} bits per byte"
    return f"{cell(record['lm_loss'], '.4f')} nats per token{bits} (k = {record['topk']})"
