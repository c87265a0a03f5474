"""Ranks of the fine-tuning tests: each case runs in a fork of its own, see :func:`distributed.serve_cases`.

A case: ``do`` (a function below) and its arguments.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distributed import serve_cases

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.checkpoint.weights import read_tensors
from megatron_hyperrouter.commands.models import finetune
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.finetuning.batches import Feed, encoded
from megatron_hyperrouter.finetuning.session import predictions
from megatron_hyperrouter.finetuning.tasks import Example
from megatron_hyperrouter.model.classifier import Classifier
from megatron_hyperrouter.model.names import matrices
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.run_meta import run_meta

TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --moe-ffn-hidden-size 16 "
    "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.05 --seq-length 48 --init-method-std 0.1 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-2 --mock-data "
    "--tokenizer-type ByteTokenizer"
).split()
TEXTS = [
    Example(text, number % 2) for number, text in enumerate(["a", "a film", "not so bad at all", "it is"])
]


def pretrain(run_dir: str, flags: list[str]) -> None:
    """A run of three steps on made-up tokens, as the program leaves it."""
    config = parse([*TINY, *flags, "--run-dir", run_dir], routers=ROUTERS, world_size=1)
    engine = open_engine(config, vocab_size=257)
    generator = torch.Generator().manual_seed(5)
    try:
        for step in range(3):
            rows = torch.randint(0, 257, (4, 49), generator=generator)
            pairs = [(rows[n : n + 2, :-1].contiguous(), rows[n : n + 2, 1:].contiguous()) for n in (0, 2)]
            engine.train_step(iter(pairs), step=step, learning_rate=1e-2)
        described = describe(config, tokenizer=tokenizer_of(config.data).identity())
        meta = run_meta(config, engine) | described.meta
        folders = CheckpointFolders(Path(run_dir) / "checkpoints", engine)
        folders.save(3, engine.save, meta, texts=described.texts)
    finally:
        engine.close()


def command(flags: list[str]) -> None:
    """``mhr finetune`` with these flags."""
    finetune.main(flags)


def stopped(flags: list[str], after: int) -> int:
    """The status of ``mhr finetune`` if it gets SIGTERM after that number of steps."""
    steps = iter(range(1, 1000))

    class Interrupted(finetune.Bar):
        def update(self, done: float, total: float, words: str = "") -> None:
            super().update(done, total, words)
            if next(steps) == after:
                signal.raise_signal(signal.SIGTERM)

    finetune.Bar = Interrupted  # type: ignore[misc]  # of this fork
    try:
        finetune.main(flags)
    except SystemExit as error:
        return int(str(error.code))
    return 0


def with_head(load: str, freeze: tuple[str, ...] = (), **settings: object) -> tuple[TrainedRun, Any]:
    """The run and its model with a head of three classes."""
    run = TrainedRun.open(load, overrides={"global_batch_size": 4, "micro_batch_size": 4, **settings})
    classifier = Classifier(3, freeze=frozenset(freeze))
    engine = run.open_engine(run.tokenizer(), classifier=classifier, for_training=True)
    run.load_into(engine)
    return run, engine


def padding(load: str, engine: str) -> dict[str, Any]:
    """What a step and a test say of texts with less and with more padding, and of each text alone."""
    run, host = with_head(load, engine=engine)
    part = encoded(TEXTS, run.tokenizer(), 48)
    told: dict[str, Any] = {"steps": []}
    for length in (24, 48):
        feed = Feed(host.config, host.place)
        feed._fixed, feed._length = True, length
        result = host.train_step(
            feed.step(part, step=0, seed=1), step=3, learning_rate=0.0, accept=lambda result: False
        )
        layers = {name: result.layers[name] for name in ("entropy", "load_max_over_mean", "aux", "z")}
        told["steps"].append({"loss": result.lm_loss, "norm": result.grad_norm, **layers})
    told["together"] = predictions(host, part, 2).tolist()
    told["alone"] = []
    for row in range(len(part)):
        one = replace(part, ids=[part.ids[row]] * 4, classes_N=part.classes_N[[row] * 4])
        feed = Feed(host.config, host.place)
        feed._multiple = 1  # no padding at all
        assert (next(feed.all(one))[0] >= 0).all()
        told["alone"].append(predictions(host, one, 2, feed=feed)[0].tolist())
    host.close()
    return told


def without_padding(load: str) -> dict[str, Any]:
    """What the routers chose for texts of equal length: with a head, and in the language model."""
    run, host = with_head(load)
    part = encoded(
        [Example("seven b", 0), Example("letters", 1), Example("in each", 2), Example("of four", 0)],
        run.tokenizer(),
        48,
    )
    tokens_BS, labels_BS = next(Feed(host.config, host.place).all(part))
    assert (tokens_BS >= 0).all()
    found = [
        host.train_step(iter([(tokens_BS, labels_BS)]), step=3, learning_rate=0.0, accept=lambda r: False)
    ]
    host.close()
    plain: Any = open_engine(run.settings, vocab_size=257)
    run.load_into(plain)
    found.append(plain.train_step(iter([(tokens_BS, tokens_BS)]), step=3, learning_rate=0.0))
    plain.close()
    return {"layers": [dict(result.layers) for result in found]}


def freezing(load: str, freeze: list[str], engine: str, zero_stage: int = 1) -> dict[str, Any]:
    """The names of the weights whose bytes change in a step."""
    run, host = with_head(load, tuple(freeze), engine=engine, zero_stage=zero_stage)
    part = encoded(TEXTS, run.tokenizer(), 48)
    before = {name: router.state_dict() for name, router in host.routers.items()}
    before = {n + key: value.clone() for n, state in before.items() for key, value in state.items()}
    host.train_step(Feed(host.config, host.place).step(part, step=0, seed=1), step=3, learning_rate=1e-2)
    after = dict(matrices(host.holding().named))
    after |= {
        n + key: value for n, router in host.routers.items() for key, value in router.state_dict().items()
    }
    names = [name for name, tensor in sorted(after.items()) if tensor.is_floating_point()]
    names = [name for name in names if not name.startswith("classifier.")]
    saved = read_tensors(run.checkpoint, names)
    told = {
        "changed": [n for n in names if after[n].detach().numpy().tobytes() != saved[n].numpy().tobytes()],
        "all": names,
        "trained": [piece.name for piece in host.holding().pieces()],
    }
    host.close()
    return told


if __name__ == "__main__":
    serve_cases(lambda case: globals()[case.pop("do")](**case))
