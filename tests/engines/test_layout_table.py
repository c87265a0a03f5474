"""The comparison that all layout tests use: it finds a wrong number, and names it."""

from __future__ import annotations

import pytest
from engines.layout_table import TOLERANCES, Layout, Table, run_table
from program.launched import Zygote

LAYOUTS = {  # settings that the reference has not
    "same": Layout(1, "--engine megatron"),
    "gradients 5e-5 too large": Layout(1, "--clip-grad 1.00005"),
    "balance loss 1 % too large": Layout(1, "--engine megatron --moe-aux-loss-coeff 0.0101"),
    "fewer samples": Layout(1, "--global-batch-size 6"),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, LAYOUTS, ["hyper"], tmp_path_factory.mktemp("table"))


def exceeded(table: Table, name: str) -> dict[str, str]:
    """number -> where, for each beyond its tolerance."""
    found = table.differences("hyper", name)
    return {number: where for number, (value, where) in found.items() if value > TOLERANCES[number]}


def test_nothing_is_wrong_with_the_same_run(table: Table) -> None:
    assert exceeded(table, "same") == {}


def test_gradients_tell_what_no_other_number_does(table: Table) -> None:
    assert set(exceeded(table, "gradients 5e-5 too large")) == {"gradients"}
    assert table.differences("hyper", "gradients 5e-5 too large")["gradients"][0] == pytest.approx(
        5e-5, rel=0.05
    )


def test_a_wrong_loss_is_told_by_the_parameter_that_it_trains(table: Table) -> None:
    told = exceeded(table, "balance loss 1 % too large")
    assert told["gradients"] == "decoder.layers.1.mlp.router.embedding_S" and "grad_norm" in told


def test_another_batch_is_another_run(table: Table) -> None:
    assert set(exceeded(table, "fewer samples")) == set(TOLERANCES)
