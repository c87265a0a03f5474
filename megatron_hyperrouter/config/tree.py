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

from megatron_hyperrouter.config.kinds import Count, Experts, Fraction, Layers, Natural, NonNegative, YamlWord
from megatron_hyperrouter.config.roles import FILE, FOLDER, PREFIX, Metavar, Only, Quiet, Role
from megatron_hyperrouter.config.sections.attention import AttentionConfig
from megatron_hyperrouter.config.sections.checkpoint import CheckpointConfig as CheckpointConfig
from megatron_hyperrouter.config.sections.guard import GuardConfig
from megatron_hyperrouter.config.sections.optimizer import OptimizerConfig as OptimizerConfig
from megatron_hyperrouter.config.sections.precision import PrecisionConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU experts, no biases."""

    num_layers: Annotated[Layers, Role.SHAPE, "Number of transformer layers"] = 4
    hidden_size: Annotated[Count, Role.SHAPE, "Width of the model (D)"] = 256
    num_attention_heads: Annotated[Count, Role.SHAPE, "Number of attention heads"] = 4
    num_query_groups: Annotated[
        Count | None,
        Role.SHAPE,
        "Number of key/value heads (grouped-query attention); default: one for each attention head",
    ] = None
    kv_channels: Annotated[
        Count | None,
        Role.SHAPE,
        "Width of one attention head; default: --hidden-size / --num-attention-heads",
    ] = None
    ffn_hidden_size: Annotated[
        Count | None,
        Role.SHAPE,
        "Hidden width of the feed-forward block in a dense layer; default: 4 x --hidden-size",
    ] = None
    moe_ffn_hidden_size: Annotated[
        Count | None, Role.SHAPE, "Hidden width of each expert; default: --ffn-hidden-size"
    ] = None
    seq_length: Annotated[Count, Role.ORDER, "Number of tokens in one sample"] = 256
    qk_layernorm: Annotated[bool, Role.SHAPE, "Apply RMSNorm to queries and keys"] = False
    untie_embeddings_and_output_weights: Annotated[
        bool, Role.SHAPE, "Use a separate output (LM head) matrix instead of the tied embedding"
    ] = False
    norm_epsilon: Annotated[float, Gt(0.0), Role.FUNCTION, "Epsilon of RMSNorm"] = 1e-5
    rotary_base: Annotated[float, Gt(1.0), Role.FUNCTION, "Base (theta) of the rotary position embedding"] = (
        10000.0
    )
    init_method_std: Annotated[
        float,
        Gt(0.0),
        Role.INITIAL,
        "Standard deviation of the initial weights. Output projections have a smaller one: X / sqrt(2 "
        "* --num-layers)",
    ] = 0.02
    hidden_dropout: Annotated[Fraction, Role.NOISE, "Dropout rate on residual branches"] = 0.0
    attention_dropout: Annotated[Fraction, Role.NOISE, "Dropout rate on attention probabilities"] = 0.0
    make_vocab_size_divisible_by: Annotated[Count, Role.SHAPE, "Pad the vocabulary to a multiple of N"] = 128
    pad_vocab_size_to_tp: Annotated[
        bool,
        Role.SHAPE,
        "Pad the vocabulary to a multiple of --make-vocab-size-divisible-by x TP, as Megatron-LM does",
    ] = False
    num_experts: Annotated[Experts, Role.SHAPE, "Number of experts E in each MoE layer"] = 8
    moe_layer_freq: Annotated[
        YamlWord,
        Role.SHAPE,
        Metavar("N|LIST"),
        "Which layers are MoE layers. N: every Nth layer, beginning with the first; LIST: a 1 "
        "(MoE) or a 0 (dense) for each layer, also as an expression such as ([0]*1+[1]*26)",
    ] = "1"
    moe_shared_expert_intermediate_size: Annotated[
        Count | None,
        Role.SHAPE,
        "Hidden width of the shared expert, which processes every token in addition to the routed "
        "experts; default: no shared expert",
    ] = None
    moe_shared_expert_gate: Annotated[
        bool,
        Role.SHAPE,
        "Multiply the output of the shared expert by a trained sigmoid gate, which is computed "
        "for each token",
    ] = False
    moe_router_topk: Annotated[
        Count, Role.FUNCTION, "Number of active experts k for each token; with --topk-schedule, the final k"
    ] = 2
    moe_router_force_load_balancing: Annotated[
        bool,
        Role.COURSE,
        "Ignore the router, and spread the tokens evenly over the experts; for speed tests only",
    ] = False
    moe_aux_loss_coeff: Annotated[NonNegative, Role.COURSE, "Weight of the load-balancing loss"] = 0.0
    moe_z_loss_coeff: Annotated[NonNegative, Role.COURSE, "Weight of the router z-loss"] = 0.0
    moe_expert_capacity_factor: Annotated[
        float | None,
        Gt(0.0),
        Role.FUNCTION,
        "Maximum number of tokens for each expert, as a multiple of the mean over experts; tokens "
        "above the maximum are dropped; default: no limit",
    ] = None
    mtp_num_layers: Annotated[
        Layers | None,
        Role.SHAPE,
        Only("megatron", "leave out FLAG, or use --engine megatron"),
        "Number of multi-token prediction layers; layer n predicts the token n positions after "
        "the next token; default: none",
    ] = None
    mtp_loss_scaling_factor: Annotated[
        NonNegative,
        Role.COURSE,
        Only("megatron"),
        "Weight of the multi-token prediction loss, which is averaged over the multi-token prediction layers",
    ] = 0.1
    mlp_type: Annotated[
        Literal["standard", "residual"],
        Role.SHAPE,
        Only("deepspeed", "leave out FLAG, or use --engine deepspeed"),
        "Parts of an MoE layer. standard: only experts; residual (PR-MoE): experts and a dense "
        "MLP, mixed with trained coefficients",
    ] = "standard"


@dataclass(frozen=True, kw_only=True)
class TopKScheduleConfig:
    """How the number of active experts k grows with the completed steps."""

    topk_schedule: Annotated[
        Literal["constant", "linear", "cosine", "exponential", "multistep"],
        Role.SCHEDULE,
        "How k changes from --topk-start to --moe-router-topk",
    ] = "constant"
    topk_start: Annotated[
        Count | None,
        Role.SCHEDULE,
        "Number of active experts k at the first step; default: --moe-router-topk",
    ] = None
    topk_schedule_steps: Annotated[
        Count | None,
        Role.SCHEDULE,
        "Number of steps until k reaches --moe-router-topk; default: --train-iters",
    ] = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is spread over the ranks."""

    tensor_model_parallel_size: Annotated[Count, Role.LAYOUT, "Tensor-parallel size (TP)"] = 1
    pipeline_model_parallel_size: Annotated[Count, Role.LAYOUT, "Pipeline-parallel size (PP)"] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        Count | None,
        Role.LAYOUT,
        "Number of model chunks on each pipeline rank (interleaved schedule); default: no interleaving",
    ] = None
    decoder_first_pipeline_num_layers: Annotated[
        Count | None,
        Role.LAYOUT,
        "Number of layers in the first pipeline stage; default: as many as in the other stages",
    ] = None
    decoder_last_pipeline_num_layers: Annotated[
        Count | None,
        Role.LAYOUT,
        "Number of layers in the last pipeline stage; default: as many as in the other stages",
    ] = None
    context_parallel_size: Annotated[Count, Role.LAYOUT, "Context-parallel size (CP)"] = 1
    expert_model_parallel_size: Annotated[Count, Role.LAYOUT, "Expert-parallel size (EP)"] = 1
    expert_tensor_parallel_size: Annotated[
        Count | None,
        Role.LAYOUT,
        "Tensor-parallel size inside experts (ETP); default: --tensor-model-parallel-size",
    ] = None
    sequence_parallel: Annotated[
        bool,
        Role.LAYOUT,
        "Sequence parallelism: split the sequence over the tensor-parallel ranks in norms, "
        "dropout and the residual stream",
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batches, length and precision of the run."""

    micro_batch_size: Annotated[Count, Role.PORTION, "Number of samples in one forward pass on one rank"] = 4
    global_batch_size: Annotated[
        Count | None,
        Role.BATCH,
        "Number of samples in one optimizer step; default: --micro-batch-size x number of "
        "data-parallel ranks",
    ] = None
    rampup_batch_size: Annotated[
        tuple[Count, Count, Count] | None,
        Role.BATCH,
        Metavar("START INCREMENT SAMPLES"),
        "Increase the global batch size from START to --global-batch-size during the first SAMPLES "
        "samples, by INCREMENT at a time. The learning-rate schedule then counts samples, not steps",
    ] = None
    train_iters: Annotated[Count, Role.COURSE, "Number of optimizer steps in the run"] = 100
    seed: Annotated[
        Natural, Le(2**32 - 1), Role.ORDER, "Random seed for initial weights, sample order and dropout"
    ] = 1234
    bf16: Annotated[bool, Role.PRECISION, "Compute in bfloat16; the optimizer keeps float32 weights"] = False
    recompute_method: Annotated[
        Literal["uniform", "block"] | None,
        Role.SPEED,
        Only("megatron", harmless="every layer is recomputed separately"),
        "Which layers to recompute with --recompute-granularity full. uniform: all layers, in groups "
        "of --recompute-num-layers; block: only the first --recompute-num-layers layers of each "
        "pipeline stage",
    ] = None
    recompute_num_layers: Annotated[
        Count | None,
        Role.SPEED,
        Only("megatron", harmless="every layer is recomputed separately"),
        "With --recompute-method: number of layers in a group (uniform), or of layers to "
        "recompute (block); default: 1",
    ] = None
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None,
        Role.SPEED,
        "Recompute activations in the backward pass to save memory. full: whole layers; selective: "
        "only --recompute-modules; default: no recomputation",
    ] = None
    recompute_modules: Annotated[
        tuple[str, ...],
        Role.SPEED,
        Metavar("PART"),
        "With --recompute-granularity selective: parts to recompute: core_attn (attention "
        "without its projections), mlp (in dense layers), moe or shared_experts; default: "
        "core_attn",
    ] = ()
    eval_interval: Annotated[
        Natural, Role.UPKEEP, Quiet(0), "Number of steps between evaluations; 0: no evaluation"
    ] = 1000
    eval_iters: Annotated[
        Natural, Role.PORTION, "Number of global batches in one evaluation; 0: no evaluation"
    ] = 10
    exit_on_signal: Annotated[
        bool, Role.UPKEEP, "Save and stop on SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2, SIGHUP"
    ] = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    data_path: Annotated[
        tuple[str, ...],
        Role.DATA,
        PREFIX,
        "Prefixes of token files (paths without .bin or .idx); to mix files, write a weight "
        "before each prefix: 0.3 a 0.7 b",
    ] = ()
    train_data_path: Annotated[
        tuple[str, ...], Role.DATA, PREFIX, "Same as --data-path, but only for training data"
    ] = ()
    valid_data_path: Annotated[
        tuple[str, ...], Role.DATA, PREFIX, "Same as --data-path, but only for validation data"
    ] = ()
    test_data_path: Annotated[
        tuple[str, ...], Role.DATA, PREFIX, "Same as --data-path, but only for test data"
    ] = ()
    mock_data: Annotated[
        bool, Role.DATA, "Train, validate and test on synthetic tokens, without data files"
    ] = False
    data_schedule: Annotated[
        str | None,
        Role.DATA,
        FILE,
        "YAML file that changes the training mix at given steps. Without --data-path, --split divides "
        "the files of the first mix",
    ] = None
    split: Annotated[
        str,
        Role.DATA,
        Metavar("A,B,C"),
        "Relative sizes of the training, validation and test parts of --data-path",
    ] = "969,30,1"
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
        "Type of the tokenizer that made the token ids",
    ] = "ByteTokenizer"
    tokenizer_model: Annotated[
        str | None,
        Role.TOKENIZER,
        FILE,
        "File of the tokenizer. For HuggingFaceTokenizer: tokenizer.json, its folder, or the name of "
        "a model on the Hugging Face hub",
    ] = None
    vocab_file: Annotated[str | None, Role.TOKENIZER, FILE, "For GPT2BPETokenizer: path of vocab.json"] = None
    merge_file: Annotated[str | None, Role.TOKENIZER, FILE, "For GPT2BPETokenizer: path of merges.txt"] = None
    vocab_size: Annotated[
        Count | None,
        Role.TOKENIZER,
        "For TikTokenizer and NullTokenizer: number of token ids. NullTokenizer adds an "
        "end-of-document token with the id N",
    ] = None
    eod_token: Annotated[
        str | None,
        Role.TOKENIZER,
        Metavar("TOKEN"),
        "Token that marks the end of a document; default: the end-of-document token in the tokenizer's files",
    ] = None
    tiktoken_pattern: Annotated[
        Literal["v1", "v2"], Role.TOKENIZER, "For TikTokenizer: version of the pre-tokenization pattern"
    ] = "v2"
    tiktoken_num_special_tokens: Annotated[
        Count, Role.TOKENIZER, "For TikTokenizer: number of special tokens; they have the first ids"
    ] = 1000
    tokenizer_special_tokens: Annotated[
        tuple[str, ...],
        Role.TOKENIZER,
        Metavar("TOKEN"),
        "For TikTokenizer: names of the first special tokens; default: the same names as in Megatron-LM",
    ] = ()
    data_index: Annotated[
        Literal["auto", "materialised", "on-demand"],
        Role.ORDER,
        "When to compute the order of the samples. materialised: at the start, in the order of "
        "megatron-core; on-demand: during training, in a different order; auto: on-demand for 2**25 "
        "documents or more, else materialised",
    ] = "auto"
    data_cache_path: Annotated[
        str | None,
        Role.PLACE,
        FOLDER,
        "Folder for index files, built by one process on each node; default: cache/hyperrouter "
        "next to the data, or index-cache in the run folder if the data folder is not writable",
    ] = None
    num_workers: Annotated[
        Natural,
        Role.PORTION,
        "Number of data-loading threads (each thread prefetches 4 micro-batches); 0: load each "
        "batch when it is needed",
    ] = 2
    reset_attention_mask: Annotated[
        bool, Role.COURSE, "Stop attention at document boundaries (end-of-document tokens)"
    ] = False
    reset_position_ids: Annotated[
        bool, Role.COURSE, "Restart the position count at the start of each document"
    ] = False
    eod_mask_loss: Annotated[
        bool, Role.COURSE, "Mask the loss of the first token after each end-of-document token"
    ] = False
    pack_documents: Annotated[
        bool,
        Role.ORDER,
        "Pack whole documents into each sample (best fit). Only documents longer than a sample "
        "are split; padding has no loss",
    ] = False


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports, and where."""

    run_dir: Annotated[
        str, Role.PLACE, FOLDER, "Folder of this run, for config.yaml, metrics.jsonl and checkpoints/"
    ] = "runs/default"
    log_interval: Annotated[Count, Role.DISPLAY, "Number of steps between log lines on the console"] = 10
    log_params_norm: Annotated[
        bool,
        Role.DISPLAY,
        "Record the norm of all trainable parameters at each step, in the field params_norm of metrics.jsonl",
    ] = False
    log_num_zeros_in_grad: Annotated[
        bool,
        Role.DISPLAY,
        Only("megatron", harmless="DeepSpeed frees the gradients before they can be counted"),
        "Record the number of zero gradients at each step, in the field num_zeros of metrics.jsonl",
    ] = False
    profile: Annotated[
        bool,
        Role.DISPLAY,
        "Trace the steps after --profile-step-start, up to --profile-step-end, with torch.profiler; "
        "write the trace to profile/ in the run folder",
    ] = False
    profile_step_start: Annotated[Natural, Role.DISPLAY, "Begin the trace after step N"] = 10
    profile_step_end: Annotated[Count, Role.DISPLAY, "End the trace after step N"] = 12
    profile_ranks: Annotated[tuple[int, ...], Role.DISPLAY, "Ranks that write a trace"] = (0,)
    tensorboard_dir: Annotated[str | None, Role.PLACE, FOLDER, "Folder to write TensorBoard events to"] = None
    wandb_project: Annotated[
        str | None,
        Role.DISPLAY,
        Metavar("NAME"),
        "Weights & Biases project to which the run sends its metrics",
    ] = None
    wandb_exp_name: Annotated[
        str | None,
        Role.DISPLAY,
        Metavar("NAME"),
        "Name of the run in --wandb-project; default: the name of the run folder",
    ] = None
    sample_interval: Annotated[
        Natural,
        Role.DISPLAY,
        "Every N steps, let the model continue each --sample-prompt, and show the text; 0: never",
    ] = 0
    sample_prompt: Annotated[
        tuple[str, ...], Role.DISPLAY, "Prompts for --sample-interval, continued by greedy decoding"
    ] = ()


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The training engine, and settings that only one engine has."""

    engine: Annotated[Literal["deepspeed", "megatron"], Role.ENGINE, "Training engine"] = "deepspeed"
    moe_token_dispatcher_type: Annotated[
        Literal["alltoall", "allgather", "flex"],
        Role.SPEED,
        Only("megatron", harmless="DeepSpeed always dispatches tokens by all-to-all"),
        "Method of sending tokens to their experts",
    ] = "alltoall"
    transformer_impl: Annotated[
        Literal["auto", "local", "transformer_engine"],
        Role.SPEED,
        Only("megatron", harmless="this engine always uses PyTorch layers"),
        "Layer implementation. auto: Transformer Engine for bfloat16 on GPUs if it is "
        "installed, else PyTorch",
    ] = "auto"
    moe_grouped_gemm: Annotated[
        bool,
        Role.SPEED,
        "Compute all experts of a rank together, in grouped matrix products; off: one expert after another",
    ] = True
    zero_stage: Annotated[
        int,
        Ge(0),
        Le(3),
        Role.SHARDING,
        Only("deepspeed", "leave out FLAG; --use-distributed-optimizer does the same as stage 1"),
        "ZeRO stage 0, 1 or 2. Stage 3 is refused, because DeepSpeed does not support stage 3 "
        "for mixture-of-experts models",
    ] = 1
    shard_hypernetwork: Annotated[
        bool | None,
        Role.SHARDING,
        "To save memory, divide the hypernetwork (router hyper) among the data-parallel ranks; "
        "default: only if --num-experts x --hidden-size exceeds 2^18",
    ] = None
    deepspeed_config: Annotated[
        str | None,
        Role.SPEED,
        Only("deepspeed"),
        FILE,
        "JSON file with additional DeepSpeed settings; a key that contradicts a flag is an error",
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
