"""The metrics of a run: the table of a step's metrics, their records, and the file that they are written
to.

A metric of a step is one entry of ``METRICS``: its name in ``metrics.jsonl``, its group in TensorBoard,
its value, and its format on the console.  Numbers of each MoE layer are in ``engines.statistics``. The
names are part of the public interface, because scripts read ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_hyperrouter import files
from megatron_hyperrouter.data.stream.dataset import Dataset, Sample
from megatron_hyperrouter.data.stream.loader import Batches
from megatron_hyperrouter.engines.base import Batch, Engine, EvalResult, RankPlace, StepResult
from megatron_hyperrouter.errors import DataError, HyperRouterError

Value = float | int | str | None
Record = dict[str, Value]
_BETWEEN_STOPS = 16  # micro-batches of an evaluation
_UNCOUNTED = -1  # as in model.loss: a label below 0 counts nowhere


@dataclass(frozen=True)
class StepFacts:
    """What is known about a step once it is complete."""

    step: int  # counted from 1
    result: StepResult
    learning_rate: float
    topk: int
    tokens: int  # of this step
    consumed: tuple[int, int]  # samples and tokens of all steps so far
    step_time: float  # seconds
    data_time: float  # the part of it in which this rank waited for its batches
    devices: int  # ranks, each with a separate device
    flops: float = 0.0  # of the model, forward and backward; 0: not known
    peak_flops: float | None = None  # FLOP per second of one device; None: not known


@dataclass(frozen=True)
class Metric:
    """One number of a step; if its ``value`` is None, the step has no such number."""

    name: str
    group: Literal["", "train", "speed", "router"]  # of TensorBoard's tags; "": no tag
    value: Callable[[StepFacts], Value]
    line: Callable[[float], str] | None = None  # how the console shows it; None: not at all
    # Of the steps since the last line: their mean, the mean weighted with their times, or the last of them.
    over: Literal["steps", "time", "last"] = "last"


def _tflops(facts: StepFacts) -> float | None:
    return facts.flops / facts.step_time / facts.devices / 1e12 if facts.flops else None


def _mfu(facts: StepFacts) -> float | None:
    tflops = _tflops(facts)
    return None if tflops is None or facts.peak_flops is None else tflops * 1e12 / facts.peak_flops


METRICS: tuple[Metric, ...] = (
    Metric("step", "", lambda facts: facts.step),
    Metric("skipped", "", lambda facts: None if facts.result.applied else True),
    Metric("lm_loss", "train", lambda facts: facts.result.lm_loss, lambda v: f"loss {v:.4f}", "steps"),
    Metric("aux_loss", "train", lambda facts: facts.result.aux_loss),
    Metric("z_loss", "train", lambda facts: facts.result.z_loss),
    Metric(
        "grad_norm",
        "train",
        lambda facts: facts.result.grad_norm,
        lambda v: f"norm {v:.2f}" if v >= 0.1 else f"norm {v:.1e}",
        "steps",
    ),
    Metric("params_norm", "train", lambda facts: facts.result.params_norm),
    Metric("num_zeros", "train", lambda facts: facts.result.num_zeros),
    Metric("learning_rate", "train", lambda facts: facts.learning_rate, lambda v: f"lr {v:.2e}"),
    Metric("topk", "train", lambda facts: facts.topk, lambda v: f"k {v:.0f}"),
    Metric("consumed_samples", "train", lambda facts: facts.consumed[0]),
    Metric("consumed_tokens", "train", lambda facts: facts.consumed[1]),
    Metric("step_time", "speed", lambda facts: facts.step_time),
    Metric("data_time", "speed", lambda facts: facts.data_time),
    Metric(
        "tokens_per_second",
        "speed",
        lambda facts: facts.tokens / facts.step_time,
        lambda v: f"{v:,.0f} tokens/s",
        "time",
    ),
    Metric(
        "tflops_per_gpu",
        "speed",
        _tflops,
        lambda v: f"{v:.1f} TFLOP/s" if v >= 0.1 else f"{1000 * v:.1f} GFLOP/s",
        "time",
    ),
    Metric("mfu", "speed", _mfu, lambda v: f"MFU {v:.1%}", "time"),
    Metric(
        "peak_memory",
        "speed",
        lambda facts: facts.result.peak_memory,
        lambda v: f"{v / 2**30:.2f} GiB",
    ),
)

# Layer metrics on the console: over the steps since its last line, and then over layers.
_LAYERS_ON_THE_LINE: tuple[tuple[str, Callable[[Sequence[float]], float], str], ...] = (
    ("entropy", lambda values: sum(values) / len(values), "entropy {:.2f}"),
    ("load_max_over_mean", max, "load {:.2f}"),
)
# Of the layer metrics, those that every step records; the others are recorded every --log-interval steps.
_EVERY_STEP = ("entropy", "load_max_over_mean")
# Of single layers: the record has the means of the losses; alarms watch the shares.
_NOT_RECORDED = ("aux", "z", "dead_share", "effective_experts")


def training_record(facts: StepFacts, *, with_all_layers: bool) -> Record:
    """The record of a step; ``N`` in ``router/entropy/N`` is a MoE layer, counted from 1.

    ``with_all_layers``: also the layer metrics that are recorded every ``--log-interval`` steps.
    """
    values = ((metric.name, metric.value(facts)) for metric in METRICS)
    record: Record = {name: value for name, value in values if value is not None}
    for name, values_L in facts.result.layers.items():
        if name in _EVERY_STEP or (with_all_layers and name not in _NOT_RECORDED):
            layers = facts.result.moe_layers or range(1, len(values_L) + 1)
            record |= {f"router/{name}/{layer}": value for layer, value in zip(layers, values_L, strict=True)}
    return record


def evaluation_record(result: EvalResult, *, step: int, split: str, topk: int) -> Record:
    """Loss in nats per token, its exponential, and bits per UTF-8 byte of the targets (None if bytes are
    unknown).
    """
    loss = result.loss_sum / result.tokens
    return {
        "step": step,
        "split": split,
        "topk": topk,
        "lm_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": result.loss_sum / math.log(2) / result.target_bytes if result.target_bytes else None,
    }


def summary(records: Sequence[Record]) -> list[str]:
    """What the console shows of the steps since its last line, the most important first."""
    pieces: dict[str, list[str]] = {"train": [], "router": [], "speed": []}
    for metric in METRICS:
        if metric.line is not None and metric.name in records[-1]:
            pieces[metric.group].append(metric.line(_over(metric, records)))
    for name, over_layers, form in _LAYERS_ON_THE_LINE:
        if layers := [key for key in records[-1] if key.startswith(f"router/{name}/")]:
            means_L = [sum(_number(record, key) for record in records) / len(records) for key in layers]
            pieces["router"].append(form.format(over_layers(means_L)))
    return [piece for group in pieces.values() for piece in group]


def tags(record: Record) -> dict[str, float | int]:
    """The numbers of a record as TensorBoard and Weights & Biases name them, in groups: ``train/lm_loss``,
    ``speed/step_time``, ``router/entropy/1``, ``eval/valid/lm_loss``.
    """
    groups = {metric.name: metric.group for metric in METRICS}
    split = record.get("split")
    found: dict[str, float | int] = {}
    for name, value in record.items():
        if isinstance(value, str) or value is None or name == "step":
            continue
        if split is not None:
            found[f"eval/{split}/{name}"] = value
        elif name.startswith("router/"):
            found[name] = value
        elif group := groups.get(name, "train"):
            found[f"{group}/{name}"] = value
    return found


def _over(metric: Metric, records: Sequence[Record]) -> float:
    if metric.over == "last":
        return _number(records[-1], metric.name)
    weights = [_number(record, "step_time") if metric.over == "time" else 1.0 for record in records]
    values = [_number(record, metric.name) for record in records]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _number(record: Record, name: str) -> float:
    value = record.get(name)
    return float(value) if value is not None else math.nan


def score(
    engine: Engine,
    dataset: Dataset,
    *,
    topk: int,
    micro_batch_size: int,
    num_samples: int | None = None,
    token_bytes_V: Tensor | None = None,
    unscored: Callable[[int], int] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Evaluate the first ``num_samples`` samples (None: all) with ``topk`` experts (collective).

    The same samples are scored each time, each once, with any micro-batch size and number of ranks, so
    that the losses of two evaluations can be compared.  If the last micro-batches are not full, the padding
    is not counted, and nor are the first ``unscored(i)`` labels of sample ``i``.

    ``stop`` is called from time to time; if it returns True (on all ranks), the rest is skipped.
    """
    place = engine.place
    scored = len(dataset) if num_samples is None else min(num_samples, len(dataset))
    if scored < 1:
        raise DataError(
            "the split has no samples to evaluate",
            remedy="give the split more data, for example a larger share in --split, or use a smaller "
            "--seq-length",
        )
    together = micro_batch_size * place.data_size
    rounds = -(-scored // together)
    with Batches(
        _FilledUp(dataset, scored, rounds * together),
        micro_batch_size=micro_batch_size,
        global_batch_size=together,
        data_rank=place.data_rank,
        data_size=place.data_size,
        start_step=0,
        num_steps=rounds,
        num_workers=0,
    ) as batches:
        counted = _counted(batches, scored, micro_batch_size, place, unscored)
        return engine.evaluate(_until(stop, counted), topk=topk, token_bytes_V=token_bytes_V)


class _FilledUp:
    """The first ``scored`` samples of a dataset, and the first one again up to ``size``."""

    def __init__(self, dataset: Dataset, scored: int, size: int) -> None:
        self._dataset, self._scored, self._size = dataset, scored, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Sample:
        return self._dataset[i if i < self._scored else 0]


def _until(stop: Callable[[], bool], batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same micro-batches, until ``stop`` says True."""
    for number, batch in enumerate(batches, start=1):
        yield batch
        if number % _BETWEEN_STOPS == 0 and stop():
            return


def _counted(
    batches: Iterator[Batch],
    scored: int,
    micro_batch_size: int,
    place: RankPlace,
    unscored: Callable[[int], int] | None,
) -> Iterator[Batch]:
    """The same micro-batches, without the labels of padding and of tokens that are not to be scored."""
    for number, (tokens_BS, labels_BS) in enumerate(batches):
        first = (number * place.data_size + place.data_rank) * micro_batch_size
        labels_BS[max(scored - first, 0) :] = _UNCOUNTED
        if unscored is not None:
            for row in range(min(max(scored - first, 0), labels_BS.size(0))):
                labels_BS[row, : unscored(first + row)] = _UNCOUNTED
        yield tokens_BS, labels_BS


def to_json(record: Mapping[str, Any]) -> str:
    """One JSON object on one line. Floats can be read back exactly; nan and inf, which JSON does not have,
    become null.
    """
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(plain, allow_nan=False)


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line; if the process dies, all complete lines are on disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; it reaches the system before this returns."""
        try:
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def cut_after(self, step: int) -> None:
        """Atomically remove the lines of later steps, and a last line that a kill left half-written. Removed
        lines are added to ``metrics-earlier.jsonl``.
        """
        self._file.close()
        try:
            if self.path.is_file():  # a link may lead to a device, which keeps no lines
                self._rewrite(step)
            self._file = self.path.open("a")
        except OSError as error:
            raise self._unwritable(error) from error

    def _rewrite(self, step: int) -> None:
        whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        kept = [line for line in whole if _is_kept(line, step)]
        if len(kept) < len(whole):
            with self.path.with_name("metrics-earlier.jsonl").open("ab") as earlier:
                earlier.writelines(line for line in whole if not _is_kept(line, step))
                earlier.flush()
                os.fsync(earlier.fileno())
        files.write_bytes(self.path.resolve(), b"".join(kept), durable=True)  # a link stays a link

    def _unwritable(self, error: OSError) -> HyperRouterError:
        remedy = "free up space on that disk, then continue with --load RUN_DIR"
        return HyperRouterError(f"{self.path} cannot be written: {error}", remedy=remedy)

    def sync(self) -> None:
        """Put the file on disk."""
        if self.path.is_file():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()


def scored_splits(path: Path, step: int) -> set[str]:
    """The splits for which a metrics file has a score after ``step`` steps."""
    found = set()
    with contextlib.suppress(OSError), path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(line)
                if record["step"] == step:
                    found.add(str(record["split"]))
    return found


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
