"""Exports that fail: each gives its message and status, and leaves no incomplete folder."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import sentencepiece
from distributed import REPOSITORY
from export.made_up import TINY, make_up

from megatron_hyperrouter.commands.models.export_hf import main
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.proof.child import ask

SETTINGS = {**TINY, "num_layers": 2, "router": {"name": "hyper", "hypernet_width": 8}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("faults") / "run"
    make_up(home, SETTINGS)
    return home


def refused(run: Path, output: Path, *flags: str) -> tuple[int, str]:
    """Status and message of an export that ends with an error and leaves nothing."""
    words = ["--load", str(run), "--output", str(output), *flags]
    with pytest.raises(HyperRouterError) as error:
        main(words if "--proof-topk" in flags else [*words, "--no-proof"])
    assert not list(output.parent.iterdir())
    return error.value.exit_status, str(error.value)


def test_more_active_experts_than_there_are(run: Path, tmp_path: Path) -> None:
    status, message = refused(run, tmp_path / "out", "--topk", "5")
    assert status == 2 and "--topk = 5: must be from 1 to 4, the number of experts in a layer" in message
    status, message = refused(run, tmp_path / "out", "--proof-topk", "2", "6")
    assert (
        status == 2 and "--proof-topk = 6: must be from 1 to 4, the number of experts in a layer" in message
    )


def test_flags_that_cannot_be_followed(run: Path, tmp_path: Path) -> None:
    status, message = refused(run, tmp_path / "out", "--topk", "0")
    assert status == 2 and "--topk = 0: must be at least 1" in message
    status, message = refused(run, tmp_path / "out", "--gguf", str(run))
    assert status == 2 and f"--gguf = {run}: is not a file" in message
    status, message = refused(run, tmp_path / "out", "--gguf", str(tmp_path / "out" / "model.gguf"))
    assert status == 2 and "model.gguf: must not be in the folder of --output = " in message
    for size in ("infGB", "nanGB", "0"):
        status, message = refused(run, tmp_path / "out", "--max-shard-size", size)
        assert status == 2 and f"--max-shard-size = {size}: must be a size such as 500MB" in message
    with pytest.raises(HyperRouterError, match=r"--verify = .*: cannot be combined with --topk and --gguf"):
        main(["--verify", str(run), "--gguf", "model.gguf", "--topk", "1"])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(HyperRouterError, match="mhr import-hf --input") as error:
        main(["--load", str(tmp_path / "hf"), "--output", str(tmp_path / "out")])
    assert error.value.exit_status == 4
    with pytest.raises(HyperRouterError, match="there is no folder"):
        main(["--verify", str(tmp_path / "nowhere")])


def test_a_disk_that_fills_up(run: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status, message = refused(run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 4 and f"{tmp_path / 'out'} cannot be written: File too large" in message
    assert "free up space on that disk" in message


@pytest.mark.parametrize("harm", ["flipped bit", "missing file"])
def test_a_damaged_checkpoint(run: Path, tmp_path: Path, harm: str) -> None:
    make_up(tmp_path / "run", SETTINGS)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    victim = checkpoint / "weights-00002.safetensors"
    if harm == "missing file":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[-5] ^= 4
        victim.write_bytes(content)
    (tmp_path / "new").mkdir()
    status, message = refused(tmp_path / "run", tmp_path / "new" / "out")
    assert status == 4 and "weights-00002.safetensors" in message


def test_no_checkpoint(tmp_path: Path) -> None:
    status, message = refused(tmp_path / "nothing", tmp_path / "out")
    assert status == 4 and "the folder has no finished checkpoint" in message


@pytest.mark.parametrize("named", ["by its path", "from here"])
def test_a_python_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """Python itself, told to look at no installed package."""
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(HyperRouterError) as error:
        ask({}, python=str(bare) if named == "by its path" else "./python")
    assert error.value.exit_status == 5
    assert "ModuleNotFoundError: No module named" in str(error.value)
    assert "pip install 'megatron-hyperrouter[hf]'" in str(error.value)


def test_a_transformers_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of the other side is what this side knows it by."""
    from megatron_hyperrouter.huggingface import compare

    def load(*_: object) -> None:
        raise ValueError(
            "The checkpoint has model type `new` but Transformers does not recognize this architecture"
        )

    monkeypatch.setattr(compare, "load", load)
    with pytest.raises(SystemExit) as told:
        compare.answer({"topks": [1]})
    old = tmp_path / "python"
    old.write_text(f"#!/bin/sh\necho '{told.value.code}' >&2; exit 1\n")
    old.chmod(0o755)
    with pytest.raises(HyperRouterError, match="does not support this model class") as error:
        ask({}, python=str(old))
    assert error.value.exit_status == 5


def test_another_tokenizer_than_the_run_had(tmp_path: Path) -> None:
    from megatron_hyperrouter.data.tokenize.bpe import train_bpe

    for name, text in (("own", "to be or not to be"), ("other", "all the world is a stage")):
        train_bpe(iter([text] * 20), 270, str(tmp_path / f"{name}.json"))
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "own.json")}
    make_up(tmp_path / "run", SETTINGS | own)
    (tmp_path / "new").mkdir()
    output = tmp_path / "new" / "out"
    status, message = refused(tmp_path / "run", output, "--tokenizer-model", str(tmp_path / "other.json"))
    assert status == 2 and "is not the tokenizer of the run" in message
    (tmp_path / "own.json").unlink()  # the checkpoint has it
    main(["--load", str(tmp_path / "run"), "--output", str(output), "--no-proof"])
    assert (output / "tokenizer.json").is_file()
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    product = json.loads((output / "certificate.json").read_text())["product"]
    assert product["commit"] == (head.stdout.strip() or None) and product["version"]


def test_a_tokenizer_without_tokenizer_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be", "that is the question"] * 20),
        model_writer=model,
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_type": "GPTSentencePieceTokenizer",
        "tokenizer_model": str(tmp_path / "tokenizer.model"),
    }
    make_up(tmp_path / "run", SETTINGS | settings)
    main(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--no-proof"])
    told = capsys.readouterr()
    assert "differently from GPTSentencePieceTokenizer" in told.err + told.out
    own = [path.name for path in (tmp_path / "out").iterdir() if "tokenizer" in path.name]
    assert len(own) == 1 and (tmp_path / "out" / own[0]).read_bytes() == model.getvalue()
    assert "instead of a tokenizer.json" in (tmp_path / "out" / "README.md").read_text()
    main(["--verify", str(tmp_path / "out")])


def test_the_file_for_llama_cpp(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    main(["--load", str(run), "--output", str(tmp_path / "out"), "--no-proof", "--gguf", str(file)])
    reader = gguf.GGUFReader(file)
    assert reader.fields["qwen3moe.expert_used_count"].contents() == 2
    assert len(reader.tensors) == 2 + 2 * (9 + 3)
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    words = ["--load", str(run), "--output", str(tmp_path / "more"), "--no-proof", "--python", str(bare)]
    with pytest.raises(HyperRouterError, match="pip install gguf"):
        main([*words, "--gguf", str(tmp_path / "files" / "model.gguf")])
    assert not (tmp_path / "files").exists() and not (tmp_path / "more").exists()
    make_up(tmp_path / "mixtral", SETTINGS | {"qk_layernorm": False})
    (tmp_path / "new").mkdir()
    status, message = refused(
        tmp_path / "mixtral", tmp_path / "new" / "out", "--gguf", str(tmp_path / "other.gguf")
    )
    assert status == 4 and "llama.cpp cannot run this model" in message
    assert not (tmp_path / "other.gguf").exists()


def test_numbers_need_a_proof(run: Path, tmp_path: Path) -> None:
    main(["--load", str(run), "--output", str(tmp_path / "out"), "--no-proof"])
    with pytest.raises(HyperRouterError, match="was written with --no-proof") as error:
        main(["--verify", str(tmp_path / "out"), "--numbers"])
    assert error.value.exit_status == 4
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["proof"] is None
