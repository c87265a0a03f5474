"""The GGUF file in llama.cpp: token ids, logits and greedy continuation as in transformers, at any k."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export.made_up import TINY, make_up
from tokenizers import Tokenizer

from megatron_hyperrouter.commands.data.tokenizer import main as train_tokenizer
from megatron_hyperrouter.commands.models.export_hf import main

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
TOPKS = (1, 2, 3, 8)
CONTEXT = 64
TEXTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\n",
    "don't DON'T we'll 1234567 3.14159 café żółw x²\t\n\n\n   y = [1, 2];  <|endoftext|>",
]
SIZES = {**TINY, "num_layers": 2, "hidden_size": 32, "num_experts": 8, "seq_length": CONTEXT}
CASES: dict[str, dict[str, Any]] = {
    "hyper": {"router": {"name": "hyper", "hypernet_width": 8}},
    "grouped queries, untied": {
        "router": {"name": "topk", "pre_softmax": True, "renormalise": True},
        "num_query_groups": 2,
        "kv_channels": 16,
        "rotary_base": 50000.0,
        "untie_embeddings_and_output_weights": True,
    },
}


@pytest.mark.by_hand
@pytest.mark.skipif(
    "MHR_LLAMA_CPP_PYTHON" not in os.environ, reason="MHR_LLAMA_CPP_PYTHON names no Python with llama_cpp"
)
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in TEXTS))
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(
        ["--input", str(tmp_path / "text.jsonl"), "--vocab-size", "300", "--output", str(tokenizer)]
    )
    told = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    generator = torch.Generator().manual_seed(1)
    make_up(
        tmp_path / "run",
        SIZES | CASES[case] | told,
        lambda shape: 0.3 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0),
    )
    folder, file = tmp_path / "folder", tmp_path / "model.gguf"
    main(
        ["--load", str(tmp_path / "run"), "--output", str(folder), "--no-proof", "--gguf", str(file)],
    )
    task = {
        "file": str(file),
        "context": CONTEXT,
        "texts": TEXTS,
        "topks": TOPKS,
        "prompt": "First",
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    answer = tmp_path / "answer.npz"
    python = os.environ["MHR_LLAMA_CPP_PYTHON"]
    subprocess.run([python, str(WORKER), str(tmp_path / "task.json"), str(answer)], check=True)

    found, words = np.load(answer), Tokenizer.from_file(str(folder / "tokenizer.json"))
    worst = 0.0
    for k in TOPKS:
        model = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=k).float().eval()
        for number, text in enumerate(TEXTS):
            ids = words.encode(text, add_special_tokens=False).ids
            assert found[f"ids {number}"].tolist() == ids
            with torch.no_grad():
                logits = model(torch.tensor([ids[:CONTEXT]])).logits[0].numpy()
            apart = np.abs(logits - found[f"logits {k} {number}"]).max() / logits.std()
            worst = max(worst, float(apart))
        prompt = torch.tensor([words.encode(task["prompt"], add_special_tokens=False).ids])
        greedy = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert greedy[0, prompt.size(1) :].tolist() == found[f"greedy {k}"].tolist()
    print(f"{case}: largest difference of a logit {worst:.1e} standard deviations")
    assert worst < 1e-5
