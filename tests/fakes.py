"""Small stand-ins for tests: ranks, an engine that really trains, and data that needs no files."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hyperrouter.engines.base import Batch, Deviation, EvalResult, OwnPart, RankPlace, StepResult


class Alone:
    """The only rank."""

    place = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def first_word(self, word: str) -> str:
        return word


class ThreadRanks:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, meeting: threading.Barrier, told: list[object]) -> None:
        self.place = RankPlace(rank=rank, world_size=len(told), data_rank=rank, data_size=len(told))
        self._meeting, self._told = meeting, told

    def any_rank(self, flag: bool) -> bool:
        return any(self._all(flag))

    def first_word(self, word: str) -> str:
        return next((str(each) for each in self._all(word) if each), "")

    def _all(self, own: object) -> list[object]:
        self._told[self.place.rank] = own
        self._meeting.wait(timeout=20)
        answer = list(self._told)
        self._meeting.wait(timeout=20)  # nobody may tell the next thing before all have read this one
        return answer

    @staticmethod
    def run(world_size: int, work: Callable[[ThreadRanks], object]) -> list[object]:
        """What ``work`` returned on each rank, or the exception that it raised."""
        meeting = threading.Barrier(world_size)
        told: list[object] = [None] * world_size
        answers: list[object] = [None] * world_size

        def one(rank: int) -> None:
            try:
                answers[rank] = work(ThreadRanks(rank, meeting, told))
            except Exception as error:  # noqa: BLE001 - handed to the test
                answers[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


@dataclass
class FakeStaged:
    """The state of a :class:`FakeEngine`, copied."""

    state: dict[str, Any]

    def write(self, folder: Path) -> list[Path]:
        torch.save(self.state, folder / "rank0.pt")
        return [folder / "rank0.pt"]

    def join(self, folder: Path) -> None:
        assert (folder / "rank0.pt").exists()


class FakeEngine:
    """A bigram table under Adam with dropout on its logits: the least that has weights, optimizer and random
    state.

    More active experts sharpen its predictions a little, so that k shows in the losses.
    """

    def __init__(
        self, vocab_size: int, *, topk_at: Callable[[int], int] = lambda step: 2, seed: int = 0
    ) -> None:
        self.place = Alone.place
        self.patience = 1800.0
        self.topk_at = topk_at
        torch.manual_seed(seed)
        self.table_VV = torch.nn.Parameter(torch.randn(vocab_size, vocab_size) * 0.1)
        self.optimizer = torch.optim.Adam([self.table_VV])
        self.steps_taken: list[int] = []
        self.micro_batches: list[int] = []
        self.batches_scored = 0
        self.aux_loss_coeffs: list[float] = []
        self.similarities: list[dict[int, float]] = []  # what the next measurements say
        self.loss_offset = 0.0  # nan: a run that diverged
        self.compared: list[int] = []  # after how many steps the replicas were
        self.strays: list[Deviation] = []

    def train_step(
        self,
        batches: Iterator[Batch],
        *,
        step: int,
        learning_rate: float,
        stop: Callable[[], int] = bool,
        accept: Callable[[StepResult], bool] = lambda result: True,
        detailed: bool = True,
    ) -> StepResult:
        self.steps_taken.append(step)
        self._last = (list(batches), step, torch.get_rng_state())
        self._first_offset = self.loss_offset
        self.micro_batches.append(len(self._last[0]))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        result = self._forward_backward(stop)
        if not accept(result):
            torch.set_rng_state(self._last[2])
            return replace(result, applied=False)
        self.optimizer.step()
        return result

    def _forward_backward(self, stop: Callable[[], int]) -> StepResult:
        held, step, _ = self._last
        self.optimizer.zero_grad()
        losses = [self._loss(batch, self.topk_at(step), dropout=0.1) for batch in held]
        loss = torch.stack(losses).mean() + self.loss_offset
        loss.backward()
        assert self.table_VV.grad is not None
        norm = self.table_VV.grad.norm().item()
        layers = {"entropy": (1.25, 0.75), "load_max_over_mean": (1.5, 2.0), "dead_experts": (0.0, 1.0)}
        return StepResult(loss.item(), 1.0, 0.5, norm, layers, self.any_rank(bool(stop())), peak_memory=2**20)

    def again(self) -> tuple[StepResult, list[OwnPart]]:
        result = self._forward_backward(bool)
        torch.set_rng_state(self._last[2])
        return result, [OwnPart(0, "here", "cpu", (self._first_offset, self.loss_offset), "")]

    def leave_out(self, step: int, stop: Callable[[], int]) -> bool:
        return self.any_rank(bool(stop()))

    def evaluate(
        self, batches: Iterator[Batch], *, topk: int, token_bytes_V: Tensor | None = None
    ) -> EvalResult:
        loss_sum, tokens, target_bytes, self.batches_scored = 0.0, 0, 0, 0
        for tokens_BS, labels_BS in batches:
            with torch.no_grad():
                self.batches_scored += 1
                counted = int((labels_BS >= 0).sum())
                mean = self._loss((tokens_BS, labels_BS), topk, dropout=0.0).item() if counted else 0.0
                loss_sum += mean * counted
            tokens += counted
            target_bytes += (
                0 if token_bytes_V is None else int(token_bytes_V[labels_BS[labels_BS >= 0]].sum())
            )
        return EvalResult(loss_sum, tokens, target_bytes)

    def stage(self) -> FakeStaged:
        state = {
            "table": self.table_VV.data,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        return FakeStaged(copy.deepcopy(state))

    def save(self, folder: Path) -> None:
        self.stage().write(folder)

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        state = torch.load(folder / "rank0.pt", weights_only=True)
        self.table_VV.data.copy_(state["table"])
        if not weights_only:
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])

    def barrier(self) -> None:
        pass

    def deviations(self) -> list[Deviation]:
        self.compared.append(len(self.steps_taken))
        return self.strays

    def expert_similarity(self, tokens_BS: Tensor, *, topk: int) -> dict[int, float]:
        return self.similarities.pop(0) if self.similarities else {}

    def set_aux_loss_coeff(self, value: float) -> None:
        self.aux_loss_coeffs.append(value)

    def wait_at_most(self, seconds: float) -> None:
        pass

    def any_rank(self, flag: bool) -> bool:
        return flag

    def first_word(self, word: str) -> str:
        return word

    def close(self) -> None:
        pass

    def _loss(self, batch: Batch, topk: int, *, dropout: float) -> Tensor:
        tokens_BS, labels_BS = batch
        logits_NV = F.dropout(self.table_VV[tokens_BS.flatten()], dropout) * (1 + 0.1 * topk)
        return F.cross_entropy(logits_NV, labels_BS.flatten(), ignore_index=-1)


class FakeDataset:
    """Samples of ``seq_length + 1`` tokens from a fixed noisy cycle: a bigram table can learn it."""

    def __init__(self, num_samples: int, *, seq_length: int = 8, vocab_size: int = 16, seed: int = 0) -> None:
        self._shape = (num_samples, seq_length, vocab_size, seed)

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        num_samples, seq_length, vocab_size, seed = self._shape
        if not 0 <= index < num_samples:
            raise IndexError(index)
        random = np.random.default_rng((seed, index))
        steps = 1 + (random.random(seq_length + 1) < 0.2)
        return (np.cumsum(steps) % vocab_size).astype(np.int64)
