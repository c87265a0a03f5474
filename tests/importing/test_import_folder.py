"""Which files and settings of a Hugging Face folder count, without transformers."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export.made_up import TINY, make_up
from importing.given import edit_config
from safetensors.torch import load_file, save_file

from megatron_hyperrouter.commands.models import export_hf, generate, import_hf
from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError
from megatron_hyperrouter.importing.source import open_folder
from megatron_hyperrouter.paths import expanded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3-MoE in several files."""
    make_up(tmp_path / "run", TINY)
    words = ["--load", str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--no-proof"]
    export_hf.main([*words, "--max-shard-size", "20KB"])
    return tmp_path / "hf"


def imported(folder: Path, *flags: str) -> Path:
    output = folder.with_name("imported")
    import_hf.main(["--input", str(folder), "--output", str(output), "--no-proof", *flags])
    return output


def test_the_printed_command_fits_any_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.with_name("a $run")
    import_hf.main(["--input", str(folder), "--output", str(output).replace("$", "$$"), "--no-proof"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("To train it: "))
    words = shlex.split(line)
    assert Path(expanded(words[words.index("--load") + 1])) == output
    assert Path(expanded(words[words.index("--config") + 1])) == output / "config.yaml"
    hf = folder.rename(folder.with_name("$hf"))  # with a tokenizer file
    generate.main(["--load", str(hf).replace("$", "$$"), "--prompt", "a", "--max-new-tokens", "1"])


def test_files_that_transformers_does_not_read(folder: Path) -> None:
    """Mistral's folders have their weights a second time."""
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert imported(folder).is_dir()


def test_one_file_counts_before_an_index(folder: Path) -> None:
    """The shards are left from an earlier save."""
    tensors = {}
    for path in folder.glob("model-*.safetensors"):
        tensors |= load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    read = open_folder(folder).reader.read("model.norm.weight")
    assert torch.equal(read, tensors["model.norm.weight"])


def test_an_index_that_does_not_fit_its_files(folder: Path) -> None:
    next(folder.glob("model-00001-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.safetensors cannot be read"):
        imported(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read as a list of weight files"):
        imported(folder)


@pytest.mark.parametrize(
    ("architecture", "settings", "theta"),
    [
        ("LlamaForCausalLM", {"rope_scaling": None}, 1e4),  # as Llama 2 has it
        ("MixtralForCausalLM", {"rope_theta": None}, 1e6),
        ("LlamaForCausalLM", {"rope_theta": 5e5}, 5e5),
        ("LlamaForCausalLM", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}}, 7e5),
    ],
)
def test_the_base_of_rotary_positions(
    tmp_path: Path, architecture: str, settings: dict[str, Any], theta: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **settings}))
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_folder(tmp_path).theta == theta


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_position_embeddings", None, "max_position_embeddings is None, but must be a positive number"),
        ("hidden_size", "16", "hidden_size is '16', but must be a positive number"),
        ("decoder_sparse_step", 0, "decoder_sparse_step is 0, but must be a positive number"),
        ("rope_scaling", "yarn", "rope_scaling is 'yarn', but must be an object"),
        ("num_experts", math.nan, "num_experts is nan, but must be a positive number"),
        ("hidden_size", 16.5, "hidden_size is 16.5, but must be an integer"),
        ("mlp_only_layers", 1, "mlp_only_layers is 1, but must be a list"),
    ],
)
def test_values_of_another_type(folder: Path, name: str, value: object, message: str) -> None:
    edit_config(folder, **{name: value})
    with pytest.raises(CheckpointError, match=message):
        imported(folder)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(folder: Path, tmp_path: Path) -> None:
    """257 ids of bytes, and 128 rows."""
    make_up(tmp_path / "ids", TINY | {"tokenizer_type": "NullTokenizer", "vocab_size": 100})
    words = ["--load", str(tmp_path / "ids"), "--output", str(tmp_path / "small"), "--no-proof"]
    export_hf.main(words)
    given = str(folder / "tokenizer.json")
    rule = r"--tokenizer-model = .*: has 257 token ids, but the model's vocab_size is only 128"
    with pytest.raises(ConfigError, match=rule):
        imported(tmp_path / "small", "--tokenizer-model", given)
    with pytest.raises(ConfigError, match=rule):
        generate.main(["--load", str(tmp_path / "small"), "--prompt", "a", "--tokenizer-model", given])
    assert not (tmp_path / "imported").exists()
    # generate needs only the ids of the prompt
    shutil.copy(given, tmp_path / "small" / "tokenizer.json")
    generate.main(["--load", str(tmp_path / "small"), "--prompt", "a", "--max-new-tokens", "1"])
    with pytest.raises(DataError, match="a prompt has the token id 195, but the model has only 128 ids"):
        generate.main(["--load", str(tmp_path / "small"), "--prompt", "é", "--max-new-tokens", "1"])


def test_a_folder_without_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(folder)
    assert "no tokenizer for text" not in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    shutil.rmtree(folder.with_name("imported"))
    imported(folder)
    assert "has no tokenizer.json, so the run has no tokenizer for text" in capsys.readouterr().err
