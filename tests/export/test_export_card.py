"""What the model card says and warns of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from export.made_up import TINY, make_up

from megatron_hyperrouter.commands.models.export_hf import main
from megatron_hyperrouter.export.card import notes_of


@pytest.mark.parametrize(("run_dir", "name"), [(".", "run"), ("runs/first", "first")])
def test_the_card_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str, name: str
) -> None:
    make_up(tmp_path / "run", TINY, run_dir=run_dir)
    monkeypatch.chdir(tmp_path / "run")
    main(["--load", ".", "--output", str(tmp_path / "out"), "--no-proof"])
    assert f"\n# {name}\n" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["source"]["run"] == name


@pytest.mark.parametrize(
    ("model_type", "rope_type", "mscale_all_dim", "warned"),
    [
        ("deepseek_v2", "yarn", 0.7, True),
        ("deepseek_v2", None, 0.7, True),  # the default of latent attention
        ("deepseek_v2", "yarn", 0.0, False),  # no temperature
        ("deepseek_v2", "rope", 0.7, False),  # a setting of YaRN
        ("deepseek_v3", "yarn", 0.7, False),  # transformers 4 has it in this class
    ],
)
def test_transformers_4_is_named_where_it_computes_another_model(
    model_type: str, rope_type: str | None, mscale_all_dim: float, warned: bool
) -> None:
    run: Any = SimpleNamespace(
        model=SimpleNamespace(mtp_num_layers=None, moe_expert_capacity_factor=None),
        attention=SimpleNamespace(
            rope_type=rope_type, mscale_all_dim=mscale_all_dim, multi_latent_attention=True
        ),
    )
    tokenizer: Any = SimpleNamespace(type="NullTokenizer")
    target: Any = SimpleNamespace(model_type=model_type)
    notes = [line for line in notes_of(run, tokenizer, target) if "transformers 4" in line]
    assert len(notes) == warned
