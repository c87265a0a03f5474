"""The settings of a fine-tuning, and how they change the settings of the run that it starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hyperrouter.config.cli import replace_leaves
from megatron_hyperrouter.config.derived import model_parallel_size
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError, Problem

FREEZABLE = ("router", "experts")
# Objectives that some methods add in pre-training; their authors fine-tune without them.
_WITHOUT: Mapping[str, Mapping[str, object]] = {
    "competesmoe": {"router.schedule": "fixed", "router.rate": 0.0},
    "simsmoe": {"router.similarity_coeff": 0.0},
}
_MICRO_BATCH = 8  # texts at most, where the flags do not say
# Settings of the run that do not apply to its fine-tuning.
_PLAIN: Mapping[str, object] = {
    "topk_schedule": "constant",
    "topk_start": None,
    "topk_schedule_steps": None,
    "lr_decay_iters": None,
    "lr_warmup_init": 0.0,
    "min_lr": 0.0,
    "eod_mask_loss": False,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "pack_documents": False,
    "skip_steps": (),
    "alarm": (),
    "mtp_num_layers": None,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "transformer_impl": "local",
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_force_load_balancing": False,
    "no_save_optim": False,
    "no_load_optim": False,
    "no_load_rng": False,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of ``mhr finetune`` by name."""

    topk: tuple[int, ...] | None = None  # at the test; None: the k of training
    finetune_k: int | None = None  # in training; None: the k that the run ended on
    freeze: tuple[str, ...] = ()
    seeds: int = 1
    epochs: float = 3.0
    steps: int | None = None  # in place of epochs
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr: float = 1e-4
    lr_decay_style: str = "cosine"
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    dropout: float = 0.0  # in the head and on residual branches
    aux_loss_coeff: float | None = None  # None: the run's own
    seq_length: int | None = None  # longest text in tokens; None: the run's own
    evaluations: int = 3  # number of evaluations on dev during training; the last one is at its end

    def steps_for(self, texts: int) -> int:
        """Number of optimizer steps for a training split with this number of texts."""
        return self.steps or max(1, math.ceil(self.epochs * texts / self.batch_size))

    def problems(self) -> Iterator[Problem]:
        """Values out of range."""
        for name in ("seeds", "steps", "batch_size", "micro_batch_size", "seq_length", "evaluations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield Problem(_flag(name), getattr(self, name), "must be at least 1", "use 1 or more")
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                yield Problem(
                    _flag(name), getattr(self, name), "must be greater than 0", "use a number greater than 0"
                )
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(
                    _flag(name),
                    getattr(self, name),
                    ("must be at least 0 and less than 1"),
                    "use a number from 0 to 0.99",
                )
        if unknown := [part for part in self.freeze if part not in FREEZABLE]:
            rule = f"{unknown[0]!r} cannot be frozen"
            remedy = "use --freeze none, --freeze router, --freeze experts or --freeze router,experts"
            yield Problem("--freeze", ",".join(self.freeze), rule, remedy)


def check(settings: Settings, run: RunConfig) -> None:
    """ConfigError that lists all problems of the flags and of every k."""
    problems = list(settings.problems())
    most = (
        run.router.options.largest_topk(run.model.num_experts)
        if run.router.options
        else run.model.num_experts
    )
    asked = [("--topk", k) for k in settings.topk or ()]
    asked += [("--finetune-k", settings.finetune_k)] if settings.finetune_k is not None else []
    for flag, k in asked:
        if not 1 <= k <= most:
            rule = (
                f"must be from 1 to {most}, the largest number of experts that this model can use for a token"
            )
            problems.append(Problem(flag, k, rule, f"use 1 to {most}"))
    if problems:
        raise ConfigError(problems)


def overrides(
    settings: Settings, *, router: str, trained_topk: int, layout: Mapping[str, object], steps: int
) -> dict[str, Any]:
    """Settings by flat name that turn those of a run into those of its fine-tuning.

    ``trained_topk``: the k at which training ended; ``layout``: settings of the layout that were given.
    """
    size = settings.batch_size
    asked: dict[str, Any] = {
        **_PLAIN,
        **_WITHOUT.get(router, {}),
        "global_batch_size": size,
        "micro_batch_size": 1,  # see fitted()
        "train_iters": steps,
        "lr": settings.lr,
        "lr_decay_style": settings.lr_decay_style,
        "lr_warmup_iters": min(round(settings.warmup * steps), steps - 1),
        "weight_decay": settings.weight_decay,
        "clip_grad": settings.clip_grad,
        "hidden_dropout": settings.dropout,
        "attention_dropout": 0.0,
        "eval_interval": 0,
        "moe_router_topk": trained_topk if settings.finetune_k is None else settings.finetune_k,
        **layout,
    }
    given = {
        "moe_aux_loss_coeff": settings.aux_loss_coeff,
        "seq_length": settings.seq_length,
        "micro_batch_size": settings.micro_batch_size,
    }
    return asked | {name: value for name, value in given.items() if value is not None}


def fitted(run: RunConfig, settings: Settings, *, longest: int, world_size: int) -> RunConfig:
    """The settings of a fine-tuning for texts of at most ``longest`` tokens, with a micro-batch size if
    none was given: the same on every layout, if the batch allows it.
    """
    parallel = run.parallel
    parts = 8 * parallel.tensor_model_parallel_size
    data_size = world_size // model_parallel_size(run)
    micro = math.gcd(_MICRO_BATCH, settings.batch_size // data_size)
    return replace_leaves(
        run,
        seq_length=min(run.model.seq_length, -(-longest // parts) * parts),
        micro_batch_size=settings.micro_batch_size or micro,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
