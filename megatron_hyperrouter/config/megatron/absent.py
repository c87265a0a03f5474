"""Flags of Megatron-LM for features that this program does not have, by feature."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# (what the flags belong to, what leaving them out would change) -> the flags
FEATURES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("optimizers other than AdamW", "the optimizer is AdamW"): """
apply-wd-to-qk-layernorm lion-beta1 lion-beta2 muon-coefficient-type muon-extra-scale-factor
muon-fp32-matmul-prec muon-momentum muon-nesterov muon-no-split-qkv muon-num-ns-steps
muon-scalar-optimizer muon-scale-mode muon-tp-mode muon-use-nesterov muon-use-syrk
no-weight-decay-cond-type qk-clip qk-clip-alpha qk-clip-threshold sgd-momentum wd-incr-steps
""",
        (
            "BERT, retrieval and encoder-decoder models",
            "the model is a decoder-only language model",
        ): """
bert-load bert-no-binary-head biencoder-projection-dim biencoder-shared-query-context-model
block-data-path decoder-num-layers decoder-seq-length embedding-path encoder-num-layers
encoder-pipeline-model-parallel-size encoder-tensor-model-parallel-size evidence-data-path ict-head-size
ict-load indexer-batch-size indexer-log-interval pipeline-model-parallel-split-rank query-in-block-prob
relative-attention-max-distance relative-attention-num-buckets retriever-report-topk-accuracies
retriever-score-scaling retriever-seq-length retro-add-retriever retro-attention-gate
retro-cyclic-train-iters retro-encoder-attention-dropout retro-encoder-hidden-dropout
retro-encoder-layers retro-no-verify-neighbor-count retro-num-neighbors retro-num-retrieved-chunks
retro-project-dir sample-rate short-seq-prob titles-data-path use-one-sent-docs vocab-extra-ids
""",
        (
            "YaRN without rounding to integers",
            "YaRN rounds its correction range to integers",
        ): """
no-yarn-correction-range-round-to-int
""",
        ("vision models", "the model is a language model"): """
allow-missing-vision-projection-checkpoint dataloader-save disable-vision-class-token freeze-LM freeze-ViT
img-embedding-idx language-model-type prompt-path valid-path
classes-fraction data-per-class-fraction dino-bottleneck-size dino-freeze-last-layer
dino-head-hidden-size dino-local-crops-number dino-local-img-size dino-norm-last-layer dino-teacher-temp
dino-warmup-teacher-temp dino-warmup-teacher-temp-epochs head-lr-mult img-h img-w iter-per-epoch
mask-factor mask-prob mask-type mrope-section num-channels num-classes patch-dim swin-backbone-type
vision-backbone-type vision-pretraining vision-pretraining-type
""",
        (
            "fully sharded data parallelism",
            "weights are not sharded",
        ): """
data-parallel-sharding-strategy enable-full-sharding-in-hsdp expert-tensor-parallel-num-weight-shards
fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration
gtp-expert-remat-nccl-ub gtp-remat-nccl-ub gtp-remat-opt-in-modules
gtp-remat-reduce-scatter-with-fp32-accumulation megatron-fsdp-enable-fine-grained-param-gather
megatron-fsdp-grad-comm-dtype megatron-fsdp-main-grads-dtype megatron-fsdp-main-params-dtype
megatron-fsdp-max-pool-double-buffer megatron-fsdp-version outer-dp-sharding-strategy
tensor-parallel-num-weight-shards torch-fsdp2-no-reshard-after-forward use-custom-fsdp use-megatron-fsdp
use-torch-fsdp2
""",
        (
            "state-space, linear and sparse attention layers",
            "the model is different: all layers have full attention",
        ): """
csa-compress-ratio-for-c csa-compress-ratio-for-h csa-compress-rotary-base csa-window-size
disable-dsa-indexer-rotate-activation disable-dsa-indexer-scoring-relu disable-mamba-mem-eff-path
dsa-indexer-head-dim dsa-indexer-k-norm-epsilon dsa-indexer-k-norm-fp32 dsa-indexer-loss-coeff
dsa-indexer-n-heads dsa-indexer-rope-interleaved dsa-indexer-skip-topk-offset dsa-indexer-topk
dsa-indexer-topk-freq dsa-indexer-use-sparse-loss dsa-kernel-backend experimental-attention-variant
gdp-cutedsl-kernel gdp-num-chunk-states-to-recompute gdp-num-householder
hybrid-attention-ratio hybrid-layer-pattern hybrid-mlp-ratio hybrid-override-pattern
 is-hybrid-model linear-attention-freq linear-conv-kernel-dim
linear-key-head-dim linear-num-key-heads linear-num-value-heads linear-value-head-dim mamba-head-dim
mamba-num-groups mamba-num-heads mamba-state-dim mamba-training-ssm-states-dtype
no-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu o-groups o-lora-rank
""",
        ("8-bit and 4-bit number formats", "the run computes in bfloat16 (--bf16) or float32"): """
fp4 fp4-format fp4-param-gather fp4-quantizer-factory fp4-recipe fp8 kitchen-attention-backend
""",
        (
            "hyper-connections (several residual streams)",
            "the model is different: it has one residual stream",
        ): """
enable-mhc-connections mhc-init-gating-factor mhc-num-residual-streams mhc-recompute-layer-num
mhc-sinkhorn-iterations
""",
        ("fill-in-the-middle data", "samples are plain text"): """
fim-data fim-eod-token fim-fragment-rate fim-middle-token fim-no-prefix fim-pad-token fim-prefix-token
fim-rate fim-split-sample fim-spm-rate fim-suffix-token
""",
        ("float16", "the run computes in bfloat16 (--bf16) or float32"): """
fp16-lm-cross-entropy output-logit-dtype
""",
        ("reinforcement learning", "the run pretrains a model"): """
grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-entropy-term-weight grpo-filter-groups-with-same-reward
grpo-group-size grpo-iterations grpo-kl-beta grpo-prompts-per-step langrl-env-config
langrl-external-server perform-rl-step refit-method rl-consumption-granularity rl-default-temperature
rl-default-top-k rl-default-top-p rl-durable-rollout-bank rl-generation-lag
rl-importance-sampling-truncation-coef rl-kv-cache-management-mode rl-max-inflight-requests
rl-offload-kv-cache-during-training rl-parallel-generation-tasks rl-partial-rollouts rl-profile
rl-profile-dir rl-prompts-per-eval rl-remove-kv-cache-during-training rl-rollout-bank-dir
rl-rollout-bank-max-bytes rl-sequence-packing-algo rl-sequence-packing-max-sequences-per-bin
rl-skip-bos-token rl-submission-granularity rl-use-sequence-packing rl-verify-model-weights-swap
""",
        ("distillation", "the model is trained without a teacher"): """
logits-load-decode-threads logits-load-dir logits-load-ignore-errors logits-load-kd-loss-alpha
logits-load-msc-prefetch-depth logits-load-prefetch-factor logits-save-dir logits-save-dtype
logits-save-top-k logits-save-top-p logits-save-top-p-min-k
""",
        (
            "scaling of initial weights and learning rates by width (muP)",
            "initial weights and learning rates are not scaled",
        ): """
mup-attn-scale-power mup-base-head-dim mup-base-hidden-size mup-embedding-mult mup-output-mult
mup-width-mult use-mup
""",
        ("special options of a tokenizer", "the tokenizer itself determines these options"): """
disable-tokenizer-sentencepiece-ignore-extra-whitespaces
no-tokenizer-sentencepiece-ignore-extra-whitespaces null-tokenizer-eod-id null-tokenizer-pad-id
special-tokens tiktoken-special-tokens tokenizer-sentencepiece-legacy
""",
        ("activation functions other than SwiGLU", "the model is different: its activation is SwiGLU"): """
openai-gelu quick-geglu squared-relu
""",
        ("several validation sets", "the run has one validation set"): """
multiple-validation-sets validation-set-names
""",
        ("other 8-bit number formats", "--fp8-format and --fp8-recipe set the number format"): """
fp8-output-proj fp8-quantizer-factory kitchen-config-file kitchen-recipe-number te-precision-config-file
""",
        ("layers of different shapes", "the model is different: all its layers have the same shape"): """
heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path
""",
        (
            "context parallelism with a size that depends on the length of the sample",
            "all samples use --context-parallel-size",
        ): """
hybrid-context-parallel max-seqlen-per-dp-cp-rank
""",
        (
            "the conversion of a checkpoint",
            "the run trains; Megatron-LM would only convert the checkpoint",
        ): """
ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format
""",
        (
            "quantization and distillation with ModelOpt",
            "the model is trained without a teacher and without quantization",
        ): """
export-kd-cfg export-kd-teacher-ckpt-format export-kd-teacher-load export-kd-teacher-model-config
export-kv-cache-quant export-offline-model export-quant-cfg export-real-quant-cfg finetune-data-files
finetune-data-split finetune-hf-dataset freeze-base-for-mtp modelopt-enabled qad-train-target
""",
        (
            "supervised fine-tuning (SFT)",
            "the run pretrains a model; --finetune starts from existing weights",
        ): """
phase-transition-iterations sft sft-tokenizer-prompt-format
""",
        ("renormalizing blend weights", "blend weights are used unchanged"): """
renormalize-blend-weights
""",
    }
)
