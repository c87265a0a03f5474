"""``mhr lm-eval`` up to the harness, which runs in a process of its own: a stand-in takes its task."""

from __future__ import annotations

import json
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export.made_up import TINY, make_up

from megatron_hyperrouter.commands.models import export_hf, generate, import_hf
from megatron_hyperrouter.commands.models.lm_eval import main, read_flags, texts_in, texts_of
from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError, HostError
from megatron_hyperrouter.proof import child

GROUPS = {
    "qk_layernorm": False,
    "router": {"name": "topk", "score_function": "sigmoid", "num_groups": 2, "group_topk": 1},
}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the harness was asked; it answers with k as the accuracy."""
    seen: list[dict[str, Any]] = []

    def ask(task: Mapping[str, Any], *, python: str | None, script: Path, hub: bool) -> dict[str, Any]:
        assert script == child.HARNESS
        config = json.loads((Path(task["folder"]) / "config.json").read_text())
        seen.append(dict(task) | {"experts": config["num_experts_per_tok"], "hub": hub})
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
    make_up(tmp_path / "run", TINY)
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


def test_own_tasks_beside_those_of_the_project(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    """Both folders are searched; only tasks that may need it can download data."""
    make_up(tmp_path / "run", TINY)
    (tmp_path / "own").mkdir()
    run_on(tmp_path / "run", tmp_path)
    run_on(tmp_path / "run", tmp_path, "--tasks", "held_out", "mine", "--include-path", str(tmp_path / "own"))
    assert [len(task["include_path"]) for task in tasks] == [1, 2]
    assert tasks[1]["include_path"][0] == str(tmp_path / "own")
    assert [task["hub"] for task in tasks] == [False, True]
    with pytest.raises(ConfigError, match=r"--include-path = .*/none: is not a folder"):
        run_on(tmp_path / "run", tmp_path, "--include-path", str(tmp_path / "none"))


def test_the_hub_is_out_of_reach_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    script = tmp_path / "answer.py"
    script.write_text("import os, sys\nopen(sys.argv[2], 'w').write(os.environ.get('HF_HUB_OFFLINE', '0'))\n")
    assert [child.ask({}, script=script, hub=hub) for hub in (False, True)] == [1, 0]


@pytest.mark.parametrize("word, rule", [("text.jsonl/a.json", "cannot be written"), (".", "is not a file")])
def test_an_output_that_cannot_be_written_is_refused_first(
    tmp_path: Path, tasks: list[dict[str, Any]], word: str, rule: str
) -> None:
    make_up(tmp_path / "run", TINY)
    with pytest.raises(ConfigError, match=f"--output = .*: {rule}"):
        run_on(tmp_path / "run", tmp_path, "--output", str(tmp_path / word))
    assert tasks == [] and {path.name for path in tmp_path.iterdir()} == {"run", "text.jsonl"}


def test_a_missing_library_is_named_before_any_work(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    python = tmp_path / "bin" / "python"
    venv.create(python.parent.parent, symlinks=True)
    make_up(tmp_path / "run", TINY)
    with pytest.raises(HostError, match=r"cannot import lm_eval and transformers and accelerate\n") as error:
        run_on(tmp_path / "run", tmp_path, "--python", str(python))
    assert "pip install 'megatron-hyperrouter[hf,eval]'" in str(error.value)
    out, other = str(tmp_path / "out"), ["--python", str(python)]
    for flags, library in (([], "transformers"), (["--no-proof", "--gguf", str(tmp_path / "m")], "gguf")):
        with pytest.raises(HostError, match=f"cannot import {library}\n"):
            export_hf.main(["--load", str(tmp_path / "run"), "--output", out, *flags, *other])
    with pytest.raises(HostError, match="cannot import transformers\n"):
        import_hf.main(["--input", str(tmp_path / "run"), "--output", out, *other])
    with pytest.raises(HostError, match="is not a working Python"):
        child.require(child.GGUF, python="false")
    assert tasks == [] and not (tmp_path / "out").exists()


def test_the_harness_needs_a_tokenizer_of_text(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    make_up(tmp_path / "ids", TINY | {"tokenizer_type": "NullTokenizer", "vocab_size": 60})
    with pytest.raises(
        ConfigError, match=r"--load = .*: was trained with a NullTokenizer, which the harness cannot read"
    ):
        run_on(tmp_path / "ids", tmp_path)
    folder = tmp_path / "folder"
    export_hf.main(["--load", str(tmp_path / "ids"), "--output", str(folder), "--no-proof"])
    with pytest.raises(ConfigError, match=r"--load = .*: has no tokenizer"):
        run_on(folder, tmp_path)
    make_up(tmp_path / "run", TINY)
    export_hf.main(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "text"), "--no-proof"])
    given = str(tmp_path / "text" / "tokenizer.json")
    with pytest.raises(ConfigError, match="has 257 token ids, but the model's vocab_size is only 128"):
        run_on(folder, tmp_path, "--tokenizer-model", given)
    run_on(tmp_path / "text", tmp_path, "--tokenizer-model", given)
    assert len(tasks) == 1 and tasks[0]["tokenizer"].endswith("/tokenizer")


def corpus(prefix: Path, word: str) -> str:
    """A byte-level token file of ten documents."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(10):
            writer.add_document(np.array([*f"{word} {number} ".encode() * 8, 256], np.uint16))
    return str(prefix)


def test_texts_come_from_token_files(tmp_path: Path) -> None:
    """Those of the run's test split, or those of --data-path."""
    seen: list[list[str]] = []
    make_up(tmp_path / "run", TINY | {"data_path": [corpus(tmp_path / "own", "west")], "split": "8,1,1"})
    other = corpus(tmp_path / "other", "north")
    words = f"--load {tmp_path}/run --tasks held_out --output {tmp_path}/scores.json".split()
    for flags in ([], ["--data-path", other]):
        seen.append(texts_of(read_flags([*words, *flags])))
    assert seen[0] and "".join(seen[0]) in "west 9 " * 8  # once, without its end
    assert sum(map(len, seen[1])) > 9 * len("north 0 ") * 8 and set("".join(seen[1])) == set(
        "north 0123456789"
    )
    for more, message in (
        (["--text", "a.jsonl"], "--text cannot be combined with --data-path"),
        (["--load", str(tmp_path / "hf")], "a run"),
    ):
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match=message):
            main([*words, "--data-path", other, *more])


def test_a_k_that_the_model_does_not_have(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    make_up(tmp_path / "run", TINY)
    with pytest.raises(
        ConfigError, match="--topk = 5: must be from 1 to 4, the number of experts in a layer"
    ):
        run_on(tmp_path / "run", tmp_path, "--topk", "2", "5")
    make_up(tmp_path / "groups", TINY | GROUPS)
    with pytest.raises(
        ConfigError, match=r"--topk = 1: must be .*: for any other k, Glm4MoeForCausalLM chooses"
    ):
        run_on(tmp_path / "groups", tmp_path, "--topk", "1", "2")  # it judges a group by two experts
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match=r"--load = .*: is not a mixture-of-experts model"):
        run_on(dense, tmp_path)
    assert tasks == []


@pytest.mark.parametrize("words", [[], ["--custom-code"]])
def test_a_k_beyond_the_groups_of_a_folder(
    tmp_path: Path, tasks: list[dict[str, Any]], words: list[str]
) -> None:
    make_up(tmp_path / "groups", TINY | GROUPS)
    export_hf.main(
        ["--load", str(tmp_path / "groups"), "--output", str(tmp_path / "o"), "--no-proof", *words]
    )
    run_on(tmp_path / "o", tmp_path, "--topk", "1", "2")
    for load, where in (("o", "a token may use"), ("groups", "--router.group-topk allows")):
        with pytest.raises(ConfigError, match=f"--topk = 3: must be from 1 to 2, .* groups that {where}"):
            run_on(tmp_path / load, tmp_path, "--topk", "3")
    assert len(tasks) == 1


def test_text_at_a_k_that_the_class_does_not_serve(tmp_path: Path) -> None:
    """A folder is read by our router, which judges groups as its class does at some k alone."""
    make_up(tmp_path / "groups", TINY | GROUPS)
    export_hf.main(["--load", str(tmp_path / "groups"), "--output", str(tmp_path / "out"), "--no-proof"])
    words = ["--prompt", "a", "--max-new-tokens", "1", "--topk"]
    generate.main(["--load", str(tmp_path / "groups"), *words, "1", "2"])
    generate.main(["--load", str(tmp_path / "out"), *words, "2"])
    with pytest.raises(
        ConfigError, match=r"--topk = 1: must be .*: for any other k, Glm4MoeForCausalLM chooses"
    ):
        generate.main(["--load", str(tmp_path / "out"), *words, "1", "2"])


def test_what_no_folder_or_run_has(tmp_path: Path) -> None:
    make_up(tmp_path / "bias", TINY | {"router": {"name": "hyper", "bias": True}})
    words = ["--load", str(tmp_path / "bias"), "--output", str(tmp_path / "own"), "--no-proof"]
    export_hf.main([*words, "--custom-code"])
    with pytest.raises(
        CheckpointError, match="if mhr export-hf wrote this folder, use the run that was exported"
    ):
        generate.main(["--load", str(tmp_path / "own"), "--prompt", "a"])
    words = ["--load", str(tmp_path / "bias"), "--tasks", "held_out", "--output", str(tmp_path / "s.json")]
    with pytest.raises(DataError, match="this run was imported and has no data"):
        texts_of(read_flags(words))
    with pytest.raises(ConfigError, match="--limit = 0: must be at least 1"):
        read_flags([*words, "--limit", "0"])


@pytest.mark.parametrize("line", ["{", '{"words": 1}', "[1]", '"text"'])
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r'a\.jsonl, line 3: must be a JSON object with a field "text"'):
        list(texts_in(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: No such file or directory\n"):
        list(texts_in(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: it is not UTF-8 text\n"):
        list(texts_in(tmp_path / "b.jsonl"))
