"""GGUF files read back with the library that llama.cpp's own converter writes with."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.tokenizer import ByteTokenizer
from megatron_hyperrouter.data.tokenize.transformers_files import write_tokenizer
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.classes.grouped import MIXTRAL_MOE, QWEN3_MOE
from megatron_hyperrouter.export.classes.names import QWEN, Heads, ModelShape, cut, tensor_sources
from megatron_hyperrouter.export.classes.target import config_json, target_of
from megatron_hyperrouter.export.gguf import check_gguf
from megatron_hyperrouter.huggingface.gguf_file import main
from megatron_hyperrouter.importing.settings import run_of
from megatron_hyperrouter.routers import ROUTERS

SETTINGS = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "moe_ffn_hidden_size": 12,
    "num_experts": 4,
    "moe_router_topk": 2,
    "qk_layernorm": True,
}
ROWS = 384
KEPT, SWITCH = (ROUTERS["topk"].Config(pre_softmax=on) for on in (False, True))


def model(run: RunConfig) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's names."""
    shapes = {"embed": (ROWS, 16), "qkv": (32, 16), "proj": (16, 16), "fc1": (24, 16), "fc2": (16, 12)}
    found = {}
    for name, place in tensor_sources(ModelShape.of(run), QWEN).items():
        ours = place.ours[0]
        default = (4,) if "_layernorm" in ours else (16,)
        shape = next((shape for word, shape in shapes.items() if word in ours), default)
        if ours.endswith("router.weight"):
            shape = (4, 16)
        if ours.endswith(("input_layernorm.weight", "pre_mlp_layernorm.weight", "final_layernorm.weight")):
            shape = (16,)
        found[name] = cut([torch.randn(shape)], place.part, Heads(4, 2, 4)).contiguous()
    return found


def test_the_file_holds_the_same_numbers(tmp_path: Path) -> None:
    run, tokenizer = run_of(SETTINGS), ByteTokenizer()
    given = model(run)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(given, folder / "model.safetensors")
    target = target_of(QWEN3_MOE, run, KEPT)
    config = config_json(run, target, rows=ROWS, eod=tokenizer.eod, dtype="float32", topk=2)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, tokenizer, seq_length=run.model.seq_length)
    task = {"folder": str(folder), "file": str(tmp_path / "model.gguf"), "name": "model"}
    (tmp_path / "task.json").write_text(json.dumps(task))
    main([str(tmp_path / "task.json"), str(tmp_path / "answer.json")])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(found) == 2 + 2 * (9 + 3)
    assert torch.equal(found["token_embd.weight"], given["model.embed_tokens.weight"])
    for name, theirs in (("ffn_gate_inp", "mlp.gate"), ("attn_q", "self_attn.q_proj")):
        assert torch.equal(found[f"blk.1.{name}.weight"], given[f"model.layers.1.{theirs}.weight"])
    for name, leaf in (
        ("ffn_gate_exps", "gate_proj"),
        ("ffn_up_exps", "up_proj"),
        ("ffn_down_exps", "down_proj"),
    ):
        for expert in range(4):
            own = found[f"blk.0.{name}.weight"][expert]
            assert torch.equal(own, given[f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"])
    for name, number in (("expert_count", 4), ("expert_used_count", 2), ("attention.head_count_kv", 2)):
        assert reader.fields[f"qwen3moe.{name}"].contents() == number
    assert reader.fields["tokenizer.ggml.tokens"].contents()[256] == "<|endoftext|>"


def test_what_llama_cpp_computes_otherwise_is_refused() -> None:
    run, tokenizer = run_of(SETTINGS), ByteTokenizer()
    check_gguf(run, target_of(QWEN3_MOE, run, KEPT), "float32", tokenizer)
    dense, scaled = (
        run_of(SETTINGS | more)
        for more in (
            {"moe_layer_freq": "[0,1]"},
            {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16},
        )
    )
    for other, target, dtype in (
        (run, target_of(QWEN3_MOE, run, SWITCH), "float32"),
        (run, target_of(MIXTRAL_MOE, run, KEPT), "float32"),
        (run, target_of(QWEN3_MOE, run, KEPT), "bfloat16"),
        (dense, target_of(QWEN3_MOE, dense, KEPT), "float32"),
        (scaled, target_of(QWEN3_MOE, scaled, KEPT), "float32"),
    ):
        with pytest.raises(CheckpointError, match=r"llama\.cpp cannot run this model"):
            check_gguf(other, target, dtype, tokenizer)
