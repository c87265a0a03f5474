"""Names that other programs use for our settings: the error for such a name gives ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# As nanoGPT, transformers, DeepSpeed's JSON, LitGPT, torchtitan and older Megatron-LM have them.
_NAMES = """
num_layers:                  n_layer n_layers num_hidden_layers layers
hidden_size:                 n_embd d_model dim model_dim embed_dim hidden_dim width
num_attention_heads:         n_head n_heads num_heads heads
num_query_groups:            n_kv_head n_kv_heads num_key_value_heads num_kv_heads n_query_groups
kv_channels:                 head_dim head_size
ffn_hidden_size:             intermediate_size d_ff ffn_dim ffn_hidden_dim
moe_ffn_hidden_size:         moe_intermediate_size expert_hidden_size expert_ffn_hidden_size
seq_length:                  block_size seq_len max_seq_len max_seq_length sequence_length context_length
norm_epsilon:                rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon layernorm_epsilon
rotary_base:                 rope_theta rope_base rotary_position_embeddings_theta
init_method_std:             initializer_range init_std
qk_head_dim:                 qk_nope_head_dim
qk_pos_emb_head_dim:         qk_rope_head_dim
moe_shared_expert_intermediate_size: shared_expert_intermediate_size shared_moe_ffn_hidden_size
mtp_num_layers:              num_nextn_predict_layers
router.num_groups:           n_group
router.group_topk:           topk_group
router.scaling_factor:       routed_scaling_factor
hidden_dropout:              dropout resid_dropout resid_pdrop hidden_dropout_prob
attention_dropout:           attn_dropout attn_pdrop
num_experts:                 n_experts n_expert num_local_experts n_routed_experts moe_num_experts experts
moe_router_topk:             top_k topk k num_experts_per_tok num_experts_per_token experts_per_token
moe_aux_loss_coeff:          moe_loss_coeff router_aux_loss_coef aux_loss_coef aux_loss_coeff aux_loss_alpha
moe_z_loss_coeff:            z_loss_coef z_loss_coeff router_z_loss_coef
moe_expert_capacity_factor:  moe_train_capacity_factor capacity_factor expert_capacity_factor
micro_batch_size:            batch_size device_batch_size per_device_train_batch_size
global_batch_size:           train_batch_size total_batch_size
train_iters:                 max_steps max_iters num_steps num_iterations train_steps total_steps steps
lr:                          learning_rate max_lr peak_lr
min_lr:                      min_learning_rate lr_min
lr_decay_style:              lr_scheduler lr_scheduler_type lr_schedule scheduler decay_style
lr_decay_iters:              decay_steps lr_decay_steps
lr_warmup_iters:             warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup
weight_decay:                wd
clip_grad:                   grad_clip gradient_clipping max_grad_norm max_norm grad_norm_clip
adam_beta1:                  beta1 beta_1
adam_beta2:                  beta2 beta_2
adam_eps:                    adam_epsilon
recompute_granularity:       gradient_checkpointing activation_checkpointing grad_checkpointing
eval_interval:               eval_steps eval_every val_interval val_check_interval
eval_iters:                  max_eval_steps eval_batches
save_interval:               save_steps checkpoint_interval save_every ckpt_interval
keep_checkpoints:            save_total_limit
load:                        resume resume_from resume_from_checkpoint init_from checkpoint
run_dir:                     output_dir out_dir output save_dir
log_interval:                logging_steps log_every
data_path:                   dataset dataset_path train_data
tokenizer_model:             tokenizer tokenizer_path tokenizer_name
num_workers:                 dataloader_num_workers
wandb_project:               wandb
seed:                        random_seed
tensor_model_parallel_size:  tp tp_size tensor_parallel_size tensor_parallel
pipeline_model_parallel_size: pp pp_size pipeline_parallel_size pipeline_parallel
context_parallel_size:       cp cp_size
expert_model_parallel_size:  ep ep_size expert_parallel_size moe_expert_parallel_size
zero_stage:                  zero
router.name:                 router_name router_type
router.hypernet_width:       hypernet_width
"""
OURS: Mapping[str, str] = MappingProxyType(
    {
        other: ours.strip()
        for ours, _, others in (line.partition(":") for line in _NAMES.strip().splitlines())
        for other in others.split()
    }
)
SHARED = "use --moe-shared-expert-intermediate-size, the width of all shared experts together"
# Megatron-DeepSpeed's and Pai-Megatron-Patch's names of what changes no result.
_NOT_NEEDED = """
aml_data_download_path checkpoint_in_cpu contigious_checkpointing cpu_optimizer cpu_torch_adam
create_moe_param_group data_impl ddp_impl disable_mem_efficient_ln distribute_checkpointed_activations
ds_fused_adam log_optimizer_states_to_tensorboard memory_centric_tiled_linear mmap_warmup
no_contiguous_buffers_in_local_ddp no_pipeline_parallel no_query_key_layer_scaling partition_activations
profile_backward scattered_embeddings split_transformers synchronize_each_layer tile_factor
use_flash_attn_builder use_flash_attn_triton use_flash_attn_v1 use_flash_attn_v2 use_pin_memory use_tutel
zero_allgather_bucket_size
zero_contigious_gradients zero_reduce_bucket_size zero_reduce_scatter
""".split()
_TOKENS = "and divide the number of tokens by --seq-length"
# Names whose values differ as well: what to write instead.
REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "dtype": "use --bf16 (bf16: true in a file) for bfloat16; float32 is the default",
        "precision": "use --bf16 (bf16: true in a file) for bfloat16; float32 is the default",
        "torch_dtype": "use --bf16 (bf16: true in a file) for bfloat16; float32 is the default",
        "fp32": "leave it out; float32 is the default",
        "fp16": "use --bf16; float16 is not supported",
        "gradient_accumulation_steps": "set --global-batch-size; it determines the number of micro-batches",
        "epochs": "set --train-iters; a run prints its number of epochs when it starts",
        "num_train_epochs": "set --train-iters; a run prints its number of epochs when it starts",
        "num_epochs": "set --train-iters; a run prints its number of epochs when it starts",
        "warmup_ratio": "use --lr-warmup-fraction",
        "gpus": "start the program with deepspeed or torchrun, and set the number of GPUs there",
        "num_gpus": "start the program with deepspeed or torchrun, and set the number of GPUs there",
        "device": "leave it out; the program uses GPUs if it finds any",
        "optimizer": "leave it out; the optimizer is AdamW",
        "betas": "use --adam-beta1 and --adam-beta2",
        "vocab": "use --tokenizer-model, or --vocab-size with --tokenizer-type NullTokenizer",
        "router": "use --router.name NAME",
        "compile": "leave it out; the program does not compile the model",
        "n_shared_experts": SHARED,
        "num_shared_experts": SHARED,
        "enable_shared_expert": SHARED,
        "hidden_act": "leave it out; the activation is SwiGLU",
        "train_tokens": f"use --train-samples, {_TOKENS}",
        "lr_decay_tokens": f"use --lr-decay-samples, {_TOKENS}",
        "lr_warmup_tokens": f"use --lr-warmup-samples, {_TOKENS}",
        "moe_eval_capacity_factor": "leave it out; --moe-expert-capacity-factor applies to evaluation too",
        "disable_moe_token_dropping": "leave out --moe-expert-capacity-factor; then no tokens are dropped",
        "deepspeed_activation_checkpointing": "use --recompute-granularity full",
        "expert_interval": "use --moe-layer-freq; '([0,1]*6)' selects every second of 12 layers",
        "ds_sequence_parallel_size": "use --context-parallel-size with --engine megatron",
        "universal_checkpoint": "leave it out; any layout can load a checkpoint",
        "dataset": "use --data-path with the prefix of a .bin/.idx pair",
        "patch_tokenizer_type": "use --tokenizer-type HuggingFaceTokenizer and --tokenizer-model",
        "extra_vocab_size": "use --make-vocab-size-divisible-by, which pads the tokenizer's vocabulary",
        "max_padding_length": "leave it out; every sample has --seq-length tokens, without padding",
        "train_mode": "leave it out; the program pretrains, or starts from existing weights with --finetune",
        "config": "write the settings of both files into one file",
        "dry_run": "write --dry-run on the command line",
        "world_size": "leave it out; the launcher sets the number of ranks",
        "sliding_window": "use --window-size; a sliding window of 4096 tokens is --window-size 4095,0",
    }
    | dict.fromkeys(_NOT_NEEDED, "leave it out; it would not change the result")
)
