"""A small registry: the room under test takes routers as an argument and needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge

from megatron_hyperrouter.errors import Problem


class Hyper:
    """A generated router."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        hypernet_width: Annotated[int, Ge(1), "hidden units"] = 256
        init: Annotated[Literal["width", "paper"], "initialisation"] = "width"
        bias: Annotated[bool, "generate a bias"] = False
        seed: Annotated[int | None, Ge(0), "of the frozen part"] = None

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            if self.hypernet_width > hidden_size * num_experts:
                yield Problem(
                    "--router.hypernet-width", self.hypernet_width, "is wider than what it makes", "use less"
                )

        def warnings(self, *, topk: int) -> Iterator[str]:
            if topk == 1:
                yield "the router gets no gradient"

        def initial_logit_std(self, hidden_size: int) -> float | None:
            return None

        def lost(self, *, num_layers: int, aux_loss_coeff: float) -> Iterator[str]:
            if self.seed == num_layers and not aux_loss_coeff:
                yield f"no loss in {num_layers} layers"


class Plain:
    """A trained router."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        init_std: Annotated[float, Ge(0.0), "of the weights"] = 0.02
        milestones: Annotated[tuple[int, ...], "steps"] = (1, 2)
        seed: Annotated[int | None, Ge(0), "unused"] = None

        def warnings(self, *, topk: int) -> Iterator[str]:
            return iter(())

        def initial_logit_std(self, hidden_size: int) -> float | None:
            return None

        def lost(self, *, num_layers: int, aux_loss_coeff: float) -> Iterator[str]:
            return iter(())


@pytest.fixture(scope="session")
def routers() -> dict[str, Any]:
    return {"hyper": Hyper, "plain": Plain}


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and returns its path."""

    def writer(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return writer
