"""The loss of one set of weights at several k: what fewer or more experts cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_hyperrouter.config.tree import RouterChoice
from megatron_hyperrouter.data.stream.dataset import Dataset
from megatron_hyperrouter.engines.base import Engine
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.train.metrics import Record, evaluation_record, score


def check_topks(
    topks: Sequence[int],
    num_experts: int,
    *,
    router: RouterChoice | None = None,
    in_groups: int | None = None,
    flag: str = "--topk",
) -> None:
    """ConfigError that names every k out of range; ``router``: its groups may leave a token fewer experts;
    ``in_groups``: their number of experts, for a model without such a router; ``flag``: where the values
    come from.
    """
    most = num_experts if router is None else int(router.options.largest_topk(num_experts))
    whose = "in a layer" if most == num_experts else "in the groups that --router.group-topk allows"
    if in_groups is not None and in_groups < most:
        most, whose = in_groups, "in the groups that a token may use, see config.json"
    rule = f"must be from 1 to {most}, the number of experts {whose}"
    wrong = [topk for topk in topks if not 1 <= topk <= most]
    problems = [Problem(flag, topk, rule, f"use 1 to {most}") for topk in wrong]
    if problems:
        raise ConfigError(problems)


def loss_by_topk(
    engine: Engine,
    dataset: Dataset,
    topks: Sequence[int],
    *,
    micro_batch_size: int,
    num_samples: int | None = None,
    token_bytes_V: Tensor | None = None,
    unscored: Callable[[int], int] | None = None,
) -> list[Record]:
    """Score ``dataset`` once for each k (collective).

    Returns for each k: ``topk``, ``lm_loss`` (nats per token), ``perplexity``, ``bits_per_byte`` (None if
    the bytes are unknown) and ``tokens``.  ``num_samples``: score only this number of samples; None: all.
    ``unscored``: for each sample, how many of its first labels are not scored.
    """
    results = []
    for topk in topks:
        sums = score(
            engine,
            dataset,
            topk=topk,
            micro_batch_size=micro_batch_size,
            num_samples=num_samples,
            token_bytes_V=token_bytes_V,
            unscored=unscored,
        )
        record = evaluation_record(sums, step=0, split="", topk=topk)
        fields = ("topk", "lm_loss", "perplexity", "bits_per_byte")
        results.append({**{name: record[name] for name in fields}, "tokens": sums.tokens})
    return results
