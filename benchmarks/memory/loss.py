"""Measure the memory that the loss needs in addition to its inputs and outputs.

The goal is at most 0.5 GB at the default sizes.

    python benchmarks/memory/loss.py                    V = 152,000, 8192 tokens, float32 and bfloat16
    python benchmarks/memory/loss.py --hidden-size 512  slower; "sum of parts" is larger

Each line is measured in a separate process, which runs the forward and backward pass of
``model.output.token_losses`` on the CPU.  ``beside`` is the rise of the process's memory to its peak,
without the two gradients that the pass returns.  ``sum of parts`` is the part of ``beside`` that grows
with the hidden size but not with the number of tokens: the gradient of the output matrix in float32, and
what one chunk of tokens adds to it.  ``plain`` is the size of one matrix of float32 logits, for
comparison.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

GOAL = 0.5e9
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Measure one dtype in this process, or each in a separate process."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--vocabulary", type=int, default=152_000, metavar="V")
    flags.add_argument("--tokens", type=int, default=8192, metavar="T")
    flags.add_argument("--hidden-size", type=int, default=64, metavar="D")
    flags.add_argument("--dtype", choices=DTYPES, help="this one alone, in this process")
    flags.add_argument("--quick", action="store_true", help="smaller sizes, a few seconds")
    args = flags.parse_args()
    if args.quick:
        args.vocabulary, args.tokens, args.hidden_size = 32768, 4096, 16
    if args.dtype is None:
        print(f"{'':10}{'beside':>10}{'sum of parts':>14}{'plain':>10}  GB", flush=True)
        for dtype in DTYPES:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--dtype", dtype], check=True)
        return
    beside = measure(args.vocabulary, args.tokens, args.hidden_size, args.dtype)
    parts = args.vocabulary * args.hidden_size * (4 if args.dtype == "float32" else 4 + 2)
    plain = 4 * args.vocabulary * args.tokens
    verdict = "met" if beside <= GOAL else "missed"
    cells = f"{beside / 1e9:10.3f}{parts / 1e9:14.3f}{plain / 1e9:10.3f}"
    print(f"{args.dtype:10}{cells}  goal <= {GOAL / 1e9:.1f}: {verdict}", flush=True)


def measure(vocabulary: int, tokens: int, hidden_size: int, dtype: str) -> int:
    """Bytes at the peak of a forward and a backward pass, beside the gradients."""
    import torch
    from megatron.core import parallel_state

    from megatron_hyperrouter.model.output import Projection, token_losses

    parallel_state.set_tensor_model_parallel_world_size(1)
    parallel_state.set_tensor_model_parallel_rank(0)
    torch.set_num_threads(1)
    made = {"dtype": getattr(torch, dtype), "requires_grad": True}

    def once(count: int) -> int:
        hidden_SBD = torch.full((count, 1, hidden_size), 0.1, **made)
        labels_T = torch.arange(count) % vocabulary
        hidden_SBD.grad = weight_VD.grad = None
        before = forget_peak()
        total, _ = token_losses(Projection(hidden_SBD, weight_VD), labels_T)
        total.backward()
        assert hidden_SBD.grad is not None and weight_VD.grad is not None
        return peak() - before - hidden_SBD.grad.nbytes - weight_VD.grad.nbytes

    weight_VD = torch.full((vocabulary, hidden_size), 0.1, **made)
    once(8)  # what the operators keep for themselves
    return once(tokens)


def forget_peak() -> int:
    """Bytes of this process now, with which its peak begins again."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """Most bytes that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
