"""A plan as text for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_hyperrouter.planning.held.memory import PARTS
from megatron_hyperrouter.planning.plan import GIB, Plan, PlannedLayout

_SIZES = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("EP", "expert_model_parallel_size"),
    ("ETP", "expert_tensor_parallel_size"),
    ("DP", "data_parallel_size"),
)
_MOST_REASONS = 8
_LEGEND = (
    "optimizer: how the ranks divide the optimizer state (ZeRO-N: ZeRO stage N; sharded: by the "
    "distributed\noptimizer; replicated: not divided).\n"
    "micro: micro-batch size. GiB: predicted memory of the rank that needs the most.\n"
    "s / step and tokens/s: predicted step time, and predicted speed of all GPUs together."
)


def text_of(plan: Plan, *, top: int, command: str) -> str:
    """The ``top`` layouts, the memory of the first by part, what was assumed, what was refused, and the
    command that starts the first.
    """
    fitting = plan.fitting
    parts = [_head(plan), _table(fitting[:top])]
    if fitting:
        parts += [_first(fitting[0])]
    parts += [_refusals(plan), "Assumptions:\n" + _lines(plan.machine.assumptions())]
    if fitting:
        parts += ["To train with layout 1, run:\n" + command]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    size = plan.model.size
    first = plan.layouts[0].candidate.config
    k = first.model.moe_router_topk
    return (
        f"{size.total:,} parameters, {size.active(k):,} active at k = {k}; "
        f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''} with {plan.machine.memory / 1e9:.4g} GB "
        f"({plan.machine.memory / GIB:.1f} GiB) of memory{' each' if plan.gpus > 1 else ''}; "
        f"each step has {first.train.global_batch_size:,} samples of "
        f"{first.model.seq_length:,} tokens.\n"
        f"{len(plan.layouts)} {'layout is' if len(plan.layouts) == 1 else 'layouts are'} "
        f"valid; {len(plan.fitting) or 'none'} of them "
        f"{'fits' if len(plan.fitting) < 2 else 'fit'} in memory."
    )


def _table(rows: Sequence[PlannedLayout]) -> str:
    heads = [
        "",
        "engine",
        *(name for name, _ in _SIZES),
        "optimizer",
        "recompute",
        "micro",
        "GiB",
        "s / step",
    ]
    body = [[*heads, "tokens/s", "dry run, GiB"]]
    for number, row in enumerate(rows, start=1):
        layout = row.candidate.layout()
        sharded = f"ZeRO-{layout['zero_stage']}" if "zero_stage" in layout else _distributed(layout)
        verified = max((run["peak_bytes"] for run in row.verified), default=None)
        body.append(
            [
                str(number),
                str(layout["engine"]),
                *(str(layout[name] or 1) for _, name in _SIZES),
                sharded,
                str(layout["recompute_granularity"] or "no"),
                str(layout["micro_batch_size"]),
                f"{row.use.total / GIB:.1f}",
                f"{row.seconds:.3g}",
                f"{row.tokens_per_second:,.0f}",
                "" if verified is None else f"{verified / GIB:.1f}",
            ]
        )
    if not any(line[-1] for line in body[1:]):
        body = [line[:-1] for line in body]
    return f"{aligned(body)}\n{_LEGEND}" if rows else "No layout fits in memory."


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads, words to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _distributed(layout: dict[str, object]) -> str:
    return "sharded" if layout["use_distributed_optimizer"] else "replicated"


def _first(row: PlannedLayout) -> str:
    memory = [f"{name} {getattr(row.use, name) / GIB:.2f}" for name in PARTS]
    counts = sorted(set(row.parameters))
    ranks = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return (
        f"Layout 1, predicted memory in GiB on the rank that needs the most: {', '.join(memory)}.\n"
        f"Layout 1, parameters per rank: {ranks}.\n"
        f"Layout 1, predicted seconds per step: {times_of(row)}."
    )


def times_of(row: PlannedLayout) -> str:
    """The parts of the step time."""
    names = {
        "compute": "computation",
        "inside": "communication inside nodes",
        "outside": "communication between nodes",
        "latency": "message latency",
    }
    return ", ".join(f"{names[name]} {value:.3g}" for name, value in row.times.items())


def _refusals(plan: Plan) -> str:
    if not plan.refused:
        return ""
    reasons = Counter(cause for each in plan.refused for cause in each.causes)
    shown = [
        f"{count} layout{'s' if count > 1 else ''}: {reason}"
        for reason, count in reasons.most_common(_MOST_REASONS)
    ]
    left = len(reasons) - len(shown)
    more = (
        [f"and {left} other reason{'s' if left > 1 else ''} (use --json FILE to see all)"] if left > 0 else []
    )
    count = len(plan.refused)
    several = ", some for several reasons" if any(len(each.causes) > 1 for each in plan.refused) else ""
    head = f"{'1 layout is' if count == 1 else f'{count} layouts are'} ruled out{several}"
    return f"{head}:\n" + _lines([*shown, *more])


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(f"  {text}" for text in texts)
