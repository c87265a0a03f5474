"""One tree of frozen dataclasses: every setting is one leaf, and flags, YAML keys and ``--help`` are made
from it.

A leaf is ``name: Annotated[type, rules..., role, "help"] = default``.  Its flag is the name with dashes and
its YAML key the name itself; leaf names are unique over the whole tree.  Names and meanings are Megatron-LM's
wherever Megatron-LM has the setting.  Rules on one value (ranges, choices) are here; rules that join several
settings are in ``rules/``.  The role (``roles.py``) says what the setting changes; ``Only`` names the one
engine that has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from megatron_hyperrouter.config.kinds import Count, Natural, NonNegative, Share, Written
from megatron_hyperrouter.config.roles import PATH, Only, Quiet, Role
from megatron_hyperrouter.config.sections.attention import AttentionConfig
from megatron_hyperrouter.config.sections.guard import GuardConfig
from megatron_hyperrouter.config.sections.optimizer import OptimizerConfig as OptimizerConfig
from megatron_hyperrouter.config.sections.precision import PrecisionConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU experts, no biases."""

    num_layers: Annotated[Count, Role.SHAPE, "Transformer layers"] = 4
    hidden_size: Annotated[Count, Role.SHAPE, "Model width D"] = 256
    num_attention_heads: Annotated[Count, Role.SHAPE, "Attention heads"] = 4
    num_query_groups: Annotated[
        Count | None,
        Role.SHAPE,
        "Key/value heads (grouped-query attention); default: one for each attention head",
    ] = None
    kv_channels: Annotated[
        Count | None, Role.SHAPE, "Width of one head; default: hidden size / attention heads"
    ] = None
    ffn_hidden_size: Annotated[
        Count | None, Role.SHAPE, "Width of a dense feed-forward layer; default: 4 x hidden size"
    ] = None
    moe_ffn_hidden_size: Annotated[
        Count | None, Role.SHAPE, "Width of one expert; default: --ffn-hidden-size"
    ] = None
    seq_length: Annotated[Count, Role.ORDER, "Tokens in one sample"] = 256
    qk_layernorm: Annotated[bool, Role.SHAPE, "Apply RMSNorm to queries and keys"] = False
    untie_embeddings_and_output_weights: Annotated[
        bool, Role.SHAPE, "Use a separate output (LM head) matrix instead of the tied embedding"
    ] = False
    norm_epsilon: Annotated[float, Gt(0.0), Role.FUNCTION, "Epsilon of RMSNorm"] = 1e-5
    rotary_base: Annotated[float, Gt(1.0), Role.FUNCTION, "Base of the rotary position embedding"] = 10000.0
    init_method_std: Annotated[
        float,
        Gt(0.0),
        Role.INITIAL,
        "Standard deviation of the initial weights; output projections divide it by sqrt(2 x layers)",
    ] = 0.02
    hidden_dropout: Annotated[Share, Role.NOISE, "Dropout on residual branches"] = 0.0
    attention_dropout: Annotated[Share, Role.NOISE, "Dropout on attention probabilities"] = 0.0
    make_vocab_size_divisible_by: Annotated[Count, Role.SHAPE, "Pad the vocabulary to a multiple of this"] = (
        128
    )
    pad_vocab_size_to_tp: Annotated[
        bool,
        Role.SHAPE,
        "Pad the vocabulary to a multiple of --make-vocab-size-divisible-by x TP, as Megatron-LM does",
    ] = False
    num_experts: Annotated[Count, Role.SHAPE, "Experts E in each MoE layer"] = 8
    moe_layer_freq: Annotated[
        Written,
        Role.SHAPE,
        "Which layers have experts; N: every Nth, from the first on; or a list of 0 (dense) and 1, also as "
        "an expression: ([0]*1+[1]*26)",
    ] = "1"
    moe_shared_expert_intermediate_size: Annotated[
        Count | None,
        Role.SHAPE,
        "Width of a shared expert, which processes every token beside the routed experts; default: none",
    ] = None
    moe_shared_expert_gate: Annotated[
        bool, Role.SHAPE, "Multiply the shared expert's output by a trained sigmoid gate of the token"
    ] = False
    moe_router_topk: Annotated[
        Count, Role.FUNCTION, "Active experts k; with --topk-schedule, the k that the schedule ends with"
    ] = 2
    moe_router_force_load_balancing: Annotated[
        bool, Role.COURSE, "Ignore the router and spread tokens evenly over the experts (for speed tests)"
    ] = False
    moe_aux_loss_coeff: Annotated[NonNegative, Role.COURSE, "Weight of the load-balancing loss"] = 0.0
    moe_z_loss_coeff: Annotated[NonNegative, Role.COURSE, "Weight of the router z-loss"] = 0.0
    moe_expert_capacity_factor: Annotated[
        float | None,
        Gt(0.0),
        Role.FUNCTION,
        "Capacity of an expert as a multiple of an even load; tokens above it are dropped; default: no limit",
    ] = None
    mtp_num_layers: Annotated[
        Count | None,
        Role.SHAPE,
        Only(
            "megatron",
            "leave it out (the model then predicts the next token alone), or use --engine megatron",
        ),
        "Layers of multi-token prediction: layer n predicts the token n positions further; default: none",
    ] = None
    mtp_loss_scaling_factor: Annotated[
        NonNegative,
        Role.COURSE,
        Only("megatron"),
        "Weight of the mean loss of the multi-token prediction layers",
    ] = 0.1
    mlp_type: Annotated[
        Literal["standard", "residual"],
        Role.SHAPE,
        Only("deepspeed", "leave it out, or use --engine deepspeed"),
        "residual: each MoE layer also has a dense MLP beside its experts",
    ] = "standard"


@dataclass(frozen=True, kw_only=True)
class TopKScheduleConfig:
    """How the number of active experts k grows with the completed steps."""

    topk_schedule: Annotated[
        Literal["constant", "linear", "cosine", "exponential", "multistep"],
        Role.SCHEDULE,
        "How k changes during training",
    ] = "constant"
    topk_start: Annotated[Count | None, Role.SCHEDULE, "k at the first step; default: --moe-router-topk"] = (
        None
    )
    topk_schedule_steps: Annotated[
        Count | None, Role.SCHEDULE, "Steps until k reaches --moe-router-topk; default: --train-iters"
    ] = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is spread over the ranks."""

    tensor_model_parallel_size: Annotated[Count, Role.LAYOUT, "Tensor parallelism (TP)"] = 1
    pipeline_model_parallel_size: Annotated[Count, Role.LAYOUT, "Pipeline parallelism (PP)"] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        Count | None, Role.LAYOUT, "Model chunks on each pipeline rank (interleaved schedule)"
    ] = None
    decoder_first_pipeline_num_layers: Annotated[
        Count | None, Role.LAYOUT, "Layers of the first pipeline stage; default: as many as in the others"
    ] = None
    decoder_last_pipeline_num_layers: Annotated[
        Count | None, Role.LAYOUT, "Layers of the last pipeline stage; default: as many as in the others"
    ] = None
    context_parallel_size: Annotated[Count, Role.LAYOUT, "Context parallelism (CP)"] = 1
    expert_model_parallel_size: Annotated[Count, Role.LAYOUT, "Expert parallelism (EP)"] = 1
    expert_tensor_parallel_size: Annotated[
        Count | None,
        Role.LAYOUT,
        "Tensor parallelism inside experts (ETP); default: --tensor-model-parallel-size",
    ] = None
    sequence_parallel: Annotated[
        bool, Role.LAYOUT, "Split norms and residuals over the tensor-parallel ranks"
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batches, length and precision of the run."""

    micro_batch_size: Annotated[Count, Role.PORTION, "Samples in one forward pass on one rank"] = 4
    global_batch_size: Annotated[
        Count | None,
        Role.BATCH,
        "Samples in one optimizer step; default: --micro-batch-size x data-parallel ranks",
    ] = None
    rampup_batch_size: Annotated[
        tuple[Count, Count, Count] | None,
        Role.BATCH,
        "START INCREMENT SAMPLES: begin with START samples in a step, and add INCREMENT at a time until "
        "--global-batch-size is reached after SAMPLES samples; the learning rate then counts samples, in "
        "full batches",
    ] = None
    train_iters: Annotated[Count, Role.COURSE, "Optimizer steps of the run"] = 100
    seed: Annotated[
        Natural, Le(2**32 - 1), Role.ORDER, "Random seed for initial weights, sample order and dropout"
    ] = 1234
    bf16: Annotated[bool, Role.PRECISION, "Compute in bfloat16; the optimizer keeps float32 weights"] = False
    recompute_method: Annotated[
        Literal["uniform", "block"] | None,
        Role.SPEED,
        Only("megatron", harmless="each layer is recomputed by itself"),
        "With full recomputation. uniform: all layers, in groups of --recompute-num-layers; block: only the "
        "first --recompute-num-layers layers of each stage",
    ] = None
    recompute_num_layers: Annotated[
        Count | None,
        Role.SPEED,
        Only("megatron", harmless="each layer is recomputed by itself"),
        "With full recomputation: layers of a group (uniform), or layers to recompute (block); default: 1",
    ] = None
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None,
        Role.SPEED,
        "Recompute activations in the backward pass to save memory: whole layers, or --recompute-modules",
    ] = None
    recompute_modules: Annotated[
        tuple[str, ...],
        Role.SPEED,
        "With selective recomputation: core_attn (attention without its projections), mlp (of dense layers), "
        "moe, shared_experts; default: core_attn",
    ] = ()
    eval_interval: Annotated[Natural, Role.UPKEEP, Quiet(0), "Steps between evaluations; 0: none"] = 1000
    eval_iters: Annotated[Natural, Role.PORTION, "Global batches in one evaluation; 0: no evaluation"] = 10
    exit_on_signal: Annotated[
        bool, Role.UPKEEP, "Save and stop on SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2, SIGHUP"
    ] = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    data_path: Annotated[
        tuple[str, ...],
        Role.DATA,
        PATH,
        "Prefixes of .bin/.idx files, each optionally after its weight: 0.3 a 0.7 b",
    ] = ()
    train_data_path: Annotated[tuple[str, ...], Role.DATA, PATH, "As --data-path, for training only"] = ()
    valid_data_path: Annotated[tuple[str, ...], Role.DATA, PATH, "As --data-path, for validation only"] = ()
    test_data_path: Annotated[tuple[str, ...], Role.DATA, PATH, "As --data-path, for the test only"] = ()
    mock_data: Annotated[
        bool,
        Role.DATA,
        "Train, validate and test on made-up tokens, without data files",
    ] = False
    data_schedule: Annotated[
        str | None,
        Role.DATA,
        PATH,
        "YAML file that changes the training mix at given steps. Without --data-path, --split applies to"
        " the first mix",
    ] = None
    split: Annotated[str, Role.DATA, "Shares of --data-path for training, validation and test"] = "969,30,1"
    tokenizer_type: Annotated[
        Literal[
            "ByteTokenizer",
            "HuggingFaceTokenizer",
            "GPT2BPETokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "TikTokenizer",
            "NullTokenizer",
        ],
        Role.TOKENIZER,
        "How token ids map to text",
    ] = "ByteTokenizer"
    tokenizer_model: Annotated[
        str | None,
        Role.TOKENIZER,
        PATH,
        "File of the tokenizer; HuggingFaceTokenizer: tokenizer.json, its folder, or the name of a model on "
        "the Hugging Face hub",
    ] = None
    vocab_file: Annotated[str | None, Role.TOKENIZER, PATH, "GPT2BPETokenizer: vocab.json"] = None
    merge_file: Annotated[str | None, Role.TOKENIZER, PATH, "GPT2BPETokenizer: merges.txt"] = None
    vocab_size: Annotated[
        Count | None,
        Role.TOKENIZER,
        "NullTokenizer: number of token ids, not counting the end of a document, which is the id after them; "
        "TikTokenizer: number of token ids",
    ] = None
    eod_token: Annotated[
        str | None,
        Role.TOKENIZER,
        "Token that ends a document; default: the one that the tokenizer's own files name",
    ] = None
    tiktoken_pattern: Annotated[
        Literal["v1", "v2"], Role.TOKENIZER, "TikTokenizer: version of the pre-tokenization pattern"
    ] = "v2"
    tiktoken_num_special_tokens: Annotated[
        Count, Role.TOKENIZER, "TikTokenizer: number of ids before those of the file"
    ] = 1000
    tokenizer_special_tokens: Annotated[
        tuple[str, ...], Role.TOKENIZER, "TikTokenizer: names of its first ids; default: Megatron-LM's"
    ] = ()
    data_index: Annotated[
        Literal["auto", "materialised", "on-demand"],
        Role.ORDER,
        "Order of the samples: built at the start as in megatron-core, or computed on demand, for huge files;"
        " auto: on-demand from 2**25 documents on",
    ] = "auto"
    data_cache_path: Annotated[
        str | None,
        Role.PLACE,
        PATH,
        "Folder of index files, which one process of a node builds for all; default: cache/hyperrouter"
        " beside the data, or index-cache in the run folder",
    ] = None
    num_workers: Annotated[
        Natural,
        Role.PORTION,
        "Data-loading threads; each prefetches 4 micro-batches; 0: read a batch when it is needed",
    ] = 2
    reset_attention_mask: Annotated[
        bool, Role.COURSE, "Attention does not cross the end of a document (the end-of-document token)"
    ] = False
    reset_position_ids: Annotated[bool, Role.COURSE, "Count positions from the start of each document"] = (
        False
    )
    eod_mask_loss: Annotated[
        bool,
        Role.COURSE,
        "Mask the loss on the first token of each document (it would be predicted from the"
        " end-of-document token)",
    ] = False
    pack_documents: Annotated[
        bool,
        Role.ORDER,
        "Pack whole documents into each sample (best fit). Padding has no loss; only documents longer than"
        " a sample are split",
    ] = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: Annotated[
        Natural,
        Role.UPKEEP,
        "Steps between checkpoints; 0: only by --save-interval-minutes, and one at the end",
    ] = 0
    save_interval_minutes: Annotated[
        NonNegative | None,
        Role.UPKEEP,
        "Minutes between checkpoints; 0: none; default: 30 without --save-interval, else 0",
    ] = None
    async_save: Annotated[
        bool, Role.UPKEEP, "Train on while a checkpoint is written, from a copy in CPU memory"
    ] = True
    keep_checkpoints: Annotated[
        Natural, Role.UPKEEP, Quiet(1), "Keep this many of the newest checkpoints; 0: all"
    ] = 0
    keep_every: Annotated[
        Natural, Role.UPKEEP, Quiet(0), "Also keep every checkpoint whose step is a multiple of this; 0: none"
    ] = 0
    exit_duration_in_mins: Annotated[
        float | None, Gt(0.0), Role.UPKEEP, "Save and stop once the program has run for this many minutes"
    ] = None
    trust_checkpoint: Annotated[
        bool,
        Role.START,
        "Resume from a checkpoint of format 1, whose state-*.pt can run any code when it is loaded",
    ] = False
    no_save_optim: Annotated[
        bool, Role.UPKEEP, "Save checkpoints without the optimizer state: for use of the weights alone"
    ] = False
    no_load_optim: Annotated[
        bool, Role.START, "Continue at the checkpoint's step with a fresh optimizer and random state"
    ] = False
    no_load_rng: Annotated[
        bool, Role.START, "Continue with the random state of a new run, not the checkpoint's"
    ] = False
    use_checkpoint_opt_param_scheduler: Annotated[
        bool,
        Role.START,
        "Continue with the checkpoint's learning-rate schedule and weight decay, not with those given",
    ] = False
    exit_interval: Annotated[
        Count | None, Role.UPKEEP, "Save and stop at the first multiple of this many steps"
    ] = None
    load: Annotated[str | None, Role.START, PATH, "Run folder or checkpoint folder to continue from"] = None
    elastic: Annotated[
        bool,
        Role.START,
        "Continue on fewer or more ranks: keep the global batch and all parallel sizes but data parallelism, "
        "and choose the micro-batch",
    ] = False
    finetune: Annotated[
        bool, Role.START, "Load the weights only; step, optimizer and random state start afresh"
    ] = False
    override: Annotated[
        bool, Role.START, "When resuming, accept settings that change what the weights compute"
    ] = False


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports, and where."""

    run_dir: Annotated[
        str, Role.PLACE, PATH, "Folder of this run: config.yaml, metrics.jsonl, checkpoints/"
    ] = "runs/default"
    log_interval: Annotated[Count, Role.DISPLAY, "Steps between lines on the console"] = 10
    log_params_norm: Annotated[
        bool, Role.DISPLAY, "Record the norm of all trained parameters in each step: params_norm"
    ] = False
    log_num_zeros_in_grad: Annotated[
        bool,
        Role.DISPLAY,
        Only("megatron", harmless="ZeRO frees the gradients before they can be counted"),
        "Record the number of zeros in the gradient at each step, as num_zeros",
    ] = False
    profile: Annotated[
        bool, Role.DISPLAY, "Write a trace of some steps to profile/ in the run folder (torch.profiler)"
    ] = False
    profile_step_start: Annotated[Natural, Role.DISPLAY, "The trace begins after this step"] = 10
    profile_step_end: Annotated[Count, Role.DISPLAY, "The trace ends after this step"] = 12
    profile_ranks: Annotated[tuple[int, ...], Role.DISPLAY, "Ranks that write a trace"] = (0,)
    tensorboard_dir: Annotated[str | None, Role.PLACE, PATH, "Write TensorBoard events to this folder"] = None
    wandb_project: Annotated[str | None, Role.DISPLAY, "Report to this Weights & Biases project"] = None
    wandb_exp_name: Annotated[
        str | None,
        Role.DISPLAY,
        "With --wandb-project: name of the run there; default: the run folder's name",
    ] = None
    sample_interval: Annotated[
        Natural, Role.DISPLAY, "Steps between texts that continue --sample-prompt; 0: none"
    ] = 0
    sample_prompt: Annotated[tuple[str, ...], Role.DISPLAY, "Prompts that the run continues greedily"] = ()


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The training engine, and settings that only one engine has."""

    engine: Annotated[Literal["deepspeed", "megatron"], Role.ENGINE, "Training engine"] = "deepspeed"
    moe_token_dispatcher_type: Annotated[
        Literal["alltoall", "allgather", "flex"],
        Role.SPEED,
        Only("megatron", harmless="DeepSpeed's layers dispatch by all-to-all"),
        "How tokens reach their experts",
    ] = "alltoall"
    transformer_impl: Annotated[
        Literal["auto", "local", "transformer_engine"],
        Role.SPEED,
        Only("megatron", harmless="the layers are PyTorch's"),
        "Layer implementation. auto: Transformer Engine in bfloat16 on GPUs when installed, otherwise"
        " PyTorch",
    ] = "auto"
    moe_grouped_gemm: Annotated[
        bool,
        Role.SPEED,
        "Compute the experts of a rank in grouped matrix products. Off: one expert after the other",
    ] = True
    zero_stage: Annotated[
        int,
        Ge(0),
        Le(3),
        Role.SHARDING,
        Only("deepspeed", "leave it out; --use-distributed-optimizer does the same as stage 1"),
        "ZeRO stage, 0 to 2; DeepSpeed has no mixture of experts with stage 3",
    ] = 1
    deepspeed_config: Annotated[
        str | None,
        Role.SPEED,
        Only("deepspeed"),
        PATH,
        "JSON file merged into the settings for DeepSpeed; a key that contradicts a flag is an error",
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
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    router: RouterChoice = field(default_factory=RouterChoice)
    topk: TopKScheduleConfig = field(default_factory=TopKScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
