"""One process of the comparison with transformers: both engines with its weights, on the same tokens.

A case: ``flags`` of the program, and ``family``: a class of transformers, with the fields of its
configuration.  The answer has the largest logit, and for each engine the largest difference relative to it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from distributed import serve_cases
from engines.layout_worker import VOCABULARY, tiny_config
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.model.loss import captured_logits
from megatron_hyperrouter.model.names import matrices

# The end of a name of transformers -> ours, inside a layer.
PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
    "mlp.gate.weight": "mlp.router.weight_ED",
    "mlp.gate.e_score_correction_bias": "mlp.router.choice_bias_E",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.shared_expert.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}


def global_weights(run: RunConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of transformers' weights by our global names; raises KeyError for one that has no place."""
    found = {ours: theirs.pop(name) for name, ours in OUTSIDE.items()}
    for layer in range(run.model.num_layers):
        prefix, our_prefix = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        of_layer = {
            name.removeprefix(prefix): theirs.pop(name) for name in list(theirs) if name.startswith(prefix)
        }
        inside = in_layer(run, of_layer)
        found |= {our_prefix + name: tensor for name, tensor in inside.items()}
    if theirs:
        raise KeyError(f"no place for {sorted(theirs)}")
    return found


def in_layer(run: RunConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's weights."""
    found: dict[str, Tensor] = {}
    latent = run.attention.multi_latent_attention
    if latent and "self_attn.q_proj.weight" in theirs:
        found["self_attention.linear_q_proj.weight"] = theirs.pop("self_attn.q_proj.weight")
    for kind in () if latent else ("weight", "bias"):
        parts = [theirs.pop(f"self_attn.{name}_proj.{kind}", None) for name in "qkv"]
        if parts[0] is not None:  # for each group its query heads, then its key, then its value
            groups = run.model.num_query_groups or run.model.num_attention_heads
            cut = [part.view(groups, -1, *part.shape[1:]) for part in parts]
            found[f"self_attention.linear_qkv.{kind}"] = torch.cat(cut, 1).flatten(0, 1)
    for place, ours in (
        ("mlp", "mlp"),
        ("mlp.shared_expert", "mlp.shared_experts"),
        ("mlp.shared_experts", "mlp.shared_experts"),
    ):
        if f"{place}.gate_proj.weight" in theirs:
            halves = [theirs.pop(f"{place}.{name}_proj.weight") for name in ("gate", "up")]
            found[f"{ours}.linear_fc1.weight"] = torch.cat(halves)
    if "mlp.experts.gate_up_proj" in theirs:
        pairs = zip(theirs.pop("mlp.experts.gate_up_proj"), theirs.pop("mlp.experts.down_proj"), strict=True)
        for expert, (first, second) in enumerate(pairs):
            found[f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = first
            found[f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = second
    return found | {PLAIN[name]: tensor for name, tensor in theirs.items()}


@torch.no_grad()
def fill(engine: Any, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` into the engine's model; every one has a place there, and every place its weight."""
    places = dict(matrices(engine.named_parameters()))
    for prefix, router in engine.routers.items():
        places |= {prefix + name: buffer for name, buffer in router.named_buffers()}
    if places.keys() != weights.keys():
        raise KeyError(f"not in both: {sorted(places.keys() ^ weights.keys())}")
    for name, place in places.items():
        place.copy_(weights[name])
    engine.weights_changed()


@torch.no_grad()
def logits_of(engine: Any, tokens_BS: Tensor) -> Tensor:
    """``[B, S, V]``."""
    with captured_logits(engine.modules()) as seen:
        engine.evaluate(iter([(tokens_BS, tokens_BS)]), topk=engine.topk_at(0))
    (logits_SBV,) = seen
    return logits_SBV.transpose(0, 1)


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """Compare one family in both engines."""
    torch.manual_seed(11)
    name, fields = case["family"]
    config = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager")
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor_name, tensor in theirs.state_dict().items():
            noise = torch.randn_like(tensor) * case.get("std", 0.15)
            tensor.copy_(noise + 1.0 if "norm" in tensor_name else noise)
        tokens_BS = torch.randint(0, VOCABULARY, (2, 16))
        expected = theirs(tokens_BS).logits
    answer = {"largest": float(expected.abs().max())}
    for engine_name in ("deepspeed", "megatron"):
        run = tiny_config([*case["flags"], "--engine", engine_name])
        engine: Any = open_engine(run, vocab_size=VOCABULARY, for_training=False)
        try:
            state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
            fill(engine, global_weights(run, state))
            found = logits_of(engine, tokens_BS)[..., : expected.size(-1)]
        finally:
            engine.close()
        answer[engine_name] = float((found - expected).abs().max() / expected.abs().max())
    return answer


if __name__ == "__main__":
    serve_cases(run_case)
