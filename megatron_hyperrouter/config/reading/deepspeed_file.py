"""``--deepspeed-config``: a JSON file for DeepSpeed, in which "auto" takes the value from the flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_hyperrouter.config.reading.yaml_text import text_of

AUTO = "auto"
# The keys that DeepSpeed 0.19.8 reads; at the top it ignores others without a word.
KNOWN: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "": frozenset(
            """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comms_logger
            communication_data_type compile csv_monitor comet data_efficiency data_types dataloader_drop_last
            disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
            gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
            hybrid_engine load_universal log_level managed_gradient_accumulation memory_breakdown optimizer
            pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
            steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
            train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
            wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
            zero_force_ds_cpu_optimizer zero_optimization""".split()
        ),
        "zero_optimization": frozenset(
            """allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm
            contiguous_gradients cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint
            enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module
            legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters
            max_reuse_distance memory_efficient_linear model_persistence_threshold
            module_granularity_threshold offload_optimizer offload_param overlap_comm override_module_apply
            param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size
            reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
            stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
            stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
            stage3_module_granularity_threshold stage3_param_persistence_threshold
            stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
            stage3_allgather_sequential sub_group_size use_all_reduce_for_fetch_params
            use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
            zero_quantized_nontrainable_weights zero_quantized_weights""".split()
        ),
    }
)
SECTIONS = tuple(
    """activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger compile csv_monitor
    data_efficiency data_types expert_parallel flops_profiler fp16 hybrid_engine pipeline tensor_parallel
    tensorboard timers torch_autocast wandb weight_quantization zero_optimization""".split()
)


def load_document(path: str) -> dict[str, Any]:
    """The JSON object in ``path`` without what is "auto"; raises ValueError with the rule that is broken."""
    try:
        text = text_of(path)
        document = json.loads(text, object_pairs_hook=_once_each)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON: {error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"must be a JSON object, not a {type(document).__name__}")
    return _without_auto(document)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"has the key {key} twice")
        found[key] = value
    return found


def _without_auto(document: dict[str, Any]) -> dict[str, Any]:
    """The document without values that flags decide, and without optimizers and schedulers that have only
    such values.
    """
    kept = {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in document.items()
        if value != AUTO
    }
    for key in ("optimizer", "scheduler"):
        section, given = kept.get(key), document.get(key)
        of_auto = isinstance(given, dict) and given.get("params") and set(given) <= {"type", "params"}
        if of_auto and isinstance(section, dict) and section["params"] == {}:
            del kept[key]
    return kept
