"""The model card: what the model is, how to run it, and the perplexity at each k."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.config.derived import rope_type
from megatron_hyperrouter.data.tokenize.transformers_files import end_of_text, without_text
from megatron_hyperrouter.export.folder import Export
from megatron_hyperrouter.export.sources import run_name

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.tokenize.base import Tokenizer
    from megatron_hyperrouter.export.classes.target import Target

_SCHEDULE = "the number of active experts k changed from {start} to {end} during training ({kind} schedule)"


def write_card(
    job: Export, folder: Path, *, proof: dict[str, Any] | None, step: int, license_: str | None
) -> None:
    """Write ``README.md``."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"license: {license_}"] if license_ else []
    parts = ["\n".join([*head, "---"]), _about(job, step), _usage(job), _topks(job, proof), _limits(job)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _about(job: Export, step: int) -> str:
    run, model = job.run, job.run.model
    schedule = run.topk
    grown = (
        f"k = {model.moe_router_topk} active experts throughout training"
        if schedule.topk_schedule == "constant"
        else _SCHEDULE.format(
            start=schedule.topk_start or model.moe_router_topk,
            end=model.moe_router_topk,
            kind=schedule.topk_schedule,
        )
    )
    router = (
        "Its router needs the modeling file in this folder."
        if job.gates.target.custom_code
        else "The router is stored as a plain matrix."
    )
    return (
        f"# {run_name(run, job.checkpoint)}\n\n"
        f"A mixture-of-experts language model: {model.num_layers} layers, {model.num_experts} experts in "
        f"each MoE layer, hidden size {model.hidden_size}, context of {model.seq_length} tokens, trained for "
        f"{step} steps with the router `{run.router.name}`; {grown}.  {router}"
    )


def _usage(job: Export) -> str:
    trust = ", trust_remote_code=True" if job.gates.target.custom_code else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER, num_experts_per_tok={job.topk}{trust})\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
        "```"
    )


def _topks(job: Export, proof: dict[str, Any] | None) -> str:
    served = job.gates.target.topks
    text = (
        f"## Active experts\n\n`num_experts_per_tok` may be any number from {served[0]} to {served[-1]} "
        f"and is {job.topk} by default."
    )
    if proof is None:
        return text + "  This model was not compared with the training program."
    rows = [f"| {row['topk']} | {row['perplexity_hf']:.4f} |" for row in proof["results"]]
    table = "\n".join(["| k | perplexity |", "|---|---|", *rows])
    return f"{text}  Perplexity on {proof['tokens']} tokens ({proof['data']}):\n\n{table}"


def _limits(job: Export) -> str:
    lines = [
        "`certificate.json` has the digests of all files and tensors.  It also has the results of a test "
        "that compares the logits of transformers with those of the training program (weights in "
        f"{job.dtype}).  `mhr export-hf --verify FOLDER` checks whether a copy of this folder is unchanged."
    ]
    padded = job.run.model.make_vocab_size_divisible_by
    lines.append(
        "The embedding may have more rows than the tokenizer has token ids, because the number of rows is "
        f"rounded up to a multiple of {padded}.  The additional rows were not trained."
    )
    lines += [f"{line[0].upper()}{line[1:]}." for line in job.notes]
    return "## Limits\n\n" + "\n\n".join(lines)


def notes_of(run: RunConfig, tokenizer: Tokenizer, target: Target) -> Iterator[str]:
    """Notes for the user of the folder about the run and about the class in transformers."""
    if (lacking := without_text(tokenizer)) is not None:
        yield lacking
    elif end_of_text(tokenizer) is None:
        yield "the tokenizer has no usable end-of-document token, so the exported model has no eos_token"
    if run.model.mtp_num_layers is not None:
        yield (
            "the layers for multi-token prediction are not exported; the prediction of the next token does "
            "not need them"
        )
    if run.model.moe_expert_capacity_factor is not None:
        yield "training dropped tokens that exceeded the capacity of an expert; the exported model drops none"
    if target.model_type == "deepseek_v2" and rope_type(run) == "yarn" and run.attention.mscale_all_dim:
        # transformers 4 leaves the temperature out of this class's attention; 5 has it.
        yield (
            "transformers 4 gives wrong results for this model, because it ignores --mscale-all-dim; "
            "use transformers 5"
        )
