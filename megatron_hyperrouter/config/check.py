"""Runs every rule that joins settings, and warns of likely mistakes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.derived import (
    NOT_RECOMPUTED,
    decay_iters,
    rope_type,
    run_length,
    smallest_topk,
)
from megatron_hyperrouter.config.leaves import tree_leaves, value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.rules import (
    attention,
    data,
    deepspeed_json,
    engine,
    layout,
    megatron,
    model,
    precision,
    training,
)
from megatron_hyperrouter.config.rules.base import Rule
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem

_SATURATED = 4.0  # standard deviation of logits at the start

RULES: tuple[Rule, ...] = (
    *model.RULES,
    *attention.RULES,
    *layout.RULES,
    *training.RULES,
    *data.RULES,
    *engine.RULES,
    *deepspeed_json.RULES,
    *megatron.RULES,
    *precision.RULES,
)


def problems(config: RunConfig, *, world_size: int | None, unsure: Collection[str] = ()) -> list[Problem]:
    """All problems of the settings.  With ``world_size`` None, rules that need it are skipped.

    ``unsure``: names of settings that have their default because the given value was bad.  If a rule has
    read one of them, its problem may only be a consequence, and is dropped.
    """
    found: list[Problem] = []
    for rule in RULES:
        seen: set[str] = set()
        watched = cast(RunConfig, _Watched(config, seen))
        for problem in rule(watched, world_size):
            if seen.isdisjoint(unsure):
                found.append(problem)
    return found


def warnings(config: RunConfig, *, has_gpu: bool | None = None, world_size: int | None = None) -> list[str]:
    """Warnings about settings that can run but are probably mistakes; ``has_gpu``, ``world_size``: None if
    unknown.
    """
    return [
        *_about_router(config),
        *_about_training(config),
        *_about_profile(config, world_size),
        *_about_noise(config),
        *_about_ignored(config),
        *_about_the_other_engine(config),
        *_about_hardware(config, has_gpu),
    ]


def _about_router(config: RunConfig) -> Iterator[str]:
    """Warnings about the router's options, at the smallest k of the run and with its other settings."""
    model, options = config.model, config.router.options
    if options is None or model.num_experts == 1:
        return
    yield from options.warnings(topk=smallest_topk(config))
    std = options.initial_logit_std(model.hidden_size)
    if std is not None and std > _SATURATED:
        # Only one of the two options may set the scale.
        own = hasattr(options, "init_std") and getattr(options, "logit_std", None) is None
        flag = f"--router.init-std {model.hidden_size**-0.5:.2g}" if own else "--router.logit-std 1"
        yield (
            f"the router's initial logits have a standard deviation of {std:.1f}, so one expert gets nearly "
            f"all of the weight and the router hardly learns; use {flag} for a standard deviation of 1"
        )
    yield from options.lost(num_layers=model.num_layers, aux_loss_coeff=model.moe_aux_loss_coeff)


def _about_training(config: RunConfig) -> Iterator[str]:
    model, train, checkpoint = config.model, config.train, config.checkpoint
    if train.eval_iters and train.eval_interval > train.train_iters:
        yield (
            f"validation runs only at the end: --eval-interval = {train.eval_interval} is greater than "
            f"--train-iters = {train.train_iters}"
        )
    if checkpoint.save_interval > train.train_iters:
        yield (
            "a checkpoint is saved only at the end: --save-interval = "
            f"{checkpoint.save_interval} is greater than "
            f"--train-iters = {train.train_iters}"
        )
    if (config.topk.topk_schedule_steps or 0) > train.train_iters:
        yield (
            f"the number of active experts (k) does not reach {model.moe_router_topk}: "
            f"--topk-schedule-steps is greater than --train-iters = {train.train_iters}"
        )
    if config.optimizer.lr_decay_style in ("linear", "cosine", "WSD") and run_length(config) > decay_iters(
        config
    ):
        yield (
            f"the last {run_length(config) - decay_iters(config)} steps run at --min-lr: --lr-decay-iters "
            "is less than --train-iters"
        )


def _about_profile(config: RunConfig, world_size: int | None) -> Iterator[str]:
    logging = config.logging
    if not logging.profile:
        return
    if logging.profile_step_start >= config.train.train_iters:
        yield (
            f"--profile writes no trace: --profile-step-start = {logging.profile_step_start} is not "
            f"less than --train-iters = {config.train.train_iters}"
        )
    absent = [rank for rank in logging.profile_ranks if world_size and not 0 <= rank < world_size]
    if absent:
        which = "" if len(absent) == len(logging.profile_ranks) else f" for {' '.join(map(str, absent))}"
        yield (
            f"--profile writes no trace{which}: --profile-ranks = "
            f"{' '.join(map(str, logging.profile_ranks))}, but this run has only "
            f"{'rank 0' if world_size == 1 else f'ranks 0 to {(world_size or 1) - 1}'}"
        )


def _about_noise(config: RunConfig) -> Iterator[str]:
    spread = [leaf.flag for leaf in leaves_with(Role.LAYOUT) if (value_of(config, leaf.name) or 1) > 1]
    for leaf in leaves_with(Role.NOISE):
        if spread and value_of(config, leaf.name) != leaf.quiet:
            yield (
                f"{leaf.flag} draws different random numbers on each layout: with {spread[0]}, losses differ "
                "from those of a single process"
            )


def _about_ignored(config: RunConfig) -> Iterator[str]:
    """Warnings about settings that have no effect because of other settings."""
    kind = config.data.tokenizer_type
    if config.data.tokenizer_model is not None and kind in ("ByteTokenizer", "NullTokenizer"):
        yield f"--tokenizer-model is ignored: {kind} needs no file"
    for name in ("mscale", "mscale_all_dim"):
        if getattr(config.attention, name) != tree_leaves()[name].default and rope_type(config) != "yarn":
            yield (
                f"{tree_leaves()[name].flag} is ignored: attention scores are scaled only with "
                "--rope-type yarn"
            )
    for name in ("no_load_optim", "no_load_rng"):
        if getattr(config.checkpoint, name) and config.checkpoint.load is None:
            yield f"{tree_leaves()[name].flag} is ignored: --load is not given"
    for part in dict.fromkeys(config.train.recompute_modules):
        if part in NOT_RECOMPUTED:
            yield f"--recompute-modules {part} is ignored and saves no memory: {NOT_RECOMPUTED[part]}"
    if config.data.vocab_size is not None and kind not in ("NullTokenizer", "TikTokenizer"):
        yield f"--vocab-size is ignored: {kind} has a fixed vocabulary size"
    if config.data.eod_token is not None and kind in ("ByteTokenizer", "NullTokenizer"):
        yield f"--eod-token is ignored: {kind} has a fixed end-of-document token"
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_style"):
        leaf, style = tree_leaves()[name], config.optimizer.lr_decay_style
        if getattr(config.optimizer, name) != leaf.default and style != "WSD":
            yield f"{leaf.flag} is ignored: --lr-decay-style is {style}"
    if config.optimizer.lr_decay_style == "constant" and (
        config.optimizer.min_lr or config.optimizer.lr_decay_iters
    ):
        yield "--min-lr and --lr-decay-iters are ignored: --lr-decay-style is constant"


def _about_the_other_engine(config: RunConfig) -> Iterator[str]:
    """Warnings about settings of the other engine that do not change results."""
    engine = config.engine.engine
    for leaf in tree_leaves().values():
        owner = leaf.only
        foreign = owner is not None and owner.engine != engine
        if owner and foreign and owner.harmless and value_of(config, leaf.name) != leaf.default:
            yield f"{leaf.flag} has no effect on the {engine} engine: {owner.harmless}"


def _about_hardware(config: RunConfig, has_gpu: bool | None) -> Iterator[str]:
    if config.train.bf16 and has_gpu is False:
        yield "--bf16 on a CPU is slower and less exact than float32"


class _Watched:
    """Reads like a RunConfig, and records the flat name of every setting that is read."""

    def __init__(self, config: Any, seen: set[str], prefix: str | None = None) -> None:
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if self._prefix is None:
            return _Watched(value, self._seen, "router." if name == "router" else "")
        if self._prefix == "router." and name == "options":
            self._seen.update(f"router.{option}" for option in getattr(value, "__dataclass_fields__", ()))
        else:
            self._seen.add(self._prefix + name)
        return value
