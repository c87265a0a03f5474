"""One tree of frozen dataclasses: every setting is one leaf, and flags, YAML keys and ``--help`` are made
from it.

A leaf is ``name: Annotated[type, rules..., "help"] = default``.  Its flag is the name with dashes and its
YAML key the name itself; leaf names are unique over the whole tree.  Names and meanings are Megatron-LM's
wherever Megatron-LM has the setting. Rules on one value (ranges, choices) stand here; rules that join several
fields stand in ``check.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(1)]  # 1, 2, 3, ...
Natural = Annotated[int, Ge(0)]  # 0, 1, 2, ...
Share = Annotated[float, Ge(0.0), Le(1.0)]
NonNegative = Annotated[float, Ge(0.0)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU experts, no biases."""

    num_layers: Annotated[Count, "transformer layers"] = 4
    hidden_size: Annotated[Count, "model width D"] = 256
    num_attention_heads: Annotated[Count, "attention heads"] = 4
    num_query_groups: Annotated[
        Count | None, "key/value heads (grouped-query attention); default: as many as attention heads"
    ] = None
    kv_channels: Annotated[Count | None, "width of one head; default: hidden size / attention heads"] = None
    ffn_hidden_size: Annotated[
        Count | None, "width of a dense feed-forward layer; default: 4 x hidden size"
    ] = None
    moe_ffn_hidden_size: Annotated[Count | None, "width of one expert; default: the feed-forward width"] = (
        None
    )
    seq_length: Annotated[Count, "tokens in one sample"] = 256
    qk_layernorm: Annotated[bool, "RMSNorm on queries and keys"] = False
    untie_embeddings_and_output_weights: Annotated[bool, "an output matrix of its own"] = False
    norm_epsilon: Annotated[float, Gt(0.0), "epsilon of RMSNorm"] = 1e-5
    rotary_base: Annotated[Count, "base of the rotary position embedding"] = 10000
    init_method_std: Annotated[
        float, Gt(0.0), "standard deviation of initial weights; output projections: / sqrt(2 x layers)"
    ] = 0.02
    hidden_dropout: Annotated[Share, "dropout on residual branches"] = 0.0
    attention_dropout: Annotated[Share, "dropout on attention probabilities"] = 0.0
    make_vocab_size_divisible_by: Annotated[Count, "the vocabulary is padded to a multiple of this"] = 128
    num_experts: Annotated[Count, "experts E in each MoE layer"] = 8
    moe_router_topk: Annotated[
        Count, "active experts k; with --topk-schedule the k that the schedule ends on"
    ] = 2
    moe_aux_loss_coeff: Annotated[NonNegative, "coefficient of the load-balancing loss"] = 0.0
    moe_z_loss_coeff: Annotated[NonNegative, "coefficient of the router z-loss"] = 0.0
    moe_expert_capacity_factor: Annotated[
        float | None, Gt(0.0), "drop tokens over this multiple of an even load; default: none"
    ] = None
    mlp_type: Annotated[
        Literal["standard", "residual"],
        "deepspeed engine: residual gives MoE layers a dense MLP beside the experts",
    ] = "standard"


@dataclass(frozen=True, kw_only=True)
class TopKScheduleConfig:
    """How k grows: a pure function of the number of completed steps."""

    topk_schedule: Annotated[
        Literal["constant", "linear", "cosine", "exponential", "multistep"], "how k changes in time"
    ] = "constant"
    topk_start: Annotated[Count | None, "k at step 0; default: --moe-router-topk"] = None
    topk_schedule_steps: Annotated[
        Count | None, "steps until --moe-router-topk is reached; default: --train-iters"
    ] = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is spread over the ranks."""

    tensor_model_parallel_size: Annotated[Count, "tensor parallelism (TP)"] = 1
    pipeline_model_parallel_size: Annotated[Count, "pipeline parallelism (PP)"] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        Count | None, "model chunks on each pipeline rank (interleaved schedule)"
    ] = None
    context_parallel_size: Annotated[Count, "context parallelism (CP)"] = 1
    expert_model_parallel_size: Annotated[Count, "expert parallelism (EP)"] = 1
    expert_tensor_parallel_size: Annotated[
        Count | None, "tensor parallelism inside experts; default: as TP"
    ] = None
    sequence_parallel: Annotated[bool, "split norms and residuals over the tensor-parallel ranks"] = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: Annotated[NonNegative, "highest learning rate"] = 3e-4
    min_lr: Annotated[NonNegative, "learning rate at the end of the decay"] = 0.0
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"], "shape of the decay"
    ] = "cosine"
    lr_decay_iters: Annotated[Count | None, "step at which the decay ends; default: --train-iters"] = None
    lr_warmup_iters: Annotated[Natural, "steps of linear warm-up"] = 0
    lr_wsd_decay_iters: Annotated[
        Count | None, "WSD: steps of the final decay; default: a tenth of the decay steps"
    ] = None
    weight_decay: Annotated[
        NonNegative, "decoupled weight decay; vectors (norms, router embeddings) have none"
    ] = 0.01
    clip_grad: Annotated[NonNegative, "largest global gradient norm; 0: no clipping"] = 1.0
    adam_beta1: Annotated[float, Ge(0.0), Lt(1.0), "Adam's first decay"] = 0.9
    adam_beta2: Annotated[float, Ge(0.0), Lt(1.0), "Adam's second decay"] = 0.999
    adam_eps: Annotated[float, Gt(0.0), "Adam's epsilon"] = 1e-8
    use_distributed_optimizer: Annotated[
        bool, "megatron engine: optimizer state split over data-parallel ranks"
    ] = False
    overlap_grad_reduce: Annotated[
        bool, "megatron engine: reduce gradients while the backward pass goes on"
    ] = False
    overlap_param_gather: Annotated[
        bool, "megatron engine: gather weights while the forward pass goes on"
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batches, length and precision of the run."""

    micro_batch_size: Annotated[Count, "samples in one forward pass on one rank"] = 4
    global_batch_size: Annotated[
        Count | None, "samples in one optimizer step; default: micro-batch x data-parallel ranks"
    ] = None
    train_iters: Annotated[Count, "optimizer steps of the run"] = 100
    seed: Annotated[Natural, Le(2**32 - 1), "of initial weights, sample order and dropout"] = 1234
    bf16: Annotated[bool, "bfloat16 weights and activations, float32 optimizer"] = False
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None, "activation checkpointing: all, or attention only"
    ] = None
    eval_interval: Annotated[Natural, "steps between evaluations; 0: none"] = 1000
    eval_iters: Annotated[Natural, "global batches in one evaluation; 0: none"] = 10
    exit_on_signal: Annotated[bool, "SIGTERM saves a checkpoint and stops"] = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    data_path: Annotated[
        tuple[str, ...], "prefixes of .bin/.idx files, each optionally after its weight: 0.3 a 0.7 b"
    ] = ()
    train_data_path: Annotated[tuple[str, ...], "as --data-path, for training alone"] = ()
    valid_data_path: Annotated[tuple[str, ...], "as --data-path, for validation alone"] = ()
    test_data_path: Annotated[tuple[str, ...], "as --data-path, for the test alone"] = ()
    data_schedule: Annotated[
        str | None,
        "YAML file of mixes for training, each from its step on; without --data-path, --split divides its "
        "first one for the rest",
    ] = None
    split: Annotated[str, "shares of --data-path for training, validation, test"] = "969,30,1"
    tokenizer_type: Annotated[
        Literal["ByteTokenizer", "HuggingFaceTokenizer", "NullTokenizer"], "how ids map to text"
    ] = "ByteTokenizer"
    tokenizer_model: Annotated[str | None, "HuggingFaceTokenizer: tokenizer.json or its folder"] = None
    vocab_size: Annotated[Count | None, "NullTokenizer: number of token ids"] = None
    data_index: Annotated[
        Literal["auto", "materialised", "on-demand"],
        "order of samples: built at the start, as megatron-core's; or looked up, for huge files; auto: "
        "on-demand from 2**25 documents on",
    ] = "auto"
    data_cache_path: Annotated[
        str | None,
        "folder of index files, which one process of a node builds for all; default: cache/hyperrouter "
        "beside the data, else index-cache"
        " of the run folder",
    ] = None
    num_workers: Annotated[
        Natural, "threads that read ahead, each 4 micro-batches; 0: read when a batch is needed"
    ] = 2
    reset_attention_mask: Annotated[
        bool, "attention does not cross the end of a document (the tokenizer's end-of-document id)"
    ] = False
    reset_position_ids: Annotated[bool, "positions count from the beginning of each document"] = False
    eod_mask_loss: Annotated[
        bool, "no loss where the input is the end of a document: nothing foretells the next one"
    ] = False
    pack_documents: Annotated[
        bool,
        "samples of whole documents, the rest filled up without loss; only longer ones than a sample are cut",
    ] = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: Annotated[Natural, "steps between checkpoints; 0: at the end only"] = 0
    keep_checkpoints: Annotated[Natural, "newest checkpoints to keep; 0: all"] = 0
    load: Annotated[str | None, "run folder or checkpoint folder to continue from"] = None
    finetune: Annotated[bool, "load weights only: step, optimizer and random state start afresh"] = False


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run tells, and where."""

    run_dir: Annotated[str, "folder of this run: config.yaml, metrics.jsonl, checkpoints/"] = "runs/default"
    log_interval: Annotated[Count, "steps between lines on the console"] = 10
    tensorboard_dir: Annotated[str | None, "write TensorBoard events to this folder"] = None
    wandb_project: Annotated[str | None, "report to this Weights & Biases project"] = None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine trains, and its own settings."""

    engine: Annotated[Literal["deepspeed", "megatron"], "training engine"] = "deepspeed"
    moe_token_dispatcher_type: Annotated[
        Literal["alltoall", "allgather", "flex"], "megatron engine: how tokens reach their experts"
    ] = "alltoall"
    transformer_impl: Annotated[
        Literal["auto", "local", "transformer_engine"],
        "megatron engine: whose layers; auto: Transformer Engine's in bfloat16 on GPUs where it is "
        "installed, else torch's",
    ] = "auto"
    zero_stage: Annotated[
        int, Ge(0), Le(3), "deepspeed engine: ZeRO stage, 0 to 2; stage 3 has no mixture of experts"
    ] = 1
    deepspeed_config: Annotated[
        str | None, "JSON file merged into the settings made for DeepSpeed; a contradiction is an error"
    ] = None


@dataclass(frozen=True, kw_only=True)
class RouterChoice:
    """The router's name and its own options: an instance of that router's ``Config``."""

    name: str = "hyper"
    options: Any = None  # frozen dataclass; None only in a tree that no registry has completed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterChoice = field(default_factory=RouterChoice)
    topk: TopKScheduleConfig = field(default_factory=TopKScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
