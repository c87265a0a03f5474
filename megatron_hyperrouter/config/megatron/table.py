"""What this program does with each flag of Megatron-LM that is not one of its own settings.

The table is in three files: this one, ``no_effect.py`` and ``absent.py``.  A flag that becomes a setting
is removed from the table.  A test checks that the table is complete and contains only names that
Megatron-LM has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Always(NamedTuple):
    """A flag for something that is fixed here: accepted only with these values, or without a value."""

    accepted: tuple[str, ...]
    fact: str


class Absent(NamedTuple):
    """A flag of a missing feature: what the flag does, and what leaving it out would change."""

    does: str
    without: str


def _rows(text: str) -> dict[str, tuple[str, str]]:
    """Lines ``name | one | other``."""
    lines = (
        text.strip().replace("\n ", " ").splitlines()
    )  # a line that starts with a space continues the previous one
    cells = ([cell.strip() for cell in line.split("|")] for line in lines)
    return {name: (one, other) for name, one, other in cells}


# flag | accepted values | what is so
ALWAYS: Mapping[str, Always] = MappingProxyType(
    {
        name: Always(tuple(values.split()), fact)
        for name, (values, fact) in _rows(
            """
swiglu |  | the activation is SwiGLU
normalization | RMSNorm rmsnorm | the norm is RMSNorm
disable-bias-linear |  | linear layers have no biases
yarn-correction-range-round-to-int |  | YaRN rounds to integers
use-pytorch-profiler |  | --profile always uses the PyTorch profiler
use-rotary-position-embeddings |  | positions are rotary
no-position-embedding |  | there are no learned positions
use-mcore-models |  | the layers are always those of megatron-core
optimizer | adam | the optimizer is AdamW
moe-router-dtype | fp32 | routers compute in float32
attention-softmax-in-fp32 |  | the attention softmax is always float32
accumulate-allreduce-grads-in-fp32 |  | gradients are always summed in float32
moe-token-drop-policy | probs | the tokens with the smallest weights are dropped first
dataloader-type | single | samples are always read in one shuffled order
exp-avg-dtype | fp32 | the optimizer's states are float32
exp-avg-sq-dtype | fp32 | the optimizer's states are float32
main-grads-dtype | fp32 | the optimizer's gradients are float32
main-params-dtype | fp32 | the optimizer's weights are float32
moe-dispatch-fwd-dtype | bf16 | expert inputs and outputs are sent in the number format of the model
moe-combine-bwd-dtype | bf16 | expert inputs and outputs are sent in the number format of the model
softmax-type | vanilla | the attention softmax never has attention sinks
distributed-backend | nccl gloo | the backend depends on the device
exit-on-missing-checkpoint |  | --load without a checkpoint always ends the run
moe-per-layer-logging |  | metrics.jsonl always has values for each layer
weight-decay-incr-style | constant | the weight decay is constant
override-opt-param-scheduler |  | the schedule always comes from the command, not from the checkpoint
calculate-per-token-loss |  | the loss is the mean over the tokens of the global batch
no-use-tokenizer-model-from-checkpoint-args |  | the tokenizer always comes from the settings
disable-use-tokenizer-model-from-checkpoint-args |  | the tokenizer always comes from the settings
no-multi-latent-attention |  | attention is grouped-query attention by default
disable-multi-latent-attention |  | attention is grouped-query attention by default
"""
        ).items()
    }
)

# flag -> the setting of ours that it is
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "save": "run_dir",
        "persistent-save-interval": "save_interval",
        "exit-signal-handler": "exit_on_signal",
        "layernorm-epsilon": "norm_epsilon",
        "batch-size": "micro_batch_size",
        "disable-fp8-wgrad": "no_fp8_wgrad",
        "model-parallel-size": "tensor_model_parallel_size",
        "num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
        "moe-router-num-groups": "router.num_groups",
        "moe-router-group-topk": "router.group_topk",
        "moe-router-topk-scaling-factor": "router.scaling_factor",
        "moe-router-enable-expert-bias": "router.expert_bias",
        "moe-router-bias-update-rate": "router.bias_update_rate",
        "moe-input-jitter-eps": "router.jitter_eps",
        "most-recent-k": "keep_checkpoints",
        "check-weight-hash-across-dp-replicas-interval": "check_replicas_interval",
        "yarn-beta-fast": "beta_fast",
        "yarn-beta-slow": "beta_slow",
        "yarn-original-max-position-embeddings": "original_max_position_embeddings",
        "disable-load-optim": "no_load_optim",
        "disable-load-rng": "no_load_rng",
        "disable-save-optim": "no_save_optim",
    }
)

# Flags that ask for opposite things; Megatron-LM refuses some of these pairs, and lets one win silently in
# others.
CONTRADICTIONS = (
    ("accumulate-allreduce-grads-in-fp32", "grad-reduce-in-bf16"),
    ("no-multi-latent-attention", "multi-latent-attention"),
    ("disable-multi-latent-attention", "multi-latent-attention"),
    ("override-opt-param-scheduler", "use-checkpoint-opt-param-scheduler"),
    ("no-create-attention-mask-in-dataloader", "reset-attention-mask"),
)

# Flags from which another setting is worked out: see ``translate.py``.
ARITHMETIC = (
    "train-samples",
    "lr-decay-samples",
    "lr-warmup-samples",
    "lr-warmup-fraction",
    "lr-wsd-decay-samples",
    "num-layers-per-virtual-pipeline-stage",
    "recompute-activations",
    "checkpoint-activations",
    "moe-layer-recompute",
    "data-args-path",
    "per-split-data-args-path",
    "moe-router-score-function",
    "moe-router-pre-softmax",
    "ckpt-step",
    "moe-router-load-balancing-type",
    "group-query-attention",
    "position-embedding-type",
    "iterations-to-skip",
    "save-retain-interval",
)

# flag | what it does | what leaving it out would change
ABSENT: Mapping[str, Absent] = MappingProxyType(
    {
        name: Absent(*cells)
        for name, cells in _rows(
            """
no-save-rng | saves checkpoints without the random state | checkpoints contain the random state
disable-save-rng | saves checkpoints without the random state | checkpoints contain the random state
spec | builds the layers from a Python module that you give
  | the model is different: it has the layers of this program
export-qk-l2-norm | applies an L2 norm to queries and keys
  | the model is different: it has no such norm, or RMSNorm with --qk-layernorm
export-moe-apply-probs-on-input | multiplies expert inputs by the expert weights
  | the model is different: expert outputs are multiplied
enable-gpt-oss | scales positions as gpt-oss does | use --rope-type yarn and --rotary-scaling-factor
mtp-detach-heads | stops the gradient of the multi-token prediction loss before the rest of the model
  | that gradient reaches the whole model
mtp-hsm | mixes the hidden states of several depths of multi-token prediction
  | the model is different: each depth reads the one before it
mtp-hybrid-override-pattern | lists the layers of multi-token prediction
  | the model is different: they are attention layers with experts
mtp-use-repeated-layer | uses one layer for all depths of multi-token prediction
  | the model is different: each depth has a separate layer
moe-router-topk-limited-devices | limits each token to the experts of some ranks
  | use --moe-router-num-groups and --moe-router-group-topk, which do not depend on the layout
moe-latent-size | projects tokens to a smaller width before the experts
  | the model is different: experts receive the full width
rotary-interleaved | rotates pairs of neighboring dimensions
  | the model is different: each pair has one channel from each half
no-rope-freq | leaves rotary positions out of some layers | the model is different: all layers have them
embedding-init-method-std | sets the standard deviation of the initial embedding
  | the embedding uses --init-method-std
init-method-xavier-uniform | draws initial weights from Xavier's distribution
  | weights are drawn from a normal distribution with --init-method-std
fp16 | computes in float16 | use --bf16
fp32-residual-connection | keeps the residual stream in float32
  | the residual stream is bfloat16 with --bf16
apply-residual-connection-post-layernorm | takes the residual after the norm
  | the model is different: the residual is taken before the norm
qk-l2-norm | applies an L2 norm to queries and keys
  | the model is different: it has no such norm, or RMSNorm with --qk-layernorm
attention-output-gate | gates the output of attention
  | the model is different: attention output is not gated
glu-linear-offset | shifts the linear half of the activation
  | the model is different: the linear half is not shifted
activation-func-clamp-value | clamps the activation
  | the model is different: the activation is not clamped
start-weight-decay | increases the weight decay during training | the weight decay is constant
end-weight-decay | increases the weight decay during training | the weight decay is constant
decoupled-lr | gives embedding and output a separate learning rate | both use --lr
decoupled-min-lr | gives embedding and output a separate minimum learning rate | both use --min-lr
skip-train | evaluates without training | use mhr evaluate to evaluate a checkpoint
use-checkpoint-args | takes the model sizes from the checkpoint | the settings must give all sizes
pretrained-checkpoint | starts from other weights | use --load DIR --finetune
freeze-all-layers | trains no layer | all layers are trained
step-batch-size-schedule | changes the global batch at given steps | the global batch stays constant
decrease-batch-size-if-needed | reduces the global batch if it is not divisible
  | use a divisible --global-batch-size
padded-vocab-size | sets the number of rows of the embedding
  | the tokenizer and --make-vocab-size-divisible-by determine the number
no-pad-vocab-size | leaves the vocabulary unpadded | use --make-vocab-size-divisible-by 1
disable-pad-vocab-size | leaves the vocabulary unpadded | use --make-vocab-size-divisible-by 1
eval-global-batch-size | sets the global batch of evaluations | evaluations use --global-batch-size
eval-micro-batch-size | sets the micro-batch of evaluations | evaluations use --micro-batch-size
full-validation | evaluates on the whole validation split
  | each evaluation reads only --eval-iters batches
start-eval-at-iter | starts evaluations at a given step
  | evaluations start after the first --eval-interval steps
pipeline-model-parallel-layout | lists the layers of each pipeline stage
  | all stages have the same number of layers
encoder-seq-length | sets the sample length of an encoder-decoder
  | the model is a decoder-only language model
yaml-cfg | reads a YAML file of Megatron-LM | use --config with a YAML file of this program
data-parallel-random-init | draws different initial weights on each data-parallel rank
  | all ranks start with the same weights
dataloader-inter-document-masking | keeps attention within documents | use --reset-attention-mask
moe-apply-probs-on-input | multiplies expert inputs by the expert weights
  | the model is different: expert outputs are multiplied
no-initialization | leaves the weights uninitialized | weights are drawn from --seed
use-mp-args-from-checkpoint-args | takes the layout from the checkpoint | the settings must give the layout
moe-use-upcycling | starts from a dense model
  | use mhr import-hf --upcycle with a Hugging Face model, or train from random weights
moe-upcycling-granularity | starts from a dense model | use mhr import-hf --upcycle with --granularity
moe-router-force-biased | adds a random bias to the routing | routing has no random bias
moe-router-quantile-balancing-ema | balances the load by quantiles
  | --moe-aux-loss-coeff balances the load
moe-expert-rank-capacity-factor | limits the tokens of each rank
  | use --moe-expert-capacity-factor for each expert
warmup | is the old name of --lr-warmup-fraction | use --lr-warmup-fraction
"""
        ).items()
    }
)
