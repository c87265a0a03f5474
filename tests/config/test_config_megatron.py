"""megatron/: what becomes of each flag of Megatron-LM.  Whole commands: test_config_megatron_commands.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from config.refused import DATA, problems_of

from megatron_hyperrouter.config.check import warnings
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.derived import recomputed_parts, split_shares
from megatron_hyperrouter.config.help.router_listing import listed_routers
from megatron_hyperrouter.config.leaves import router_leaves, tree_leaves, value_of
from megatron_hyperrouter.config.megatron.absent import FEATURES
from megatron_hyperrouter.config.megatron.carry import ALL_ABSENT
from megatron_hyperrouter.config.megatron.no_effect import GROUPS, NO_EFFECT
from megatron_hyperrouter.config.megatron.table import ABSENT, ALWAYS, ARITHMETIC, RENAMED
from megatron_hyperrouter.config.megatron.translate import EARLY, LATE
from megatron_hyperrouter.errors import ConfigError

HERE = Path(__file__).parent
FLAGS = set((HERE / "megatron_flags.txt").read_text().split("\n", 1)[1].split())
KINDS = (ALWAYS, NO_EFFECT, RENAMED, ARITHMETIC, ALL_ABSENT)


@pytest.fixture(scope="module")
def all_routers():
    return listed_routers()


class TestTable:
    def test_every_flag_of_megatron_lm_has_one_row_or_is_a_setting(self):
        ours = {name.replace("_", "-") for name in tree_leaves()}
        rows = Counter(name for kind in KINDS for name in kind)
        assert {name for name, count in rows.items() if count > 1} == set()
        assert ours & set(rows) == set()
        assert set(rows) - FLAGS == set()
        assert FLAGS - set(rows) - ours == set()

    def test_no_flag_is_in_two_groups(self):
        groups = [*GROUPS.values(), *FEATURES.values()]
        assert max(Counter(name for names in groups for name in names.split()).values()) == 1

    def test_new_names_are_settings(self, all_routers):
        options = {name for router in all_routers.values() for name in router_leaves(router.Config)}
        assert set(RENAMED.values()) <= {*tree_leaves(), *options}
        assert {*EARLY, *LATE} == set(ARITHMETIC)

    def test_texts_are_sentences_to_read(self):
        for name, row in ABSENT.items():
            assert row.does
            assert row.without, name


class TestContradictions:
    @pytest.mark.parametrize(
        "argv",
        [
            "--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --bf16 --engine megatron",
            "--no-multi-latent-attention --multi-latent-attention --kv-lora-rank 8",
            "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
            "--no-create-attention-mask-in-dataloader --reset-attention-mask",
        ],
    )
    def test_flags_that_ask_for_opposite_things(self, all_routers, argv):
        one, other = (word for word in argv.split()[:2])
        (problem,) = [p for p in problems_of(all_routers, *DATA, *argv.split()) if "contradicts" in p.rule]
        assert (problem.field, problem.rule) == (_dashed(one), f"contradicts {_dashed(other)}")
        understood(all_routers, one)

    def test_two_ways_to_say_the_warm_up(self, all_routers):
        argv = "--lr-warmup-samples 80 --lr-warmup-fraction 0.1 --global-batch-size 8"
        (problem,) = problems_of(all_routers, *DATA, *argv.split())
        assert problem.rule == "sets the same thing as --lr-warmup-samples"


def _dashed(name: str) -> str:
    return "--" + name.removeprefix("--").replace("_", "-")


def test_groups_of_heads_have_megatron_lms_default(all_routers):
    """arguments.py: --group-query-attention has one group unless --num-query-groups says otherwise."""
    for argv, groups in (("", None), ("--group-query-attention", 1), ("--num-query-groups 2", 2)):
        assert understood(all_routers, *argv.split())[0].model.num_query_groups == groups
    both = ["--group-query-attention", "--num-query-groups", "2"]
    assert understood(all_routers, *both)[0].model.num_query_groups == 2


def test_groups_of_heads_in_a_file_stay(all_routers, write):
    path = write("data_path: a\nnum_query_groups: 2\n")
    config = parse(["--config", path, "--group-query-attention"], routers=all_routers)
    assert config.model.num_query_groups == 2


def test_kinds_of_positions(all_routers):
    argv = "--position-embedding-type yarn --yarn-beta-fast 16 --yarn-original-max-position-embeddings 64"
    attention = understood(all_routers, *argv.split(), "--yarn-correction-range-round-to-int")[0].attention
    found = (attention.rope_type, attention.beta_fast, attention.original_max_position_embeddings)
    assert found == ("yarn", 16.0, 64)
    assert understood(all_routers, "--position-embedding-type", "rope")[0].attention.rope_type is None
    (problem,) = problems_of(all_routers, *DATA, "--position-embedding-type", "learned_absolute")
    assert problem.rule == "must be rope or yarn: positions are always rotary"


def test_steps_that_are_left_out(all_routers):
    """Megatron-LM compares with the number of completed steps (training.py, ``iterations_to_skip``)."""
    assert understood(all_routers, "--iterations-to-skip", "0", "7")[0].guard.skip_steps == ("1", "8")
    (problem,) = problems_of(all_routers, *DATA, "--iterations-to-skip", "2-3")
    assert problem.rule == "must be a list of steps"


def test_retained_checkpoints(all_routers):
    checkpoint = understood(all_routers, "--save-retain-interval", "1000")[0].checkpoint
    assert (checkpoint.keep_every, checkpoint.keep_checkpoints) == (1000, 1)


def test_samples_of_a_batch_that_grows(all_routers):
    """2 steps of 4, then 8 at a time: Megatron-LM's ``update_train_iters`` by hand."""
    argv = "--rampup-batch-size 4 4 8 --global-batch-size 8 --micro-batch-size 4 --train-samples 100"
    config, _ = understood(all_routers, *argv.split(), "--lr-warmup-fraction", "0.5")
    assert config.train.rampup_batch_size == (4, 4, 8)
    assert config.train.train_iters == 13  # 2 x 4 + 11 x 8 = 96
    assert config.optimizer.lr_warmup_iters == 6  # half of 12 full batches


def understood(routers, *argv, **keywords):
    notes: list[str] = []
    return parse([*DATA, *argv], routers=routers, notes=notes, **keywords), " ".join(notes)


class TestKinds:
    def test_what_is_always_so_is_accepted_and_counted(self, all_routers):
        flags = "--swiglu --normalization RMSNorm --use-mcore-models --optimizer adam --disable-bias-linear"
        _, note = understood(all_routers, *flags.split(), "--use-flash-attn", "--log_throughput")
        assert "5 have the only value that this program supports" in note
        assert "2 (--use-flash-attn, --log-throughput) have no effect on the result" in note

    def test_what_is_always_otherwise_is_refused(self, all_routers):
        for flag, value, reason in (
            ("--normalization", "LayerNorm", "the norm is RMSNorm"),
            ("--optimizer", "sgd", "the optimizer is AdamW"),
            ("--softmax-type", "learnable", "attention sinks"),
        ):
            (problem,) = problems_of(all_routers, *DATA, flag, value)
            assert (problem.field, problem.value) == (flag, value)
            assert "cannot be changed" in problem.rule and reason in problem.rule

    def test_how_context_parallel_ranks_talk_changes_no_result(self, all_routers):
        for kind in ("p2p", "all_gather", "a2a+p2p"):
            assert "--cp-comm-type" in understood(all_routers, "--cp-comm-type", kind)[1]

    def test_what_is_absent_says_what_it_is_and_what_would_change(self, all_routers):
        (problem,) = problems_of(all_routers, *DATA, "--fp4-format", "e2m1")
        assert problem.rule == "is not supported; it is for 8-bit and 4-bit number formats"
        assert problem.remedy.startswith("leave it out; then the run computes in")

    @pytest.mark.parametrize("name", ["logging-level", "lr-warmup-init", "vocab-file", "cp-comm-type", "sft"])
    def test_no_name_of_megatron_lm_is_taken_for_a_slip(self, all_routers, name):
        try:
            understood(all_routers, f"--{name}", "1")
        except ConfigError as error:
            assert "did you mean" not in str(error)

    def test_other_names(self, all_routers):
        argv = "--save here --exit-signal-handler --layernorm-epsilon 1e-6 --batch-size 2 --most-recent-k 3"
        config, note = understood(all_routers, *argv.split())
        assert config.logging.run_dir == "here"
        assert config.train.exit_on_signal is True
        assert (config.model.norm_epsilon, config.train.micro_batch_size) == (1e-6, 2)
        assert config.checkpoint.keep_checkpoints == 3
        assert "--save is --run-dir here" in note
        (problem,) = problems_of(all_routers, *DATA, "--save", "a", "--run-dir", "b")
        assert "which is given with" in problem.rule
        assert understood(all_routers, "--save", "a", "--run-dir", "a")[0].logging.run_dir == "a"

    def test_router_flags_go_to_the_routers_options(self, all_routers):
        argv = "--router.name topk --moe-router-pre-softmax --moe-input-jitter-eps 0.1"
        assert understood(all_routers, *argv.split())[0].router.options.jitter_eps == 0.1
        (problem,) = problems_of(
            all_routers, *DATA, "--router.name", "stablemoe", "--moe-input-jitter-eps", "0.1"
        )
        assert "is not an option of router" in problem.rule

    @pytest.mark.parametrize(
        "argv",
        [
            "--moe-router-score-function sigmoid",  # becomes two options
            "--moe-router-pre-softmax",
            "--moe-router-load-balancing-type seq_aux_loss",
            "--moe-router-enable-expert-bias",
        ],
    )
    def test_a_router_without_the_option_names_the_flag_that_was_typed(self, all_routers, argv):
        words = ["--router.name", "stablemoe", *argv.split()]
        (problem,) = problems_of(all_routers, *DATA, *words)
        assert problem.field == argv.split()[0]
        assert "is not an option of router stablemoe" in problem.rule

    @pytest.mark.parametrize("router", ["competesmoe", "simsmoe", "smoe_dropout", "stablemoe", "xmoe"])
    def test_groups_and_a_scaling_factor_go_to_any_router(self, all_routers, router):
        argv = "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5"
        options = understood(all_routers, *argv.split(), "--router.name", router)[0].router.options
        assert (options.num_groups, options.group_topk, options.scaling_factor) == (4, 2, 2.5)

    @pytest.mark.parametrize("sigmoid", ["--moe-router-score-function", "--router.score-function"])
    def test_sigmoid_scores_have_no_softmax(self, all_routers, sigmoid):
        """Megatron-LM's own tests give both flags; moe_utils.py looks at one of them alone."""
        both = [sigmoid, "sigmoid", "--moe-router-pre-softmax"]
        for argv in (both, [*both[2:], *both[:2]]):
            options = understood(all_routers, *argv, "--router.name", "topk")[0].router.options
            assert (options.score_function, options.pre_softmax) == ("sigmoid", False)
        alone = understood(all_routers, "--moe-router-pre-softmax")[0]
        assert alone.router.options.pre_softmax is True

    def test_one_balancing_method_at_a_time(self, all_routers):
        argv = ["--moe-router-load-balancing-type", "seq_aux_loss", "aux_loss"]
        (problem,) = problems_of(all_routers, *DATA, *argv)
        assert "only one can be used" in problem.rule

    @pytest.mark.parametrize(("k", "renormalised"), [("2", True), ("1", False), (None, True)])
    def test_sigmoid_scores_are_those_of_megatron_core(self, all_routers, k, renormalised):
        """moe_utils.py divides sigmoid scores by their sum where k > 1, as by default."""
        argv = ["--moe-router-score-function", "sigmoid", *(["--moe-router-topk", k] if k else [])]
        options = understood(all_routers, *argv, "--router.name", "topk")[0].router.options
        assert (options.score_function, options.renormalise) == ("sigmoid", renormalised)

    @pytest.mark.parametrize(
        ("kind", "ours"),
        [("aux_loss", "micro_batch"), ("seq_aux_loss", "sequence"), ("global_aux_loss", "global_batch")],
    )
    def test_kinds_of_balancing(self, all_routers, kind, ours):
        config, _ = understood(all_routers, "--moe-router-load-balancing-type", kind)
        assert config.router.options.aux_loss == ours
        (problem,) = problems_of(all_routers, *DATA, "--moe-router-load-balancing-type", "sinkhorn")
        assert "is not supported as a balancing method" in problem.rule

    def test_a_file_may_use_the_names_as_well(self, all_routers, write):
        path = write(
            "data_path: a\nswiglu: true\nsave: here\nfp16: false\ntrain_samples: 100\nmoe-grouped-gemm: true"
        )
        notes: list[str] = []
        config = parse(["--config", path, "--global-batch-size", "8"], routers=all_routers, notes=notes)
        assert (config.logging.run_dir, config.train.train_iters) == ("here", 12)
        assert "train_samples in" in notes[0]
        (problem,) = problems_of(all_routers, "--config", write("data_path: a\nswiglu: false\n"))
        assert "cannot be switched off" in problem.rule

    def test_a_flag_wins_over_the_files_other_name(self, all_routers, write):
        path = write("data_path: a\nsave: here\n")
        config = parse(["--config", path, "--run-dir", "there"], routers=all_routers)
        assert config.logging.run_dir == "there"


class TestArithmetic:
    @pytest.mark.parametrize(
        ("argv", "name", "value"),
        [
            ("--train-samples 268554688", "train_iters", 1049041),  # 268554688 / 256, as floor
            ("--train-samples 585937500", "train_iters", 2288818),
            ("--train-samples 2560 --lr-decay-samples 255126953", "lr_decay_iters", 996590),
            ("--lr-warmup-samples 162761 --train-iters 1000000", "lr_warmup_iters", 636),
            ("--lr-warmup-fraction 0.01 --train-iters 1000", "lr_warmup_iters", 10),
            ("--lr-warmup-fraction 0.5 --train-iters 100 --lr-decay-iters 60", "lr_warmup_iters", 30),
            ("--lr-warmup-fraction 0.25 --train-samples 2560", "lr_warmup_iters", 2),
            ("--lr-wsd-decay-samples 512 --lr-decay-style WSD", "lr_wsd_decay_iters", 2),
            ("--recompute-activations", "recompute_granularity", "selective"),
        ],
    )
    def test_samples_and_shares(self, all_routers, argv, name, value):
        config, _ = understood(all_routers, *argv.split(), "--global-batch-size", "256", "--lr", "1")
        assert value_of(config, name) == value

    def test_the_global_batch_may_follow_from_the_ranks(self, all_routers):
        argv = ["--train-samples", "100", "--micro-batch-size", "2", "--tensor-model-parallel-size", "2"]
        assert understood(all_routers, *argv, world_size=8)[0].train.train_iters == 12  # 4 data ranks x 2
        (problem,) = problems_of(all_routers, *DATA, *argv)
        assert problem.rule == "needs --global-batch-size"

    @pytest.mark.parametrize(
        ("argv", "rule"),
        [
            ("--train-samples 10 --train-iters 3", "sets the same thing as --train-iters"),
            ("--train-samples many", "must be a number"),
            ("--train-samples 3", "at least one global batch"),
            ("--train-samples -3", "must be a finite number >= 0"),
            ("--lr-warmup-fraction 2", "at most 1"),
            ("--train-samples 1 2", "takes one value"),
            ("--load r --ckpt-step 1.5", "must be an integer"),
            ("--num-layers-per-virtual-pipeline-stage 1.5", "must be an integer"),
        ],
    )
    def test_what_cannot_be_worked_out(self, all_routers, argv, rule):
        (problem,) = problems_of(all_routers, *DATA, *argv.split(), "--global-batch-size", "8")
        assert rule in problem.rule

    def test_layers_of_a_chunk(self, all_routers):
        argv = "--engine megatron --num-layers 8 --num-layers-per-virtual-pipeline-stage 2"
        config, _ = understood(all_routers, *argv.split(), "--pipeline-model-parallel-size", "2")
        assert config.parallel.virtual_pipeline_model_parallel_size == 2
        config, _ = understood(all_routers, *argv.split())  # one stage has nothing to interleave
        assert config.parallel.virtual_pipeline_model_parallel_size is None
        argv += " --pipeline-model-parallel-size 3"
        assert (
            "must divide the number of layers in a pipeline stage (8 layers, 3 stages)"
            in problems_of(all_routers, *DATA, *argv.split())[0].rule
        )

    def test_data_in_files(self, all_routers, tmp_path):
        blend, parts = tmp_path / "blend.txt", tmp_path / "parts.json"
        blend.write_text("0.3 my/a\n0.7 my/b\n")
        parts.write_text('{"train": ["0.5", "a", "0.5", "b"], "valid": "c", "test": null}')
        config = parse(["--data-args-path", str(blend)], routers=all_routers)
        assert config.data.data_path == ("0.3", "my/a", "0.7", "my/b")
        data = parse(["--per-split-data-args-path", str(parts)], routers=all_routers).data
        assert (data.train_data_path, data.valid_data_path) == (("0.5", "a", "0.5", "b"), ("c",))
        assert data.test_data_path == ()
        for name, file in (("--data-args-path", "none"), ("--per-split-data-args-path", str(blend))):
            (problem,) = problems_of(all_routers, name, file)  # not also that there is no data
            assert problem.field == name

    @pytest.mark.parametrize(
        ("name", "text", "rule"),
        [
            ("--data-args-path", "\n", "names no data files"),
            ("--per-split-data-args-path", '{"train": 5}', "train must be a list"),
            ("--per-split-data-args-path", '{"train": "a", "validation": "b"}', "no other keys"),
            ("--per-split-data-args-path", "[" * 10_000, "is not JSON"),
        ],
    )
    def test_files_of_data_that_say_something_else(self, all_routers, tmp_path, name, text, rule):
        (tmp_path / "given").write_text(text)
        (problem,) = problems_of(all_routers, name, str(tmp_path / "given"))
        assert problem.field == name and rule in problem.rule

    @pytest.mark.parametrize(
        ("text", "argv", "name", "value"),
        [
            ("train_samples: 80", "--train-samples 160", "train_iters", 20),
            ("train_samples: 80", "--train-iters 3", "train_iters", 3),
            ("train_iters: 3", "--train-samples 160", "train_iters", 20),
            ("lr_warmup_samples: 80", "--lr-warmup-fraction 0.5", "lr_warmup_iters", 50),
            ("lr_warmup_fraction: 0.5", "--lr-warmup-samples 80", "lr_warmup_iters", 10),
        ],
    )
    def test_flags_override_the_file(self, all_routers, write, text, argv, name, value):
        file = ["--config", write(f"data_path: a\nglobal_batch_size: 8\n{text}\n")]
        assert value_of(parse([*file, *argv.split()], routers=all_routers), name) == value
        unclear = write("data_path: a\ntrain_samples: 80\n")  # the number of ranks is not known
        words = ["--config", unclear, "--train-iters", "7"]
        assert parse(words, routers=all_routers, world_size=None).train.train_iters == 7
        twice = write("data_path: a\nglobal_batch_size: 8\ntrain_samples: 80\ntrain_iters: 3\n")
        assert "sets the same thing" in problems_of(all_routers, "--config", twice)[0].rule

    @pytest.mark.parametrize(
        "flag",
        ["recompute-activations", "checkpoint-activations", "moe-layer-recompute", "group-query-attention"],
    )
    def test_a_switch_takes_no_value(self, all_routers, flag):
        assert understood(all_routers, f"--{flag}", "True") == understood(all_routers, f"--{flag}")
        assert problems_of(all_routers, *DATA, f"--{flag}", "false")[0].rule == "takes no value"


def test_a_bad_value_is_told_under_the_name_that_was_written(all_routers, write):
    file = write("save: ''\n")
    for argv, field in (
        (["--save", ""], "--save"),
        (["--save", "", "--config", file], "--save"),
        (["--config", file], f"save in {file}"),
        (["--moe-router-num-groups", "x"], "--moe-router-num-groups"),
    ):
        assert problems_of(all_routers, *DATA, *argv)[0].field == field


def test_the_checkpoint_of_one_step(all_routers, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config, _ = understood(all_routers, "--load", str(tmp_path), "--ckpt-step", "300")
    assert config.checkpoint.load == str(tmp_path / "checkpoints" / "step_0000300")
    (problem,) = problems_of(all_routers, *DATA, "--ckpt-step", "300")
    assert problem.rule == "needs --load"


@pytest.mark.parametrize("words", ["--deepspeed --deepspeed_config no.json", "--deepspeed no.json"])
def test_the_spelling_of_deepspeed(all_routers, words):
    (problem,) = problems_of(all_routers, *DATA, *words.split())
    assert (problem.field, problem.value) == ("--deepspeed-config", "no.json")
    assert understood(all_routers, "--deepspeed")[0] == understood(all_routers)[0]
    both = problems_of(all_routers, *DATA, *words.split(), "--deepspeed", "other.json")
    assert ("names another file" in both[0].rule) == ("deepspeed_config" in words)


def test_sequence_parallelism_without_tensor_parallelism_is_switched_off(all_routers):
    config, note = understood(all_routers, "--sequence-parallel")
    assert config.parallel.sequence_parallel is False
    assert "--sequence-parallel is off" in note


@pytest.mark.parametrize(
    ("argv", "on"),
    [
        ("--engine megatron --tensor-model-parallel-size 2", True),
        ("--engine deepspeed --tensor-model-parallel-size 2", False),
        ("--engine megatron", False),
    ],
)
def test_sequence_parallelism_follows_where_experts_need_it(all_routers, argv, on):
    """moe_layer.py of megatron-core refuses to train experts with tensor parallelism alone."""
    config, note = understood(all_routers, *argv.split())
    assert config.parallel.sequence_parallel is on
    assert ("--sequence-parallel is on" in note) is on


def test_sequence_parallelism_is_not_forced_on_those_who_refuse_it(all_routers):
    argv = "--engine megatron --tensor-model-parallel-size 2 --no-sequence-parallel"
    (problem,) = problems_of(all_routers, *DATA, *argv.split())
    assert (problem.field, problem.remedy) == ("--sequence-parallel", "add --sequence-parallel")


class TestOldNames:
    @pytest.mark.parametrize(
        ("argv", "name", "value"),
        [
            ("--checkpoint-activations", "recompute_granularity", "full"),
            ("--moe-layer-recompute", "recompute_modules", ("moe",)),
            ("--moe-layer-recompute --recompute-granularity full", "recompute_modules", ()),
            ("--persistent-save-interval 50", "save_interval", 50),
        ],
    )
    def test_what_they_are_now(self, all_routers, argv, name, value):
        assert value_of(understood(all_routers, *argv.split())[0], name) == value

    @pytest.mark.parametrize(
        ("argv", "accepted"),
        [
            ("--normalization rmsnorm", True),  # Megatron-DeepSpeed's spelling
            ("--exp-avg-dtype fp32 --use-precision-aware-optimizer", True),
            ("--exp-avg-dtype bf16 --use-precision-aware-optimizer", False),
            ("--moe-dispatch-fwd-dtype bf16", True),
            ("--moe-dispatch-fwd-dtype mxfp8", False),
            ("--loss-scale 12 --hysteresis 2 --bf16", True),
            ("--apply-layernorm-1p --apply-query-key-layer-scaling", True),
            ("--ckpt-convert-format torch_dist", False),  # Megatron-LM trains nothing then
            ("--te-precision-config-file a.yaml", False),
        ],
    )
    def test_only_values_that_change_a_number_are_refused(self, all_routers, argv, accepted):
        if accepted:
            understood(all_routers, *argv.split())
        else:
            (problem,) = problems_of(all_routers, *DATA, *argv.split())
            assert problem.field == argv.split()[0]

    def test_a_tokenizer_of_another_library_is_not_a_slip(self, all_routers):
        (problem,) = problems_of(all_routers, *DATA, "--tokenizer-type", "SFTTokenizer")
        assert "use HuggingFaceTokenizer" in problem.remedy


class TestWithoutEffectHere:
    """Flags that Megatron-LM's own scripts give although they have no effect there or here."""

    def test_scalings_of_positions_that_latent_attention_ignores(self, all_routers):
        """gpt_model.py gives --use-rope-scaling to rotary positions that latent attention does not use."""
        argv = ["--multi-latent-attention", "--use-rope-scaling", "--rope-scaling-factor", "32"]
        config, note = understood(all_routers, *argv)
        assert config.attention == understood(all_routers, argv[0])[0].attention
        assert "--use-rope-scaling is off" in note

    @pytest.mark.parametrize(
        "argv",
        [
            "--mscale-all-dim 1.0",  # times the logarithm of a scaling factor of 1
            "--no-load-optim",
            "--no-load-rng",
            "--recompute-granularity selective --recompute-modules moe_act",
            "--recompute-granularity selective --recompute-modules moe layernorm",
            "--recompute-granularity selective --recompute-modules mla_up_proj",
        ],
    )
    def test_a_warning_names_what_is_ignored(self, routers, argv):
        config, _ = understood(routers, *argv.split())
        (line,) = (line for line in warnings(config) if "is ignored" in line)
        assert argv.split()[-1] in line or line.startswith(argv.split()[0])

    def test_parts_that_are_not_recomputed_leave_the_others(self, all_routers):
        argv = "--recompute-granularity selective --recompute-modules mla_up_proj moe layernorm"
        assert recomputed_parts(understood(all_routers, *argv.split())[0]) == ("moe",)

    @pytest.mark.parametrize("split", ["'99,1,0'", '"99,1,0"', "99,1,0"])
    def test_quotes_that_a_shell_array_leaves(self, all_routers, split):
        assert split_shares(understood(all_routers, "--split", split)[0].data.split) == (0.99, 0.01, 0.0)


def test_what_only_makes_the_other_engine_faster_is_a_warning(routers):
    argv = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--transformer-impl", "local"]
    config, _ = understood(routers, *argv)
    found = [line.split()[0] for line in warnings(config) if "has no effect on the deepspeed engine" in line]
    assert sorted(found) == ["--overlap-grad-reduce", "--transformer-impl", "--use-distributed-optimizer"]
    config, _ = understood(routers, *argv, "--engine", "megatron")
    assert not [line for line in warnings(config) if "no effect" in line]
