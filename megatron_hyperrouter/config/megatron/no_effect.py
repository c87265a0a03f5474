"""Flags of Megatron-LM without effect on the result of a training run: speed, storage and logging."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "Communication": """
account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split cp-comm-type
create-all-gather-group mtp-standalone
ddp-average-in-collective ddp-num-buckets ddp-pad-buckets-for-high-nccl-busbw
ddp-param-name-patterns-for-fp32-local-accumulation ddp-reduce-scatter-with-fp32-accumulation
defer-embedding-wgrad-compute delay-param-gather delay-wgrad-compute disable-align-grad-reduce
disable-gloo-process-groups disable-symmetric-registration disable-tp-comm-bulk-dgrad
disable-tp-comm-bulk-wgrad disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs
disable-tp-comm-split-ag disable-tp-comm-split-rs ep-overlap-early-attn-memory-release
fake-process-group hierarchical-context-parallel-sizes
high-priority-a2a-comm-stream high-priority-stream-groups local-rank
microbatch-group-size-per-virtual-pipeline-stage microbatch-group-size-per-vp-stage
moe-shared-expert-glu-interleave-size
moe-shared-expert-overlap nccl-communicator-config-path no-align-grad-reduce no-align-param-gather
no-async-tensor-model-parallel-allreduce no-delay-grad-reduce no-overlap-p2p-communication
no-scatter-gather-tensors-in-pipeline no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad no-tp-comm-overlap-ag
no-tp-comm-overlap-rs no-tp-comm-split-ag no-tp-comm-split-rs no-use-layer-wise-param-layout
num-distributed-optimizer-instances overlap-dispatch-backward-with-experts-wgrad
overlap-moe-expert-parallel-comm overlap-p2p-communication-warmup-flush
overlap-param-gather-with-optimizer-step pipeline-model-parallel-comm-backend sharp-enabled-group
standalone-embedding-stage suggested-communication-unit-size tp-comm-bootstrap-backend tp-comm-overlap
tp-comm-overlap-cfg tp-comm-overlap-rs-dgrad train-sync-interval use-nccl-ub use-ring-exchange-p2p
use-sharp use-tp-pp-dp-mapping wgrad-deferral-limit
""",
        "Other ways to compute and store the same numbers": """
apply-layernorm-1p apply-query-key-layer-scaling disable-te-fused-rope fp8-interval fp8-param-gather
keep-fp8-transpose-cache keep-fp8-transpose-cache-when-using-custom-fsdp
reuse-grad-buf-for-mxfp8-param-ag use-precision-aware-optimizer
""",
        "Loss scaling, which only float16 needs": """
hysteresis initial-loss-scale loss-scale loss-scale-window min-loss-scale
""",
        "Kernels, fusions, graphs and memory": """
activation-offload-fraction attention-backend cpu-offloading-num-layers
cpu-offloading-retain-pinned-cpu-buffers cross-entropy-fusion-impl cross-entropy-loss-fusion
cuda-graph-impl cuda-graph-modules cuda-graph-scope cuda-graph-warmup-steps
delay-offload-until-cuda-graph delta-offload-bytes-across-pp-ranks deterministic-mode
disable-bf16-reduced-precision-matmul disable-clone-scatter-output-in-embedding disable-jit-fuser
disable-manual-gc-eval distribute-saved-activations empty-unused-memory-level enable-cuda-graph
enable-experimental external-cuda-graph fine-grained-activation-offloading
fine-grained-offloading-max-inflight-offloads flash-attention-version fused-residual-rmsnorm
init-model-with-meta-device lazy-mpu-init legacy-tokenizer manual-gc manual-gc-interval
min-offloaded-tensor-size mla-down-proj-fusion mlp-chunks-for-training moe-deepep-num-sms
moe-enable-deepep moe-enable-routing-replay moe-extended-tp moe-flex-dispatcher-backend
moe-flex-dispatcher-num-sms moe-hybridep-num-blocks-permute moe-hybridep-num-blocks-unpermute
moe-hybridep-num-sms moe-hybridep-num-sms-preprocessing moe-hybridep-pad-uneven-dispatch-inputs
moe-mlp-glu-interleave-size moe-ncclep-zero-copy moe-pad-expert-input-to-capacity
moe-paged-stash moe-paged-stash-buffer-size-factor-cpu moe-paged-stash-buffer-size-factor-cuda
moe-paged-stash-page-size moe-permute-fusion moe-permute-fusion-into-hybridep moe-router-fusion
moe-router-padding-for-fp8 moe-router-padding-for-quantization moe-single-grouped-bias
moe-single-grouped-weight moe-use-grouped-tensor moe-use-legacy-grouped-gemm no-bias-dropout-fusion
no-bias-gelu-fusion no-bias-swiglu-fusion no-clone-scatter-output-in-embedding
no-gradient-accumulation-fusion no-gradient-reduce-div-fusion no-manual-gc-eval no-masked-softmax-fusion
no-persist-layer-norm no-pin-cpu-grads no-pin-cpu-params no-rope-fusion offload-modules onnx-safe
optimizer-cpu-offload optimizer-cuda-graph optimizer-offload-fraction overlap-cpu-optimizer-d2h-h2d
rl-persist-cuda-graphs rl-reset-cuda-graphs rl-training-cuda-graphs te-rng-tracker
use-cpu-initialization use-flash-attn use-fused-weighted-squared-relu use-grouped-gemm-for-dense-mlp
use-grouped-gemm-for-shared-expert use-kitchen-attention use-legacy-models use-te-activation-func
use-te use-torch-optimizer-for-cpu-offload use-transformer-engine-op-fuser
""",
        "Logging and monitoring": """
adlr-autoresume adlr-autoresume-interval app-tag-run-name app-tag-run-version config-logger-dir
disable-filter-warnings disable-flight-recorder-dump-on-timeout
disable-flight-recorder-extra-dump-on-exec disable-flight-recorder-include-only-active
disable-log-loss-scale-to-tensorboard disable-straggler-on-startup dump-param-to-param-group-map
enable-one-logger flight-recorder-dump-path flight-recorder-include-stack-trace
flight-recorder-trace-buffer-size gpu-sniff-test-interval log-batch-size-to-tensorboard
log-device-memory-used log-energy log-l2-norm-grad-to-tensorboard log-max-attention-logit
log-memory-interval log-memory-to-tensorboard log-progress log-runtime-to-tensorboard log-straggler
log-throughput log-throughput-to-tensorboard log-timers-to-tensorboard log-validation-ppl-to-tensorboard
log-world-size-to-tensorboard logging-level memory-keys memory-snapshot-path modules-to-filter
moe-routing-trace-capture-hidden-states moe-routing-trace-capture-logits moe-routing-trace-dump-weights
moe-routing-trace-max-training-iters moe-routing-trace-path no-barrier-with-level-1-timing
no-filter-warnings no-flight-recorder-dump-on-timeout no-flight-recorder-extra-dump-on-exec
no-flight-recorder-include-only-active no-log-learnig-rate-to-tensorboard
no-log-loss-scale-to-tensorboard no-one-logger nvtx-ranges one-logger-async one-logger-entity
one-logger-project one-logger-run-name otel-enabled otel-service-name otel-span-groups
pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra pytorch-profiler-collect-shapes
record-memory-history record-shapes run-workload-inspector-server runtime-time-unit test-mode
save-config-filepath
set-level-for-all-loggers straggler-ctrlr-port straggler-minmax-count
tensorboard-log-interval tensorboard-queue-size throughput-window-size timing-log-level
timing-log-option wandb-entity wandb-save-dir
""",
        "Reading data files": """
allow-ambiguous-pad-tokens chat-template dataloader-defer-npy-index-mmap dataloader-fast-cache-load
disable-msc enable-msc max-position-embeddings metadata-path mid-level-dataset-surplus
no-create-attention-mask-in-dataloader no-data-sharding no-mmap-bin-files num-dataset-builder-threads
object-storage-cache-path per-dataset-sequences-path s3-cache-path tokenizer-hf-include-special-tokens
tokenizer-hf-no-include-special-tokens tokenizer-hf-no-use-fast tokenizer-hf-use-fast tokenizer-metadata
trust-remote-code use-gigatoken
""",
        "Checkpoint files": """
async-ckpt-cpu-priority async-ckpt-io-priority async-ckpt-use-cpu-shm async-strategy
auto-detect-ckpt-format ckpt-assume-constant-structure
ckpt-drop-redundant-extra-state ckpt-format
ckpt-fully-parallel-load ckpt-fully-parallel-load-exchange-algo
ckpt-fully-parallel-load-per-rank-objects ckpt-fully-parallel-load-process-group
ckpt-fully-parallel-save ckpt-fully-parallel-save-process-group ckpt-pg-tensors-cache-create
ckpt-pg-tensors-cache-path disable-ckpt-load-validate-sharding-integrity disable-save-tokenizer-assets
disable-strict-fsdp-dtensor-load dist-ckpt-format dist-ckpt-optim-fully-reshardable
dist-ckpt-save-pre-mcore-014 dist-ckpt-strictness dist-ckpt-workers
distrib-optim-fully-reshardable-mem-efficient load-main-params-from-ckpt load-model-opt-format
no-ckpt-fully-parallel-save no-ckpt-load-validate-sharding-integrity no-save-tokenizer-assets
no-strict-fsdp-dtensor-load non-persistent-ckpt-type non-persistent-global-ckpt-dir
non-persistent-local-ckpt-algo non-persistent-local-ckpt-dir non-persistent-save-interval
override-ckpt-iteration replication replication-factor replication-jump
save-activations-interval save-dgrads-interval save-params-interval
save-tokens-per-expert-interval save-wgrads-interval use-dist-ckpt use-persistent-ckpt-worker
verify-integrity
""",
        "Serving and inference": """
export-default-te-spec export-force-local-attention export-legacy-megatron export-model-type
export-te-mcore-model
batch-invariant-backend batch-invariant-mode bert-embedder-type cache-mla-latents
decode-only-cuda-graphs disable-chunked-prefill disable-offset-sampling-seed-by-dp-rank
enable-chunked-prefill flash-decode inference-batch-times-seqlen-threshold inference-coordinator-port
inference-cuda-graph-all-prefills inference-cuda-graph-max-tokens inference-cuda-graph-scope
inference-disable-ep-consensus inference-disable-triton-nvls-kernels inference-dynamic-batching
inference-dynamic-batching-async-sched-mode inference-dynamic-batching-block-size
inference-dynamic-batching-buffer-guaranteed-fraction inference-dynamic-batching-buffer-overflow-factor
inference-dynamic-batching-buffer-size-gb inference-dynamic-batching-chunk-size
inference-dynamic-batching-cuda-graph-max-tokens
inference-dynamic-batching-cuda-graph-mixed-prefill-count
inference-dynamic-batching-cuda-graph-sizing-distribution
inference-dynamic-batching-enable-prefix-caching inference-dynamic-batching-logprobs-mode
inference-dynamic-batching-mamba-memory-ratio inference-dynamic-batching-max-requests
inference-dynamic-batching-max-requests-override inference-dynamic-batching-max-tokens
inference-dynamic-batching-max-tokens-override inference-dynamic-batching-num-cuda-graphs
inference-dynamic-batching-paused-buffer-size-gb inference-dynamic-batching-prefix-caching
inference-dynamic-batching-prefix-caching-coordinator-policy
inference-dynamic-batching-prefix-caching-eviction-policy
inference-dynamic-batching-prefix-caching-mamba-gb
inference-dynamic-batching-prefix-caching-routing-alpha inference-dynamic-batching-sampling-backend
inference-dynamic-batching-track-generated-token-events
inference-dynamic-batching-track-paused-request-events inference-dynamic-batching-unified-memory-level
inference-fuse-tp-communication inference-grouped-gemm-backend inference-logging-step-interval
inference-max-batch-size inference-max-requests inference-max-seq-length
inference-moe-disable-fused-quant-kernels inference-moe-token-dispatcher-type inference-rng-tracker
inference-shards inference-text-gen-server-logging inference-use-synchronous-zmq-collectives
inference-wandb-logging langrl-inference-server-conversation-template langrl-inference-server-type
mamba-inference-conv-states-dtype mamba-inference-ssm-states-dtype max-tokens-to-oom
mlp-chunks-for-prefill moe-pad-experts-for-cuda-graph-inference nccl-all-reduce-for-prefill
no-offset-sampling-seed-by-dp-rank num-speculative-tokens output-bert-embeddings return-log-probs
rl-inference-expert-model-parallel-size rl-inference-expert-tensor-model-parallel-size
rl-inference-logprobs-is-correction rl-inference-model-unified-memory-level rl-inference-parsers
rl-inference-pipeline-model-parallel-size rl-inference-tensor-model-parallel-size
rl-offload-inference-model-weights-when-idle rl-offload-optimizer-during-inference skip-prompt-log-probs
symmetric-ar-type use-flashinfer-fused-rope use-legacy-static-engine
use-same-sampling-seed-across-dp-ranks
""",
        "Restarts, fault tolerance and error injection": """
calc-ft-timeouts check-for-large-grads check-for-spiky-loss disable-check-for-nan-in-loss
distributed-timeout-seconds-after-init enable-ft-package error-injection-rate error-injection-type
exit-signal exit-signal-handler-for-dataloader exit-signal-handler-for-training ft-num-warmup-iters
inprocess-active-world-size inprocess-barrier-timeout inprocess-completion-timeout
inprocess-empty-cuda-cache inprocess-granularity inprocess-hard-timeout inprocess-heartbeat-interval
inprocess-heartbeat-timeout inprocess-last-call-wait inprocess-max-iterations
inprocess-monitor-process-interval inprocess-monitor-thread-interval
inprocess-progress-watchdog-interval inprocess-restart inprocess-soft-timeout
inprocess-termination-grace-time no-check-for-nan-in-loss no-check-for-nan-in-loss-and-grad rerun-mode
result-rejected-tracker-filename
""",
    }
)
NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {name: group for group, names in GROUPS.items() for name in names.split()}
)
