"""What a run measures: the records of a step and of an evaluation, and the file that keeps them.

The names are part of the public interface: scripts read ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hyperrouter.data.stream.dataset import Dataset
from megatron_hyperrouter.data.stream.loader import Batches
from megatron_hyperrouter.engines.base import Engine, EvalResult, StepResult
from megatron_hyperrouter.errors import DataError, HyperRouterError

Record = dict[str, float | int | str | None]


def training_record(
    result: StepResult,
    *,
    step: int,
    learning_rate: float,
    topk: int,
    tokens: int,
    consumed: tuple[int, int],
    step_time: float,
    data_time: float,
) -> Record:
    """The record of step ``step``, counted from 1.

    ``tokens`` of this step; ``consumed``: samples and tokens of all steps so far; ``step_time`` in seconds,
    ``data_time`` the part of it in which this rank waited for its batches; ``N`` in ``router/entropy/N`` a
    MoE layer from 1.
    """
    record: Record = {
        "step": step,
        "lm_loss": result.lm_loss,
        "aux_loss": result.aux_loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "topk": topk,
        "consumed_samples": consumed[0],
        "consumed_tokens": consumed[1],
        "step_time": step_time,
        "data_time": data_time,
        "tokens_per_second": tokens / step_time,
    }
    for name, values_L in (
        ("entropy", result.entropy_L),
        ("load_max_over_mean", result.load_max_over_mean_L),
    ):
        layers = result.moe_layers or range(1, len(values_L) + 1)
        record |= {f"router/{name}/{layer}": value for layer, value in zip(layers, values_L, strict=True)}
    return record


def evaluation_record(result: EvalResult, *, step: int, split: str, topk: int) -> Record:
    """Loss in nats per token, its exponential, and bits per UTF-8 byte of the targets (None where bytes are
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


def score(
    engine: Engine,
    dataset: Dataset,
    *,
    topk: int,
    micro_batch_size: int,
    num_batches: int | None = None,
    token_bytes_V: Tensor | None = None,
) -> EvalResult:
    """Evaluate the first ``num_batches`` micro-batches of each rank, all whole ones when None, with ``topk``
    experts (collective).

    Always the same samples, so that the losses of two evaluations can be compared.
    """
    place = engine.place
    together = micro_batch_size * place.data_size
    whole = len(dataset) // together
    if whole < 1:
        raise DataError(
            f"the split has {len(dataset)} samples; an evaluation needs {together}: {micro_batch_size} for "
            f"each of {place.data_size} ranks",
            remedy="give it a larger share with --split, or use a smaller --micro-batch-size or --seq-length",
        )
    with Batches(
        dataset,
        micro_batch_size=micro_batch_size,
        global_batch_size=together,
        data_rank=place.data_rank,
        data_size=place.data_size,
        start_step=0,
        num_steps=whole if num_batches is None else min(num_batches, whole),
        num_workers=0,
    ) as batches:
        return engine.evaluate(batches, topk=topk, token_bytes_V=token_bytes_V)


def check_finite(record: Record, *, remedy: Callable[[], str]) -> None:
    """Stop a run whose loss or gradient is lost: its weights are, too, and must not become a checkpoint."""
    for name in ("lm_loss", "grad_norm"):
        value = record[name]
        if not isinstance(value, float) or not math.isfinite(value):
            raise HyperRouterError(
                f"step {record['step']}: {name} is {value}; the run stops before it saves such weights",
                remedy=remedy(),
            )


def to_json(record: Mapping[str, Any]) -> str:
    """One JSON object on one line, floats so that they read back equal; what JSON has no number for (nan,
    inf) is null.
    """
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(plain, allow_nan=False)


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, on disk as far as the last whole line whenever the process
    dies.
    """

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
            raise HyperRouterError(
                f"{self.path} cannot be written: {error}",
                remedy="make room on that disk, then continue with --load RUN_DIR",
            ) from error

    def cut_after(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that a kill left half-written; atomic."""
        kept = self.path.with_name(f".{self.path.name}-kept")
        self._file.close()
        with self.path.open("rb") as old, kept.open("wb") as new:
            new.writelines(line for line in old if _is_kept(line, step))
            new.flush()
            os.fsync(new.fileno())
        os.replace(kept, self.path)
        self._file = self.path.open("a")

    def sync(self) -> None:
        """Put the file on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
