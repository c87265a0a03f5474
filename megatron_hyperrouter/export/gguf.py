"""What llama.cpp's architecture ``qwen3moe`` computes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from megatron_hyperrouter.data.tokenize.transformers_files import tokenizer_json
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.classes.rotary import rope_parameters

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.tokenize.base import Tokenizer
    from megatron_hyperrouter.export.classes.target import Target


def check_gguf(run: RunConfig, target: Target, dtype: str, tokenizer: Tokenizer) -> None:
    """CheckpointError if llama.cpp would compute another model, or read other ids."""
    text = tokenizer_json(tokenizer)
    tree = {} if text is None else json.loads(text)
    words = tree.get("pre_tokenizer") or {}
    reasons = []
    if target.architecture != "Qwen3MoeForCausalLM" or not target.sums_to_one:
        reasons.append("q/k norms (--qk-layernorm) and expert weights that sum to 1")
    if target.fields.get("mlp_only_layers"):
        reasons.append("experts in every layer")
    if rope_parameters(run)["rope_type"] != "default":
        reasons.append("rotary positions without scaling")
    if dtype != "float32":
        reasons.append("float32 (leave out --dtype)")
    if (
        tree.get("model", {}).get("type") != "BPE"
        or words.get("type") != "ByteLevel"
        or tree.get("normalizer")
    ):
        reasons.append("a byte-level BPE tokenizer like GPT-2's")
    if reasons:
        raise CheckpointError(
            f"--gguf: llama.cpp cannot run this model as qwen3moe, which requires: {'; '.join(reasons)}",
            remedy="change these settings, or leave out --gguf",
        )
