"""A copied folder is checked against its certificate with Python's standard library alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import REPOSITORY
from safetensors.torch import save_file

from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.verify import differences, read_certificate


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shards, and a certificate made by the library and hashlib."""
    folder = tmp_path_factory.mktemp("verify") / "folder"
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"embed": torch.arange(12.0).view(3, 4), "gate": torch.ones(5)},
        "model-00002-of-00002.safetensors": {"norm": torch.full((4,), 2.0, dtype=torch.bfloat16)},
    }
    tensors = {}
    for name, content in shards.items():
        save_file(content, folder / name)
        for key, tensor in content.items():
            tensors[key] = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    (folder / "config.json").write_text('{"num_experts_per_tok": 2}')
    (folder / "tokenizer.json").write_text("{}")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    (folder / "certificate.json").write_text(json.dumps({"format": 1, "files": files, "tensors": tensors}))
    return folder


def flip(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(5).numpy().tobytes()) + 6] ^= 1
    path.write_bytes(content)


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def download(folder: Path) -> None:
    """What the Hugging Face hub adds."""
    (folder / ".gitattributes").touch()
    (folder / ".cache" / "huggingface").mkdir(parents=True)


HARM: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda folder: None, []),
    "downloaded from the hub": (download, []),
    "a bit flipped": (flip, ["gate (F32 [5]) has changed"]),
    "config edited": (
        rewrite("config.json", '{"num_experts_per_tok": 4}'),
        ["config.json: the file has changed"],
    ),
    "another tokenizer": (
        rewrite("tokenizer.json", '{"a":0}'),
        ["tokenizer.json: the file has 7 bytes instead of 2"],
    ),
    "shard missing": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        ["model-00002-of-00002.safetensors: missing", "norm: missing"],
    ),
    "file too many": (rewrite("notes.txt", "mine"), ["notes.txt: the certificate does not list this file"]),
    "header cut off": (cut, ["the safetensors header is cut off", "norm: missing"]),
}


@pytest.mark.parametrize("harm", HARM)
def test_every_difference_is_named(original: Path, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(original, tmp_path / "copy")
    change, expected = HARM[harm]
    change(folder)
    found = differences(folder, read_certificate(folder))
    assert bool(found) == bool(expected)
    for line in expected:
        assert any(line in each for each in found), found


def test_the_command_needs_the_standard_library_alone(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "copy")

    def verify() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-S", "-m", "megatron_hyperrouter", "export-hf", "--verify", str(folder)]
        environment = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    good = verify()
    assert good.returncode == 0, good.stderr
    assert "3 tensors and 4 files match the certificate" in good.stdout
    flip(folder)
    bad = verify()
    assert (
        bad.returncode == 4 and "gate (F32 [5]) has changed" in bad.stderr and "Traceback" not in bad.stderr
    )


def test_a_folder_without_a_certificate_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a finished export"):
        read_certificate(tmp_path)
    (tmp_path / "certificate.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_certificate(tmp_path)
