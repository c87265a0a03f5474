"""Bounds on the differences between the numbers of the two programs of a proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# float32: two libraries add in different orders.  A token may change an expert where two router logits are
# nearly equal.
DIFFERENCE, NEAR = 1e-5, 1e-4
# bfloat16: rounding moves some tokens to other experts, which changes their logits by more than rounding
# does.
SAME_EXPERTS, PERPLEXITY = 0.97, 0.005


def bounds(dtype: str) -> dict[str, float]:
    """The bounds for weights of that type, as the certificate contains them."""
    if dtype == "float32":
        return {"max_difference_by_std": DIFFERENCE, "gap_of_other_experts": NEAR}
    return {"equal_experts": SAME_EXPERTS, "perplexity_ratio": PERPLEXITY}


def faults(
    answer: Mapping[str, Any], dtype: str, *, greedy: Mapping[str, list[int]] | None = None
) -> list[str]:
    """What is out of bounds in an answer of ``huggingface/compare.py``; ``greedy``: the product's own text
    for each k.
    """
    found = list(answer["problems"])
    for result in answer["results"]:
        found += [f"k = {result['topk']}: {line}" for line in _faults(result, dtype)]
    for k, ids in (greedy or {}).items():
        if dtype == "float32" and answer["generated"].get(k) != ids:
            found.append(
                f"k = {k}: with greedy decoding, transformers generates the tokens "
                f"{answer['generated'].get(k)}, but this program generates {ids}"
            )
    return found


def _faults(result: Mapping[str, Any], dtype: str) -> Iterator[str]:
    if not result["finite"]:
        yield "some logits of transformers are NaN or infinite"
        return
    same = min(result["equal_experts"], default=1.0)
    if dtype == "float32":
        bound = DIFFERENCE * max(1.0, result["logits_std"])
        if not result["max_difference"] <= bound:
            yield (
                f"the logits of transformers and of this program differ by up to "
                f"{result['max_difference']:.2e}, but at most {bound:.2e} is allowed"
            )
        if (gap := max(result["largest_gap"], default=0.0)) > NEAR:
            yield (
                f"transformers routes {100 * (1 - same):.2f} % of the tokens to other experts than this "
                f"program; for these tokens, the k-th and the next router logit differ by up to {gap:.1e}, "
                f"but only a difference of at most {NEAR:.0e} counts as a tie"
            )
        return
    if same < SAME_EXPERTS:
        yield (
            f"transformers and this program route only {100 * same:.2f} % of the tokens to the same experts; "
            f"at least {100 * SAME_EXPERTS:g} % are required"
        )
    ratio = result["perplexity_hf"] / result["perplexity"]
    if not abs(ratio - 1) <= PERPLEXITY:
        yield (
            f"the perplexity with transformers is {result['perplexity_hf']:.4f}, but with this program "
            f"{result['perplexity']:.4f}; at most {100 * PERPLEXITY:g} % difference is allowed"
        )


def score_faults(certificate: Mapping[str, Any], answer: Mapping[str, Any], dtype: str) -> list[str]:
    """Where this machine's numbers differ from the certified ones (``--verify --numbers``)."""
    found = list(answer["problems"])
    certified = {row["topk"]: row for row in certificate["proof"]["results"]}
    for result in answer["results"]:
        row = certified[result["topk"]]
        if dtype == "float32":
            # a loss is a difference of two logits, rounded to six digits in the certificate
            bound = 2 * DIFFERENCE * max(1.0, row["logits_std"]) + 1e-6
            pairs = zip(result["token_losses"], row["token_losses"], strict=True)
            worst = max(abs(a - b) for a, b in pairs)
            # one token may have chosen another expert, and moved those behind it
            if not worst <= bound and min(row["equal_experts"], default=1.0) == 1.0:
                found.append(
                    f"k = {result['topk']}: the loss of a token differs from the certified loss by "
                    f"{worst:.2e}, but at most {bound:.2e} is allowed"
                )
        if not abs(result["perplexity_hf"] / row["perplexity"] - 1) <= PERPLEXITY:
            found.append(
                f"k = {result['topk']}: the perplexity is {result['perplexity_hf']:.4f}, but the certified "
                f"perplexity is {row['perplexity']:.4f}; at most {100 * PERPLEXITY:g} % difference is allowed"
            )
    return found
