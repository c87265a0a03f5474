"""``mhr lm-eval`` up to the harness, which runs in a process of its own: a stand-in takes its task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from export.made_up import make_up

from megatron_hyperrouter.commands.models import export_hf, generate
from megatron_hyperrouter.commands.models.lm_eval import main, texts_in
from megatron_hyperrouter.errors import ConfigError, DataError
from megatron_hyperrouter.proof import child

SETTINGS = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "moe_ffn_hidden_size": 16,
    "num_experts": 4,
    "moe_router_topk": 2,
    "seq_length": 32,
    "qk_layernorm": True,
}
GROUPS = {
    "qk_layernorm": False,
    "router": {"name": "topk", "score_function": "sigmoid", "num_groups": 2, "group_topk": 1},
}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the harness was asked; it answers with k as the accuracy."""
    seen: list[dict[str, Any]] = []

    def ask(task: Mapping[str, Any], *, python: str | None, script: Path) -> dict[str, Any]:
        assert script == child.HARNESS and python is None
        config = json.loads((Path(task["folder"]) / "config.json").read_text())
        seen.append(dict(task) | {"experts": config["num_experts_per_tok"]})
        rows = [{"topk": k, "task": name, "acc": float(k)} for k in task["topks"] for name in task["tasks"]]
        return {"results": rows, "versions": {"lm_eval": "0"}}

    monkeypatch.setattr(child, "ask", ask)
    return seen


def run_on(load: Path, home: Path, *flags: str) -> Any:
    text = home / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n}\nb{n}\nc\nd\ne\nf\ng\n"}) + "\n" for n in range(9)))
    words = ["--load", str(load), "--tasks", "held_out", "next_line", "--text", str(text)]
    main([*words, "--output", str(home / "scores.json"), *flags])
    return json.loads((home / "scores.json").read_text())


def test_each_k_is_a_column(
    tmp_path: Path, tasks: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_up(tmp_path / "run", SETTINGS)
    scores = run_on(tmp_path / "run", tmp_path, "--topk", "4", "1")
    (task,) = tasks
    assert task["topks"] == [4, 1] and task["experts"] == 2 and not task["include_defaults"]
    assert len(scores["results"]) == 4 and scores["versions"] == {"lm_eval": "0"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["held_out", "acc", "1.0000", "4.0000"] in lines and [
        "next_line",
        "acc",
        "1.0000",
        "4.0000",
    ] in lines
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # a file in the place of its folder
        run_on(tmp_path / "run", tmp_path, "--output", str(tmp_path / "file" / "scores.json"))
    assert tasks[1]["topks"] == [2] and "k = 2" in capsys.readouterr().out


def test_a_k_that_the_model_does_not_have(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    make_up(tmp_path / "run", SETTINGS)
    with pytest.raises(ConfigError, match="--topk = 5: must be from 1 to the 4 experts of the model"):
        run_on(tmp_path / "run", tmp_path, "--topk", "2", "5")
    make_up(tmp_path / "groups", SETTINGS | GROUPS)
    with pytest.raises(ConfigError, match="--topk = 1: must be one at which Glm4MoeForCausalLM chooses"):
        run_on(tmp_path / "groups", tmp_path, "--topk", "1", "2")  # it judges a group by two experts
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match=r"--load = .*: has no experts"):
        run_on(dense, tmp_path)
    assert tasks == []


def test_text_at_a_k_that_the_class_does_not_serve(tmp_path: Path) -> None:
    """A folder is read by our router, which judges groups as its class does at some k alone."""
    make_up(tmp_path / "groups", SETTINGS | GROUPS)
    export_hf.main(["--load", str(tmp_path / "groups"), "--output", str(tmp_path / "out"), "--no-proof"])
    words = ["--prompt", "a", "--max-new-tokens", "1", "--topk"]
    generate.main(["--load", str(tmp_path / "groups"), *words, "1", "2"])
    generate.main(["--load", str(tmp_path / "out"), *words, "2"])
    with pytest.raises(ConfigError, match="--topk = 1: must be one at which Glm4MoeForCausalLM chooses"):
        generate.main(["--load", str(tmp_path / "out"), *words, "1", "2"])


@pytest.mark.parametrize("line", ["{", '{"words": 1}', "[1]", '"text"'])
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r'a\.jsonl, line 3: is not a JSON object with a field "text"'):
        list(texts_in(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: No such file or directory\n"):
        list(texts_in(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: it is not text in UTF-8\n"):
        list(texts_in(tmp_path / "b.jsonl"))
