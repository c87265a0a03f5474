"""A Hugging Face folder: its class, and its ``config.json`` in the spellings of transformers 4 and 5."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.streams import TensorReader
from megatron_hyperrouter.config.by_role import values_with
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, reason_of
from megatron_hyperrouter.export.classes.grouped import GLM4_MOE, MIXTRAL_MOE, QWEN2_MOE, QWEN3_MOE
from megatron_hyperrouter.export.classes.latent import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_hyperrouter.export.classes.names import QWEN, Heads, ModelShape, Naming

_LATENT_FAMILIES = (DEEPSEEK_V2, DEEPSEEK_V3)
LATENT = tuple(family.architecture for family in _LATENT_FAMILIES)
MOE: dict[str, Naming] = {
    **{family.architecture: family.naming for family in (QWEN3_MOE, MIXTRAL_MOE, QWEN2_MOE, GLM4_MOE)},
    **dict.fromkeys(LATENT, QWEN),  # packed experts are read as well
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
_THETA = {"MixtralForCausalLM": 1e6}  # of a config.json without rope_theta, as Llama 2 has; others: 10000
UNLIKE = {
    "OlmoeForCausalLM": "each q/k norm of this class spans all heads, which is not supported",
    "GptOssForCausalLM": "the biases and attention sinks of this class are not supported",
    "HyperRouterForCausalLM": "models exported with --custom-code can be loaded only by transformers",
}


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
        given = rope.get("rope_theta", self.config.get("rope_theta"))
        return float(_THETA.get(self.architecture, 1e4) if given is None else given)

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self.reader.meta("model.embed_tokens.weight").size(0)

    @property
    def num_experts(self) -> int:
        """Routed experts; 1 for a dense model."""
        return next((int(self.config[name]) for name in EXPERTS if name in self.config), 1)

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
    def routed(self) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        config, layers = self.config, range(int(self.config["num_hidden_layers"]))
        first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step", 1))
        dense = set(config.get("mlp_only_layers") or ())
        return tuple(layer >= first and layer not in dense and not (layer + 1) % step for layer in layers)

    @property
    def predicting_layers(self) -> tuple[str, ...]:
        """Prefixes of the layers for multi-token prediction, which the main model does not need."""
        first, count = len(self.routed), int(self.config.get("num_nextn_predict_layers") or 0)
        return tuple(f"model.layers.{first + number}." for number in range(count))

    @property
    def latent(self) -> bool:
        """Attention through latent vectors."""
        return self.architecture in LATENT

    @property
    def sizes(self) -> ModelShape:
        """What decides which tensors there are."""
        config = self.config
        queries = int(config["num_attention_heads"])
        channels = int(config.get("head_dim") or config["hidden_size"] // queries)
        return ModelShape(
            num_experts=self.num_experts,
            heads=Heads(queries, int(config.get("num_key_value_heads") or queries), channels),
            qk_norm=self.latent or "model.layers.0.self_attn.q_norm.weight" in self.reader,
            tied=self.tied,
            routed=self.routed,
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in self.reader,
            shared=bool(shared_width(config)),
            shared_gate=MOE.get(self.architecture, QWEN).gated_shared_expert,
            latent=self.latent,
            low_rank_queries=config.get("q_lora_rank") is not None,
        )

    @property
    def tied(self) -> bool:
        """The output matrix is the embedding."""
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.reader))


def _reason(error: Exception) -> str:
    if isinstance(error, (OSError, ValueError)):
        return reason_of(error)
    return 'it must be an object with a list "architectures"'


def open_folder(path: Path) -> HfFolder:
    """Read the folder; CheckpointError if its class is not supported."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'config.json'} cannot be read as the settings of a model: {_reason(error)}",
            remedy="use the folder of a Hugging Face model",
        ) from error
    if architecture not in MOE and architecture not in DENSE:
        reason = UNLIKE.get(architecture, f"the supported classes are {', '.join((*MOE, *DENSE))}")
        export = "; if mhr export-hf wrote this folder, use the run that was exported"
        remedy = f"choose another model{export if 'auto_map' in config else ''}"
        raise CheckpointError(f"{path}: model class {architecture} cannot be used: {reason}", remedy=remedy)
    files = _weight_files(path)
    if not files:
        raise CheckpointError(
            f"{path} has no .safetensors files", remedy=("save the model in the safetensors format")
        )
    return HfFolder(path, architecture, config, TensorReader(files))


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers reads.  A folder can have others, such as Mistral's
    ``consolidated.safetensors``, which contains the same weights under other names.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} cannot be read as a list of weight files",
            remedy="download the folder again, or save the model again",
        ) from error


def tokenizer_of_run(run: RunConfig) -> dict[str, Any]:
    """The settings of the tokenizer of a dense run, by flat name."""
    return values_with(run, Role.TOKENIZER)


def shared_width(config: dict[str, Any]) -> int:
    """Hidden units of the experts that see every token; 0: there are none."""
    width = config.get("moe_intermediate_size", 0)
    return int(config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, in either spelling."""
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
