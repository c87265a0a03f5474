"""Continue prompts with a trained run or an exported Hugging Face folder, at several k side by side.

Decoding is greedy by default.  With --temperature above 0, tokens are sampled; --top-p limits them to the
most likely ones.  Prompts come from --prompt, from --prompt-file (one per line), or from stdin.  The command
runs in one process on the CPU, without a training engine.  Only --calibrate-k starts the run's engine once,
to measure how the MoE outputs have to be rescaled.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.errors import ConfigError, DataError, Problem, reason_of
from megatron_hyperrouter.evaluate.trained import add_model_flags
from megatron_hyperrouter.terminal import note, parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.evaluate.calibration import Scales
    from megatron_hyperrouter.generation.decoder import Loaded


def main(arguments: Sequence[str]) -> None:
    """Model -> prompts -> a text for each prompt and k."""
    args = read_flags(arguments)
    from megatron_hyperrouter.evaluate.perplexity import check_topks
    from megatron_hyperrouter.generation.load import load

    prompts = prompts_of(args)
    loaded = load(args.load, tokenizer_model=args.tokenizer_model)
    topks = args.topk or [loaded.run.model.moe_router_topk]
    check_topks(topks, loaded.run.model.num_experts, router=loaded.run.router)
    loaded.check(topks)
    scales = scales_at(args, loaded, topks) if args.calibrate_k else {}
    encoded = encode(loaded, prompts, args.max_new_tokens)
    results = texts(loaded, prompts, encoded, topks, args)
    calibrated = calibrated_texts(loaded, prompts, encoded, scales, args)
    if args.json:
        content = {"results": results} | ({"calibrated": calibrated} if args.calibrate_k else {})
        show(json.dumps(content, indent=1, ensure_ascii=False))
        return
    for number, prompt in enumerate(prompts):
        show(f"{'' if number == 0 else chr(10)}prompt: {prompt}")
        for kind, rows in (("", results), (", calibrated", calibrated)):
            for row in rows:
                if row["prompt_number"] == number:
                    show(f"k = {row['topk']}{kind}: {row['text']}")


def scales_at(args: Namespace, loaded: Loaded, topks: Sequence[int]) -> dict[int, Scales]:
    """The scales of ``mhr evaluate --calibrate-k``; ConfigError for a folder, which has no training data."""
    from megatron_hyperrouter.evaluate.calibration import scales_of_run
    from megatron_hyperrouter.evaluate.trained import TrainedRun

    if (args.load / "config.json").is_file():
        rule = f"needs the training data of a run, but {args.load} is an exported folder"
        remedy = (
            "give the run folder with --load; or leave out --calibrate-k, and load a folder written by mhr "
            "export-hf --calibrate-k, in which the weights are rescaled already"
        )
        raise ConfigError([Problem("--calibrate-k", "", rule, remedy)])
    run = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)
    return scales_of_run(run, loaded.tokenizer, topks)


def calibrated_texts(
    loaded: Loaded,
    prompts: Sequence[str],
    encoded: list[list[int]],
    scales: Mapping[int, Scales],
    args: Namespace,
) -> list[dict[str, Any]]:
    """One row for each k of ``scales`` and prompt, with the scales of the layers in order."""
    from megatron_hyperrouter.evaluate.calibration import apply

    rows = []
    for topk, scales_at_k in scales.items():
        in_order = [scales_at_k[layer] for layer in sorted(scales_at_k)]
        with apply(loaded.decoder.routers, scales_at_k):
            rows += [row | {"scales": in_order} for row in texts(loaded, prompts, encoded, [topk], args)]
    return rows


def encode(loaded: Loaded, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """The prompts as token ids; a note if their texts will be longer than the samples of training."""
    from megatron_hyperrouter.data.tokenize.transformers_files import end_of_text

    eod = end_of_text(loaded.tokenizer)
    encoded = [loaded.tokenizer.encode(prompt) or ([] if eod is None else [eod]) for prompt in prompts]
    if not all(encoded):
        raise DataError("a prompt has no tokens", remedy="give a prompt that is not empty")
    rows = loaded.decoder.embedding_VD.size(0)
    if (highest := max(map(max, encoded))) >= rows:
        raise DataError(
            f"a prompt has the token id {highest}, but the model has only {rows} ids",
            remedy="leave out tokens that were added to the tokenizer, or give another --tokenizer-model",
        )
    longest, context = max(map(len, encoded)) + max_new_tokens, loaded.run.model.seq_length
    if longest > context:
        note(
            f"note: texts of {longest} tokens are longer than the training "
            f"samples of the model ({context} tokens)"
        )
    return encoded


def texts(
    loaded: Loaded,
    prompts: Sequence[str],
    encoded: list[list[int]],
    topks: Sequence[int],
    args: Namespace,
) -> list[dict[str, Any]]:
    """One row for each k and prompt; ``encoded``: the prompts as token ids."""
    from megatron_hyperrouter.data.tokenize.transformers_files import end_of_text
    from megatron_hyperrouter.generation.sampling import Style, generate

    tokenizer = loaded.tokenizer
    eod = end_of_text(tokenizer)
    style = Style(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    rows = []
    for topk in topks:
        made = generate(loaded.decoder, encoded, style, topk=topk, vocab_size=tokenizer.vocab_size, eod=eod)
        for number, (prompt, ids) in enumerate(zip(prompts, made, strict=True)):
            row = {"topk": topk, "prompt_number": number, "prompt": prompt}
            rows.append(row | {"text": tokenizer.decode(ids), "tokens": ids})
    return rows


def prompts_of(args: Namespace) -> list[str]:
    """The prompts, from the flags, a file or stdin."""
    if args.prompt is not None:
        return list(args.prompt)
    try:
        # a terminal without UTF-8 decides how output is encoded, not what the prompts are
        content = sys.stdin.buffer.read() if args.prompt_file is None else args.prompt_file.read_bytes()
        text = content.decode()
    except (OSError, UnicodeError) as error:
        where = args.prompt_file or "stdin"
        raise DataError(
            f"{where} cannot be read: {reason_of(error)}",
            remedy=("give a UTF-8 text file with one prompt per line"),
        ) from error
    if found := [line for line in text.splitlines() if line]:
        return found
    raise DataError(
        "there are no prompts", remedy=("add --prompt TEXT, or write prompts to stdin, one per line")
    )


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    add_model_flags(flags)
    add = flags.add_argument
    add("--prompt", nargs="+", action="extend", metavar="TEXT", help="prompts to continue")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="file with one prompt per line (default: read prompts from stdin)",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="maximum number of tokens to generate for each prompt (default: 64)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0: greedy decoding (default: 0)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="nucleus sampling: sample from the smallest set of most likely tokens whose total "
        "probability is at least X (default: 1, all tokens)",
    )
    add("--seed", type=int, default=1234, metavar="N", help="random seed for sampling (default: 1234)")
    add(
        "--calibrate-k",
        action="store_true",
        help="also generate texts with rescaled MoE outputs; mhr evaluate --help explains --calibrate-k",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = flags.parse_args(arguments)
    if args.prompt is not None and args.prompt_file is not None:
        flags.refuse("--prompt", "", "cannot be combined with --prompt-file", "keep one of the two flags")
    flags.check_at_least(args, 1, "max_new_tokens")
    flags.check_at_least(args, 0, "temperature")
    if not -(1 << 63) <= args.seed < 1 << 64:
        flags.refuse("--seed", args.seed, "must be an integer of at most 64 bits", "use a smaller number")
    if not 0 < args.top_p <= 1:
        flags.refuse("--top-p", args.top_p, "must be greater than 0 and at most 1", "use --top-p 0.9")
    return args
