"""Measure on one GPU how fast the engines are, compared with other code, and what takes the time.

The benchmark takes at most 8 minutes:

    python benchmarks/gpu.py --out DIR [--seconds 450] [--only WORD] [--tiny]

Each case is a separate process with a time limit.  The most important cases run first.  When the time is
up, the benchmark saves the finished cases: DIR/results.jsonl has one object per case, including failed
cases, and DIR/table.md has the table.  --tiny does the same on a CPU with toy sizes.

The first case is a plain matrix product and a plain copy on the GPU.  The other cases are whole training
steps in bfloat16 with 8192 tokens, of a model with one Mixtral-shaped layer and of a model with two
Qwen3-30B-shaped layers.  They compare hand-written torch (bfloat16 Adam), Qwen3-MoE of transformers, and
both engines: with grouped experts, with a loop over experts, and with router hyper instead of topk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _step_sides import ON_A_GPU, TINY_ON_A_GPU, Sizes

# Dense bfloat16 operations a second, by a word of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
GROUPED, LOOP = "--moe-grouped-gemm", "--no-moe-grouped-gemm"
SIDES = {  # name -> side of step.py, and a flag of ours
    "megatron": ("megatron:topk", GROUPED),
    "deepspeed": ("deepspeed:topk", GROUPED),
    "torch": ("floor", ""),
    "transformers": ("transformers", ""),
    "megatron hyper": ("megatron:hyper", GROUPED),
    "deepspeed hyper": ("deepspeed:hyper", GROUPED),
    "megatron loop": ("megatron:topk", LOOP),
    "deepspeed loop": ("deepspeed:topk", LOOP),
}
CASES = ["chip", *(f"{shape}: {side}" for shape in ON_A_GPU for side in SIDES)]
COLUMNS = ("seconds", "tokens_per_s", "tflops", "mfu", "peak_gib", "waits", "launches", "gpu_ms")


def run_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each case tells, as it comes."""
    begin = time.monotonic()
    for case in CASES:
        left = args.seconds - (time.monotonic() - begin)
        if left < args.least or args.only not in case:
            continue
        command = [sys.executable, __file__, "--case", case, "--out", args.out, *(["--tiny"] * args.tiny)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, args.limit))
        except subprocess.TimeoutExpired:
            yield {"case": case, "error": ["time limit"]}
            continue
        if done.returncode:
            yield {"case": case, "error": done.stderr.strip().splitlines()[-12:]}
        else:
            yield {"case": case, **json.loads(done.stdout.strip().splitlines()[-1])}


def measure(work: Callable[[], object], sizes: Sizes | None, *, steps: int = 8) -> dict[str, Any]:
    """Median seconds, throughput, memory, waits of the host by line, and the kernels of one more run."""
    import torch

    gpu = torch.cuda.is_available()
    wait: Callable[[], object] = torch.cuda.synchronize if gpu else lambda: None
    for _ in range(3):
        work()
    wait()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    told: dict[str, Any] = {"seconds": seconds, "least": min(times)}
    if sizes is not None:
        told |= {"tokens_per_s": sizes.tokens / seconds, "tflops": sizes.flops / seconds / 1e12}
    return told | (on_gpu(work, told) if gpu else {})


def on_gpu(work: Callable[[], object], told: dict[str, Any]) -> dict[str, Any]:
    """What a GPU alone can tell."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    name = torch.cuda.get_device_name()
    found: dict[str, Any] = {"gpu": name, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    peak = next((value for word, value in PEAKS.items() if word in name), None)
    if peak and "tflops" in told:
        found["mfu"] = told["tflops"] * 1e12 / peak
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}"
        for each in caught
        if "synchroniz" in str(each.message)
    )
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.events() if "CUDA" in str(event.device_type)]
    busy: Counter[str] = Counter()
    for event in kernels:
        busy[event.name[:90]] += event.time_range.elapsed_us()
    return found | {
        "waits": sum(lines.values()),
        "waits_by_line": lines.most_common(15),
        "launches": len(kernels),
        "gpu_ms": sum(busy.values()) / 1e3,
        "kernels": busy.most_common(20),
    }


def chip(*, tiny: bool) -> dict[str, Any]:
    """Its own matrix product and copy."""
    import torch
    from _step_sides import place

    device, n = place()[0], 256 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(n * n * 8, device=device, dtype=torch.bfloat16)
    product, copy = measure(lambda: a @ b, None), measure(big.clone, None)
    return {
        "torch": torch.__version__,
        "gpu": product.get("gpu"),
        "tflops": 2 * n**3 / product["seconds"] / 1e12,
        "gb_per_s": 4 * big.numel() / copy["seconds"] / 1e9,
    }


def steps(case: str, *, tiny: bool) -> dict[str, Any]:
    """Whole training steps of one side."""
    from _step_sides import batch, made

    shape, _, name = case.partition(": ")
    sizes = (TINY_ON_A_GPU if tiny else ON_A_GPU)[shape]
    side, flag = SIDES[name]
    model, given = made(side, sizes, [flag] if flag else []), batch(sizes, 0)
    losses: list[float] = []
    told = measure(lambda: losses.append(model.step(*given)), sizes)
    return told | {"losses": losses}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| case | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for told in results:
        cells = ["failed: " + told["error"][-1][:60]] if "error" in told else []
        for column in COLUMNS[len(cells) :]:
            value = told.get(column)
            cells.append("" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value))
        lines.append(f"| {told['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def answer(args: argparse.Namespace) -> None:
    """In the process of a case; whatever a host prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        told = chip(tiny=args.tiny) if args.case == "chip" else steps(args.case, tiny=args.tiny)
        print(json.dumps(told), file=out, flush=True)


def main() -> None:
    """Run the cases, or one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, help="folder for results.jsonl and table.md")
    parser.add_argument("--seconds", type=float, default=450.0, help="time limit in seconds (default: 450)")
    parser.add_argument(
        "--limit", type=float, default=75.0, help="time limit of one case in seconds (default: 75)"
    )
    parser.add_argument("--least", type=float, default=15.0, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="measure only cases that have this word in their name")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to test that the benchmark runs")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        answer(args)
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with (out / "results.jsonl").open("w", encoding="utf-8") as file:
        for told in run_cases(args):
            results.append(told)
            print(json.dumps(told), file=file, flush=True)
            print(table([told]).splitlines()[-1], flush=True)
    (out / "table.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
