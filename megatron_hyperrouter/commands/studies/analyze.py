"""Analyze the routers and experts of a trained run, layer by layer, on evaluation data.

For each k the command writes to --output: entropy, logit standard deviation and mutual information of the
router; loads and dead experts; the similarity (linear CKA) of each pair of experts; and the router's part of
the layer's Jacobian.  It also compares the run's checkpoints: how much does the routing of a fixed set of
tokens change (saturation and fluctuation)?  A table goes to stdout.  The command runs in one process; the run
may have any layout and engine.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hyperrouter.compat.host_logs import silence_hosts
from megatron_hyperrouter.evaluate.trained import TrainedRun, add_run_flags
from megatron_hyperrouter.files import check_output, write_json
from megatron_hyperrouter.terminal import note, parser

EPILOG = """\
Entropy is computed from the softmax over all experts, in nats, and averaged over tokens.  It depends on the
scale of the logits, so read it together with their standard deviation.  Mutual information between token and
expert is 0 if the router's scores are the same for every token.  docs/evidence.md explains every number."""
BATCHES = 16  # of the run


def main(arguments: Sequence[str]) -> None:
    """Settings of the run -> data -> model -> one table for each k."""
    args = read_flags(arguments)
    refuse_several_ranks()
    check_output(args.output)
    silence_hosts()
    from megatron_hyperrouter.evaluate.perplexity import check_topks
    from megatron_hyperrouter.evaluate.selection import first_batches
    from megatron_hyperrouter.studies.analyzed import Analysis

    run = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)
    topks = list(dict.fromkeys(args.topk or [run.settings.model.moe_router_topk]))
    check_topks(topks, run.settings.model.num_experts, router=run.settings.router)
    tokenizer = run.tokenizer()
    dataset, selected = first_batches(
        run, tokenizer, args.eval_iters, split=args.split, data_path=args.data_path
    )
    samples = selected or len(dataset)
    engine = run.open_engine(tokenizer)
    try:
        run.load_into(engine)
        analysis = Analysis(run, engine, dataset, samples, tokenizer.vocab_size)
        results = []
        for topk in topks:
            note(f"k = {topk}")
            results.append({"topk": topk, "layers": analysis.at(topk)})
        checkpoints = None if args.no_checkpoints else analysis.over_checkpoints(note)
    finally:
        engine.close()
    write_json(
        args.output,
        {
            "checkpoint": str(run.checkpoint),
            "step": run.step,
            "router": run.settings.router.name,
            "num_experts": run.settings.model.num_experts,
            "trained_topk": run.settings.model.moe_router_topk,
            "split": args.split or "test",
            "tokens": samples * run.settings.model.seq_length,
            "results": results,
            "checkpoints": checkpoints,
        },
    )
    show(results)


def refuse_several_ranks() -> None:
    """Raises ConfigError under a launcher of several ranks."""
    from megatron_hyperrouter.errors import ConfigError, Problem
    from megatron_hyperrouter.guard.ranks import adopt_ranks

    adopt_ranks()
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        rule = "must be 1, because one process compares all experts"
        raise ConfigError([Problem("ranks", ranks, rule, "start this command without a launcher")])


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(str(__doc__), EPILOG)
    add_run_flags(flags)
    flags.add_argument(
        "--topk",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k (active experts per token) at which to analyze the run (default: the final "
        "k of training)",
    )
    flags.add_argument(
        "--split", choices=("train", "valid", "test"), help="split of the data to analyze (default: test)"
    )
    flags.add_argument(
        "--eval-iters",
        type=int,
        default=BATCHES,
        metavar="N",
        help="number of global batches to analyze; a split with fewer batches is analyzed completely "
        f"(default: {BATCHES})",
    )
    flags.add_argument(
        "--no-checkpoints",
        action="store_true",
        help="do not compare the checkpoints of the run with each other",
    )
    flags.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="JSON file to write the results to"
    )
    args = flags.parse_args(arguments)
    flags.check_at_least(args, 1, "eval_iters")
    return args


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table for the terminal."""
    heads = ("k", "layer", "entropy", "std", "MI", "max load", "dead", "similarity", "share", "drift")
    print(" ".join(f"{head:>10}" for head in heads))
    for result in results:
        for row in result["layers"]:
            part = row["jacobian"]
            numbers = (
                row["entropy"],
                row["logit_std"],
                row["mutual_information"],
                row["load_max_over_mean"],
                row["dead_experts"],
                row["mean_similarity"],
                part["share"],
                part["drift"],
            )
            cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
            print(" ".join(f"{cell:>10}" for cell in (result["topk"], row["layer"], *cells)))
