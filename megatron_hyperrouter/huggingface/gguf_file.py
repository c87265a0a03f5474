"""A Qwen3-MoE folder as one GGUF file for llama.cpp, in float32: ``python gguf_file.py TASK.json
ANSWER.json``.

Needs the packages gguf, numpy and safetensors alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

_NAMES = {  # Hugging Face's name inside a layer -> llama.cpp's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def main(arguments: list[str]) -> None:
    """Read the task, write the file and the answer."""
    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    folder, target = Path(task["folder"]), Path(task["file"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "qwen3moe")
    add_settings(writer, config, task["name"])
    add_tokenizer(writer, config, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    add_tensors(writer, folder, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(arguments[1]).write_text(json.dumps({"bytes": target.stat().st_size}), encoding="utf-8")


def add_settings(writer: Any, config: dict[str, Any], name: str) -> None:
    """The sizes that llama.cpp reads."""
    writer.add_name(name)
    writer.add_file_type(0)  # all float32
    for add, key in (
        (writer.add_context_length, "max_position_embeddings"),
        (writer.add_embedding_length, "hidden_size"),
        (writer.add_block_count, "num_hidden_layers"),
        (writer.add_feed_forward_length, "intermediate_size"),
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_key_length, "head_dim"),
        (writer.add_value_length, "head_dim"),
        (writer.add_rope_freq_base, "rope_theta"),
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
        (writer.add_expert_count, "num_experts"),
        (writer.add_expert_used_count, "num_experts_per_tok"),
        (writer.add_expert_feed_forward_length, "moe_intermediate_size"),
    ):
        add(config[key])


def add_tokenizer(writer: Any, config: dict[str, Any], tree: dict[str, Any]) -> None:
    """A byte-level BPE."""
    vocab = {token: name for name, token in tree["model"]["vocab"].items()}
    added = {token["id"]: token for token in tree["added_tokens"]}
    names, kinds = [], []
    for token in range(config["vocab_size"]):
        if token in added:
            names.append(added[token]["content"])
            special = added[token]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            names.append(vocab.get(token, f"[PAD{token}]"))
            kinds.append(gguf.TokenType.NORMAL if token in vocab else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    merges = tree["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if config["eos_token_id"] is not None:
        writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def add_tensors(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    """All weights, the experts of a layer stacked."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names: list[str] = list(file.keys())
            files.update(dict.fromkeys(names, path))

    def read(name: str) -> Any:
        with safe_open(files[name], framework="numpy") as file:
            return file.get_tensor(name)

    writer.add_tensor("token_embd.weight", read("model.embed_tokens.weight"))
    writer.add_tensor("output_norm.weight", read("model.norm.weight"))
    if "lm_head.weight" in files:
        writer.add_tensor("output.weight", read("lm_head.weight"))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, name in _NAMES.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", read(f"{prefix}{theirs}.weight"))
        for leaf, name in _EXPERTS.items():
            experts = [read(f"{prefix}mlp.experts.{e}.{leaf}.weight") for e in range(config["num_experts"])]
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.stack(experts))


if __name__ == "__main__":
    main(sys.argv[1:])
