"""Compares a Hugging Face folder with the numbers of the program that wrote it: ``python compare.py
TASK.json ANSWER.json``.

It needs only torch, transformers and safetensors, so that any environment can run it.  The task names the
folder, the values of k and, for a comparison of logits, the folder with the other program's logits
(``tokens.safetensors``, ``k-N.safetensors``).

Legend: ``B`` samples, ``S`` positions, ``V`` vocabulary, ``K`` active experts, ``E`` experts.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GATE = re.compile(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate$")
Task = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Read the task, write the answer."""
    torch.set_num_threads(max(1, torch.get_num_threads()))
    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    Path(arguments[1]).write_text(json.dumps(answer(task)), encoding="utf-8")


def answer(task: Task) -> dict[str, Any]:
    """``{"versions", "problems", "results": [for each k], "generated": {k: ids}}``."""
    problems: list[str] = []
    results, generated = [], {}
    for k in task["topks"]:
        try:
            model, faults = load(task, k)
        except (OSError, RuntimeError, ValueError) as error:
            if "does not recognize this architecture" in str(error):
                sys.exit(f"transformers {transformers.__version__} does not support this model class")
            problems.append(f"transformers cannot load the folder: {str(error).splitlines()[0]}")
            break
        problems += faults
        with torch.inference_mode():
            if reference := task.get("reference"):
                results.append(compare(model, Path(reference), k, dense=bool(task.get("dense"))))
            elif tokens := task.get("tokens"):
                results.append(score(model, torch.tensor(tokens), k))
            if (prompt := task.get("prompt")) and k == task["prompt_topk"]:
                generated[str(k)] = greedy(model, prompt, task["new_tokens"], task["vocab_size"])
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "problems": sorted(set(problems)),
        "results": results,
        "generated": generated,
    }


def load(task: Task, k: int) -> tuple[Any, list[str]]:
    """The model with k active experts, and what is wrong with its keys."""
    five = int(transformers.__version__.split(".")[0]) >= 5
    options = {"dtype" if five else "torch_dtype": getattr(torch, task["dtype"])}
    if task.get("custom_code"):
        options["trust_remote_code"] = True
    if not task.get("dense"):
        options["num_experts_per_tok"] = k
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        task["folder"], output_loading_info=True, local_files_only=True, **options
    )
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    faults = []
    for key, word in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "has a different shape"),
    ):
        for each in told.get(key) or ():
            name = each if isinstance(each, str) else each[0]
            if key == "unexpected_keys" and name.startswith(tuple(task.get("left_out", ()))):
                continue  # layers that transformers does without, as the run does
            if name not in held or held[name].numel():  # a missing shared expert without rows does not matter
                faults.append(f"{name}: {word}")
    return model.eval(), faults


class Choices:
    """The experts that each layer chose in the last forward pass."""

    def __init__(self, model: Any, k: int) -> None:
        self.by_layer: dict[int, Tensor] = {}
        self.k = k
        for name, module in model.named_modules():
            if found := GATE.search(name):
                module.register_forward_hook(
                    lambda _m, _i, output, layer=int(found[1]): self._note(layer, output)
                )

    def _note(self, layer: int, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        chosen = [part for part in parts if torch.is_tensor(part) and not part.is_floating_point()]
        ids = chosen[0] if chosen else parts[0].topk(self.k, dim=-1).indices  # transformers 4: logits alone
        self.by_layer[layer] = ids.reshape(-1, self.k).sort(-1).values


def compare(model: Any, reference: Path, k: int, *, dense: bool = False) -> dict[str, Any]:
    """Compare logits, choices and losses with the reference's, sample by sample; a dense model has no
    choices.
    """
    told = load_file(reference / "tokens.safetensors")
    choices, sums = Choices(model, k), Sums()
    with safe_open(reference / f"k-{k}.safetensors", framework="pt") as file:
        names: list[str] = list(file.keys())
        layers = sorted(int(name.split(".")[1]) for name in names if name.startswith("experts."))
        layers = [] if dense else layers
        for at, (tokens_S, labels_S) in enumerate(zip(told["tokens_BS"], told["labels_BS"], strict=True)):
            theirs_SV = model(tokens_S[None]).logits[0].float()
            ours_SV = file.get_slice("logits_BSV")[at].float()
            alike_S = torch.ones(len(tokens_S), dtype=torch.bool)
            for layer in layers:
                experts_SK = file.get_slice(f"experts.{layer}")[at].sort(-1).values
                same_S = (choices.by_layer[layer] == experts_SK).all(-1)
                sums.choices(layer, same_S, alike_S, file.get_slice(f"gap.{layer}")[at])
                alike_S &= same_S
            sums.logits(theirs_SV, ours_SV, labels_S, alike_S)
    return {"topk": k, **sums.result()}


class Sums:
    """Adds up a comparison over samples."""

    def __init__(self) -> None:
        self.tokens = self.argmax = self.values = 0
        self.max_alike = self.max_all = self.total = self.square = self.sum = self.kl = 0.0
        self.loss = [0.0, 0.0]
        self.labels = 0
        self.losses: list[float] = []
        self.same: dict[int, int] = {}
        self.gap: dict[int, float] = {}
        self.finite = True

    def choices(self, layer: int, same_S: Tensor, alike_S: Tensor, gap_S: Tensor) -> None:
        """``alike_S``: the same experts in all earlier layers; ``gap_S``: the k-th logit of the reference's
        router minus the next one.
        """
        self.same[layer] = self.same.get(layer, 0) + int(same_S.sum())
        parted_S = alike_S & ~same_S
        if parted_S.any():
            self.gap[layer] = max(self.gap.get(layer, 0.0), float(gap_S[parted_S].max()))

    def logits(self, theirs_SV: Tensor, ours_SV: Tensor, labels_S: Tensor, alike_S: Tensor) -> None:
        """Add one sample; ``alike_S``: tokens with the same experts in all layers."""
        theirs_SV = theirs_SV[:, : ours_SV.size(-1)]
        difference_SV = (theirs_SV - ours_SV).abs()
        self.finite &= bool(theirs_SV.isfinite().all()) and bool(ours_SV.isfinite().all())
        if alike_S.any():
            self.max_alike = max(self.max_alike, float(difference_SV[alike_S].max()))
        self.max_all = max(self.max_all, float(difference_SV.max()))
        self.total += float(difference_SV.double().sum())
        self.sum += float(ours_SV.double().sum())
        self.square += float(ours_SV.double().square().sum())
        self.values += ours_SV.numel()
        self.tokens += len(labels_S)
        self.argmax += int((theirs_SV.argmax(-1) == ours_SV.argmax(-1)).sum())
        both = [x.log_softmax(-1) for x in (ours_SV, theirs_SV)]
        self.kl += float((both[0].exp() * (both[0] - both[1])).double().sum())
        counted = labels_S >= 0
        self.labels += int(counted.sum())
        for side, log_SV in enumerate(both):
            losses_S = -log_SV.gather(-1, labels_S.clamp(min=0)[:, None])[counted, 0]
            self.loss[side] += float(losses_S.double().sum())
            if side == 0:
                self.losses += losses_S.tolist()

    def result(self) -> dict[str, Any]:
        """Plain numbers."""
        mean = self.sum / self.values
        ours, theirs = (loss / max(self.labels, 1) for loss in self.loss)
        return {
            "finite": self.finite,
            "max_difference": self.max_alike,
            "max_difference_all": self.max_all,
            "mean_difference": self.total / self.values,
            "logits_std": math.sqrt(max(self.square / self.values - mean * mean, 0.0)),
            "equal_argmax": self.argmax / self.tokens,
            "equal_experts": [self.same[layer] / self.tokens for layer in sorted(self.same)],
            "largest_gap": [self.gap.get(layer, 0.0) for layer in sorted(self.same)],
            "loss": ours,
            "loss_hf": theirs,
            "perplexity": math.exp(min(ours, 700.0)),
            "perplexity_hf": math.exp(min(theirs, 700.0)),
            "kl": self.kl / self.tokens,
            "token_losses": [round(value, 6) for value in self.losses],
        }


def score(model: Any, rows_BS: Tensor, k: int) -> dict[str, Any]:
    """The loss of each token of samples of S + 1 ids."""
    losses = list(_losses(model, rows_BS))
    loss = sum(losses) / len(losses)
    return {"topk": k, "loss_hf": loss, "perplexity_hf": math.exp(min(loss, 700.0)), "token_losses": losses}


def _losses(model: Any, rows_BS: Tensor) -> Iterator[float]:
    for row_S in rows_BS:
        logits_SV = model(row_S[None, :-1]).logits[0].float()
        yield from F.cross_entropy(logits_SV, row_S[1:], reduction="none").tolist()


def greedy(model: Any, prompt: list[int], new_tokens: int, vocab_size: int) -> list[int]:
    """The text after ``prompt``, by greedy decoding among the ids below ``vocab_size``."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=-1,  # runs to the end
        pad_token_id=0,
        suppress_tokens=list(range(vocab_size, model.config.vocab_size)) or None,
    )
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
