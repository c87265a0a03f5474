"""A Hugging Face folder: its ``config.json`` in the spellings of transformers 4 and 5, and what of it our
model cannot compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.streams import TensorReader
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.names import MIXTRAL, QWEN, Heads, Naming, Sizes

MOE: dict[str, Naming] = {
    "Qwen3MoeForCausalLM": QWEN,
    "MixtralForCausalLM": MIXTRAL,
    "Glm4MoeForCausalLM": QWEN,
}
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
UNLIKE = {
    "OlmoeForCausalLM": "its q/k norms are over the whole width, ours over each head",
    "Qwen2MoeForCausalLM": "its attention has biases",
    "GptOssForCausalLM": "its experts are another function, with biases and attention sinks",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOICE_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class HfFolder:
    """A model of a class that we know; ``config`` as it was read."""

    path: Path
    architecture: str
    config: dict[str, Any]
    reader: TensorReader

    @property
    def dense(self) -> bool:
        """One MLP a layer."""
        return self.architecture in DENSE

    @property
    def theta(self) -> float:
        """Base of the rotary positions; ``rope_parameters`` wins, as in transformers 5."""
        rope = self.config.get("rope_parameters") or {}
        return float(rope.get("rope_theta", self.config.get("rope_theta", 0.0)))

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self.reader.meta("model.embed_tokens.weight").size(0)

    @property
    def num_experts(self) -> int:
        """Routed experts; 1 for a dense model."""
        return next((int(self.config[name]) for name in _EXPERTS if name in self.config), 1)

    @property
    def expert_width(self) -> int:
        """Hidden units of one expert, or of the MLP."""
        config = self.config
        return int(
            config["intermediate_size"]
            if self.dense
            else config.get("moe_intermediate_size", config["intermediate_size"])
        )

    @property
    def sizes(self) -> Sizes:
        """What decides which tensors there are."""
        config = self.config
        queries = int(config["num_attention_heads"])
        channels = int(config.get("head_dim") or config["hidden_size"] // queries)
        return Sizes(
            num_layers=int(config["num_hidden_layers"]),
            num_experts=self.num_experts,
            heads=Heads(queries, int(config.get("num_key_value_heads") or queries), channels),
            qk_norm="model.layers.0.self_attn.q_norm.weight" in self.reader,
            tied=self.tied,
        )

    @property
    def tied(self) -> bool:
        """The output matrix is the embedding."""
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.reader))


def open_folder(path: Path) -> HfFolder:
    """Read what is there; CheckpointError with every reason why our model cannot be this one."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'config.json'} cannot be read: {error!r}",
            remedy="name a folder of a Hugging Face model",
        ) from error
    if architecture not in MOE and architecture not in DENSE:
        reason = UNLIKE.get(architecture, f"known are {', '.join((*MOE, *DENSE))}")
        raise CheckpointError(f"{path} holds a {architecture}: {reason}", remedy="import another model")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no .safetensors files", remedy="save the model in that format")
    folder = HfFolder(path, architecture, config, TensorReader(files))
    if found := list(problems(folder)):
        raise CheckpointError(
            "\n  - ".join([f"our model cannot compute the one in {path}:", *found]),
            remedy="import another model",
        )
    return folder


def problems(folder: HfFolder) -> Iterator[str]:
    """What of its settings our model does not have."""
    config, rope = folder.config, _rope(folder.config)
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
    yield from (f"config.json does not say {name}" for name in needed if name not in config)
    if "model.embed_tokens.weight" not in folder.reader:
        yield "there is no tensor model.embed_tokens.weight"
    if folder.theta < 1 or not folder.theta.is_integer():
        yield f"rope_theta {folder.theta:g}; ours is an integer from 1"
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        yield f"rope_type {rope.get('rope_type', rope.get('type'))}; ours are plain rotary positions"
    if float(config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        yield "partial_rotary_factor; ours turn all channels"
    if config.get("attention_bias"):
        yield "attention_bias; our attention has none"
    if _window(folder):
        yield "a sliding window; our attention sees all positions"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {config['hidden_act']}; our experts are SwiGLU"
    if config.get("quantization_config"):
        yield "quantised weights; ours are not"
    if config.get("mlp_bias"):
        yield "mlp_bias; our experts have none"
    if not folder.dense:
        yield from _expert_problems(folder)


def _expert_problems(folder: HfFolder) -> Iterator[str]:
    config = folder.config
    if not any(name in config for name in _EXPERTS):
        yield f"config.json says none of {', '.join(_EXPERTS)}"
    if "num_experts_per_tok" not in config:
        yield "config.json does not say num_experts_per_tok"
    if (
        config.get("mlp_only_layers")
        or config.get("decoder_sparse_step", 1) != 1
        or config.get("first_k_dense_replace")
    ):
        yield "dense layers beside MoE layers; ours are all of one kind"
    if config.get("n_shared_experts") or config.get("shared_expert_intermediate_size"):
        yield "shared experts; an import has none"
    if float(config.get("routed_scaling_factor") or 1.0) != 1.0:
        yield f"routed_scaling_factor {config['routed_scaling_factor']}; ours is 1"
    if int(config.get("n_group") or 1) != 1:
        yield f"n_group {config['n_group']}; a choice by groups is not imported"
    if folder.architecture != "MixtralForCausalLM" and "norm_topk_prob" not in config:
        yield "config.json does not say norm_topk_prob"


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _window(folder: HfFolder) -> bool:
    config = folder.config
    if folder.architecture in ("MixtralForCausalLM", "MistralForCausalLM"):
        return config.get("sliding_window") is not None
    return bool(config.get("use_sliding_window"))


def settings_of_folder(folder: HfFolder) -> dict[str, Any]:
    """The settings, by flat name, of a run whose model is this one; its router is ``topk``."""
    config, sizes = folder.config, folder.sizes
    router: dict[str, Any] = {"name": "topk"}
    if folder.architecture == "Glm4MoeForCausalLM":
        router |= {
            "score_function": "sigmoid",
            "renormalise": bool(config["norm_topk_prob"]),
            "expert_bias": any(name.endswith(_CHOICE_BIAS) for name in folder.reader.names()),
        }
    elif not folder.dense and not config.get("norm_topk_prob", folder.architecture == "MixtralForCausalLM"):
        router |= {"pre_softmax": True}
    return {
        "num_layers": sizes.num_layers,
        "hidden_size": int(config["hidden_size"]),
        "num_attention_heads": sizes.heads.queries,
        "num_query_groups": sizes.heads.groups,
        "kv_channels": sizes.heads.channels,
        "moe_ffn_hidden_size": folder.expert_width,
        "seq_length": int(config.get("max_position_embeddings", 4096)),
        "qk_layernorm": sizes.qk_norm,
        "untie_embeddings_and_output_weights": not sizes.tied,
        "norm_epsilon": float(config["rms_norm_eps"]),
        "rotary_base": int(folder.theta),
        "make_vocab_size_divisible_by": folder.rows,  # as many rows, whatever the tokenizer has
        "num_experts": sizes.num_experts,
        "moe_router_topk": int(config.get("num_experts_per_tok", 1)),
        "router": router,
    }
