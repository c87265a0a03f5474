"""Rules about batches, the optimizer, its schedule, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hyperrouter.config.derived import (
    NOT_RECOMPUTED,
    alarm_actions,
    data_parallel_size,
    decay_iters,
    has_dense_layers,
)
from megatron_hyperrouter.config.rules.base import Rule, broken, multiples, needs
from megatron_hyperrouter.config.schedules.batch_sizes import grows_to
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem


def global_batch_by_micro_batches(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Every data-parallel rank takes equally many whole micro-batches."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total is None:
        return
    # another rule reports a layout that does not fit
    ranks = 1 if world_size is None else data_parallel_size(config, world_size) or 1
    if total % (micro * ranks):
        among = "" if world_size is None else f" x data-parallel ranks = {micro} x {ranks}"
        rule = f"must be divisible by --micro-batch-size{among or f' = {micro}'}"
        yield broken(
            config,
            "global_batch_size",
            rule,
            f"use {multiples(total, micro * ranks)}, or change --micro-batch-size",
        )


def rampup_reaches_the_full_batch(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The batch grows in equal increments to --global-batch-size, always by whole micro-batches."""
    if config.train.rampup_batch_size is None:
        return
    start, increment, _ = config.train.rampup_batch_size
    full, micro = config.train.global_batch_size, config.train.micro_batch_size
    if full is None:
        yield needs(config, "rampup_batch_size", "--global-batch-size")
        return
    if not grows_to(full, config.train.rampup_batch_size):
        rule = f"must reach --global-batch-size = {full} in a whole number of increments"
        remedy = f"use a start below {full} and an increment that divides the difference"
        yield broken(config, "rampup_batch_size", rule, remedy)
    ranks = 1 if world_size is None else data_parallel_size(config, world_size) or 1
    interleaved = (config.parallel.virtual_pipeline_model_parallel_size or 1) > 1
    stages = config.parallel.pipeline_model_parallel_size if interleaved else 1
    if start % (micro * ranks * stages) or increment % (micro * ranks * stages):
        factors = {"--micro-batch-size": micro}
        factors |= {} if world_size is None else {"data-parallel ranks": ranks}
        factors |= {"pipeline stages": stages} if interleaved else {}
        rule = (
            f"must have a start and an increment that are divisible by {' x '.join(factors)} "
            f"= {' x '.join(map(str, factors.values()))}"
        )
        remedy = f"use multiples of {micro * ranks * stages} for both"
        yield broken(config, "rampup_batch_size", rule, remedy)


def micro_batches_by_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The interleaved schedule needs a multiple of the number of stages."""
    stages, chunks = (
        config.parallel.pipeline_model_parallel_size,
        config.parallel.virtual_pipeline_model_parallel_size or 1,
    )
    ranks = 0 if world_size is None else data_parallel_size(config, world_size)
    if chunks == 1 or ranks == 0:
        return
    micro_batches = (config.train.global_batch_size or config.train.micro_batch_size * ranks) // (
        config.train.micro_batch_size * ranks
    )
    if micro_batches % stages:
        rule = (
            f"gives {micro_batches} micro-batches; their number must be divisible by the {stages} "
            "interleaved pipeline stages"
        )
        yield broken(
            config,
            "global_batch_size",
            rule,
            f"use a multiple of {config.train.micro_batch_size * ranks * stages}",
        )


def skip_steps_are_ranges(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Steps count from 1."""
    for word in config.guard.skip_steps:
        first, dash, last = word.partition("-")
        numbers = first.isdecimal() and (last.isdecimal() or not dash)
        if not numbers or not 1 <= int(first) <= int(last or first):
            yield broken(
                config,
                "skip_steps",
                f"{word} must be a step (1 or later) or an increasing range of steps",
                "write 105-107 for steps 105, 106 and 107",
            )


def alarms_are_known(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Alarm names and actions must be known; ``raise-aux`` needs a balance loss."""
    try:
        actions = alarm_actions(config.guard.alarm)
    except ValueError as error:
        yield broken(
            config, "alarm", str(error), "write, for example, --alarm collapse=stop dead_experts=snapshot"
        )
        return
    if "raise-aux" in actions.values() and not config.model.moe_aux_loss_coeff:
        rule = "raise-aux needs --moe-aux-loss-coeff greater than 0"
        yield broken(config, "alarm", rule, "add --moe-aux-loss-coeff 0.01, or use another action")


def min_lr_within_lr(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The learning rate decays downwards."""
    if config.optimizer.min_lr > config.optimizer.lr:
        yield broken(
            config, "min_lr", f"must be at most --lr = {config.optimizer.lr}", "lower FLAG, or raise --lr"
        )


def warmup_within_decay(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The warm-up is over before the decay ends."""
    warmup, end = config.optimizer.lr_warmup_iters, decay_iters(config)
    if warmup > end:
        name = long = "--lr-decay-iters" if config.optimizer.lr_decay_iters else "--train-iters"
        if config.train.rampup_batch_size is not None and name == "--train-iters":
            name = "the number of full batches in --train-iters"
        remedy = f"use {end // 10}, or increase {long}"
        yield broken(config, "lr_warmup_iters", f"must be at most {name} = {end}", remedy)


def warmup_starts_below_lr(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The warm-up rises to the peak."""
    init, lr = config.optimizer.lr_warmup_init, config.optimizer.lr
    if init and init >= lr:
        yield broken(config, "lr_warmup_init", f"must be less than --lr = {lr}", "lower FLAG, or raise --lr")
    if init and not config.optimizer.lr_warmup_iters:
        yield needs(config, "lr_warmup_init", "--lr-warmup-iters")


def wsd_decay_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """WSD: warm-up, then a stable part, then the decay."""
    if config.optimizer.lr_decay_style != "WSD" or config.optimizer.lr_wsd_decay_iters is None:
        return
    room = decay_iters(config) - config.optimizer.lr_warmup_iters
    if config.optimizer.lr_wsd_decay_iters > room >= 0:
        yield broken(
            config,
            "lr_wsd_decay_iters",
            f"must be at most {room}, the steps from the warm-up to the end of the decay",
            f"use at most {room}",
        )


def recomputed_layers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The method of recomputing layers needs the recomputation of whole layers."""
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(config.train, name) is not None and config.train.recompute_granularity != "full":
            yield needs(config, name, "--recompute-granularity full")


RECOMPUTED = ("core_attn", "mlp", "moe", "shared_experts")


def recomputed_parts_are_there(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Selective recomputation names parts that the model has, and that both engines can recompute."""
    model, parts = config.model, config.train.recompute_modules
    if parts and config.train.recompute_granularity != "selective":
        yield needs(config, "recompute_modules", "--recompute-granularity selective")
    known = ", ".join(RECOMPUTED)
    for part in dict.fromkeys(parts):
        if part not in (*RECOMPUTED, *NOT_RECOMPUTED):
            yield broken(
                config,
                "recompute_modules",
                f"{part} is not a part that can be recomputed",
                f"choose from {known}",
            )
    if "shared_experts" in parts and model.moe_shared_expert_intermediate_size is None:
        rule = "shared_experts needs --moe-shared-expert-intermediate-size"
        yield broken(config, "recompute_modules", rule, "add that flag, or leave out shared_experts")
    if "mlp" in parts and not has_dense_layers(config):
        yield broken(
            config, "recompute_modules", "mlp needs dense layers (see --moe-layer-freq)", "use moe instead"
        )


def profile_has_steps(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A trace ends after it begins."""
    start, end = config.logging.profile_step_start, config.logging.profile_step_end
    if config.logging.profile and end <= start:
        rule = f"must be greater than --profile-step-start = {start}"
        yield broken(config, "profile_step_end", rule, f"use {start + 2}")


def finetune_needs_load(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Fine-tuning starts from existing weights."""
    if config.checkpoint.finetune and config.checkpoint.load is None:
        yield needs(config, "finetune", "--load")


def texts_need_prompts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Sample texts need prompts, a tokenizer that encodes text, and whole sequences on each rank."""
    settings = config.logging
    if not settings.sample_interval:
        if settings.sample_prompt:
            yield needs(config, "sample_prompt", "--sample-interval")
        return
    if not settings.sample_prompt:
        yield needs(config, "sample_interval", "--sample-prompt")
    if config.data.tokenizer_type == "NullTokenizer":
        rule = "needs a tokenizer that can encode text; NullTokenizer cannot"
        yield broken(config, "sample_interval", rule, "use another --tokenizer-type, or leave out FLAG")
    if config.parallel.context_parallel_size > 1:
        rule = "cannot be combined with --context-parallel-size greater than 1"
        yield broken(config, "sample_interval", rule, "leave out FLAG, and use mhr generate after training")


RULES: tuple[Rule, ...] = (
    global_batch_by_micro_batches,
    rampup_reaches_the_full_batch,
    micro_batches_by_pipeline,
    skip_steps_are_ranges,
    alarms_are_known,
    min_lr_within_lr,
    warmup_within_decay,
    warmup_starts_below_lr,
    wsd_decay_fits,
    profile_has_steps,
    recomputed_layers,
    recomputed_parts_are_there,
    finetune_needs_load,
    texts_need_prompts,
)
