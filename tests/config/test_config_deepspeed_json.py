"""rules/deepspeed_json.py: what ``--deepspeed-config`` may hold."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_hyperrouter.config.check import problems
from megatron_hyperrouter.config.cli import parse, replace_leaves
from megatron_hyperrouter.config.reading.deepspeed_file import KNOWN, load_document
from megatron_hyperrouter.config.rules.deepspeed_json import REMOVED
from megatron_hyperrouter.config.tree import RunConfig

KEYS = re.compile(r'^    "(\w+)":', re.MULTILINE).findall


@pytest.fixture
def base(routers) -> RunConfig:
    return parse(["--data-path", "corpus"], routers=routers)


class TestDeepSpeedJson:
    def found(self, base, tmp_path, document, world_size=None, **settings):
        path = tmp_path / "ds.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return problems(replace_leaves(base, deepspeed_config=str(path), **settings), world_size=world_size)

    def test_what_the_flags_do_not_set_is_free(self, base, tmp_path):
        assert (
            self.found(
                base, tmp_path, {"steps_per_print": 10, "zero_optimization": {"reduce_bucket_size": 5}}
            )
            == []
        )

    def test_what_agrees_with_the_flags_passes(self, base, tmp_path):
        document = {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        }
        assert self.found(base, tmp_path, document, world_size=2, global_batch_size=16) == []

    @pytest.mark.parametrize(
        ("document", "field", "expected"),
        [
            ({"train_batch_size": 32}, "train_batch_size", "8"),
            ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "4"),
            ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "1"),
            ({"gradient_clipping": 0.5}, "gradient_clipping", "1.0"),
            ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "1"),
            ({"bf16": {"enabled": True}}, "bf16.enabled", "false"),
            ({"fp16": {"enabled": True}}, "fp16.enabled", "false"),
            ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps", "1"),
        ],
    )
    def test_contradictions(self, base, tmp_path, document, field, expected):
        (problem,) = self.found(base, tmp_path, document, world_size=2)
        assert problem.field.startswith(f"{field} in ")
        assert problem.rule == f"contradicts the flags, which set it to {expected}"

    @pytest.mark.parametrize("key", ["optimizer", "scheduler"])
    def test_sections_that_are_ours(self, base, tmp_path, key):
        (problem,) = self.found(base, tmp_path, {key: {"type": "Adam"}})
        assert problem.rule == "is controlled by flags"

    def test_contiguous_gradients(self, base, tmp_path):
        document = {"zero_optimization": {"contiguous_gradients": False}}
        assert self.found(base, tmp_path, document) == []
        (problem,) = self.found(base, tmp_path, document, expert_model_parallel_size=2)
        assert "wrong gradients" in problem.rule

    def test_gradients_are_added_up_in_float32(self, base, tmp_path):
        document = {"data_types": {"grad_accum_dtype": "bf16"}}
        assert self.found(base, tmp_path, document) == []
        (problem,) = self.found(base, tmp_path, document, bf16=True)
        assert problem.rule == 'contradicts the flags, which set it to "fp32"'

    @pytest.mark.parametrize("key", ["pipe_partitioned", "grad_partitioned"])
    def test_partitioned_activations(self, base, tmp_path, key):
        document = {"pipeline": {key: True}}
        assert self.found(base, tmp_path, document) == []
        (problem,) = self.found(base, tmp_path, document, pipeline_model_parallel_size=2)
        assert (
            problem.field.startswith(f"pipeline.{key} in ")
            and "cannot be combined with pipeline parallelism" in problem.rule
        )
        assert self.found(base, tmp_path, {"pipeline": {key: False}}, pipeline_model_parallel_size=2) == []

    @pytest.mark.parametrize(
        ("document", "key", "words"),
        [
            ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", "a second time"),
            (
                {"sequence_parallel_size": 2},
                "sequence_parallel_size",
                "is not supported by the deepspeed engine",
            ),
            (
                {"torch_autocast": {"enabled": True}},
                "torch_autocast.enabled",
                "would mix data types within an expert",
            ),
            (
                {"zero_optimization": {"reduce_scatter": False}},
                "zero_optimization.reduce_scatter",
                "must be true with mixture-of-experts layers",
            ),
            ({"eigenvalue": {"enabled": False}}, "eigenvalue", "no longer part of DeepSpeed"),
            ({"sparse_gradients": True}, "sparse_gradients", "no longer part of DeepSpeed"),
            ({"amp": {"enabled": True}}, "amp", "no longer part of DeepSpeed"),
        ],
    )
    def test_keys_that_cannot_run(self, base, tmp_path, document, key, words):
        (problem,) = self.found(base, tmp_path, document)
        assert problem.field.startswith(f"{key} in ") and words in problem.rule

    @pytest.mark.parametrize(
        ("document", "words"),
        [
            ({"bf16": True}, "must be a JSON object"),
            ({"zero_optimization": 2}, "must be a JSON object"),
            ({"fp16": None}, "must be a JSON object"),
            ({"bfloat16": {"enabled": True}}, "is ignored by DeepSpeed"),
        ],
    )
    def test_sections_that_deepspeed_would_stop_at_or_ignore(self, base, tmp_path, document, words):
        (problem,) = self.found(base, tmp_path, document)
        assert problem.field.startswith(f"{next(iter(document))} in ") and words in problem.rule

    def test_what_deepspeed_has_removed_is_known(self):
        """Read, not imported: this room's tests know no torch."""
        spec = find_spec("deepspeed")
        if spec is None or spec.origin is None:
            pytest.skip("no DeepSpeed here")
        text = (Path(spec.origin).parent / "runtime" / "config.py").read_text(encoding="utf-8")
        keys = [
            key
            for table in re.findall(r"_REMOVED_(?:TOP_LEVEL|ZERO)_CONFIG_KEYS = \{(.*?)\n\}", text, re.DOTALL)
            for key in KEYS(table)
        ]
        assert len(keys) > 10 and {key.rpartition(".")[2] for key in REMOVED} == set(keys)

    def test_the_same_keys_where_they_change_nothing(self, base, tmp_path):
        document = {
            "tensor_parallel": {"autotp_size": 1},
            "torch_autocast": {"enabled": False},
            "zero_optimization": {"reduce_scatter": True},
        }
        assert self.found(base, tmp_path, document | {"sequence_parallel_size": 1}) == []

    def test_a_document_that_is_no_json(self, base, tmp_path):
        (problem,) = self.found(base, tmp_path, '{\n "a": 1\n "b"}')
        assert "not JSON" in problem.rule and "line 3" in problem.rule
        (problem,) = self.found(base, tmp_path, "[1]")
        assert "JSON object" in problem.rule

    def test_auto_means_what_the_flags_say(self, base, tmp_path):
        document = {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
            "steps_per_print": 5,
        }
        assert self.found(base, tmp_path, document, world_size=2) == []
        kept = load_document(str(tmp_path / "ds.json"))
        assert kept == {"bf16": {}, "zero_optimization": {"stage": 1}, "steps_per_print": 5}
        document["optimizer"]["params"]["lr"] = 0.1
        (problem,) = self.found(base, tmp_path, document)
        assert problem.field.startswith("optimizer in ")

    @pytest.mark.parametrize(
        ("document", "field", "remedy"),
        [
            ({"gradient_cliping": 1.0}, "gradient_cliping", "did you mean gradient_clipping?"),
            (
                {"zero_optimization": {"overlap_com": 1}},
                "zero_optimization.overlap_com",
                "did you mean overlap_comm?",
            ),
            ({"my_own": 1}, "my_own", "remove this key"),
        ],
    )
    def test_keys_that_deepspeed_does_not_read(self, base, tmp_path, document, field, remedy):
        (problem,) = self.found(base, tmp_path, document)
        assert (problem.field.split()[0], problem.remedy) == (field, remedy)
        assert problem.rule == "is not a setting of DeepSpeed"

    @pytest.mark.parametrize("text", ['{"bf16": {}, "bf16": {}}', '{"bf16": {"a": 1, "a": 2}}'])
    def test_a_key_that_is_there_twice(self, base, tmp_path, text):
        (problem,) = self.found(base, tmp_path, text)
        assert "twice" in problem.rule

    @pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed, as in tests/pythons.sh")
    def test_the_keys_are_those_of_deepspeed(self):
        """Read from its files, not imported: this room's tests know no torch."""
        spec = find_spec("deepspeed")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        zero = (folder / "runtime" / "zero" / "config.py").read_text(encoding="utf-8")
        fields = set(re.findall(r"^    (\w+): [A-Z\w\[\], ]+ ?=", zero, re.MULTILINE))
        aliases = set(re.findall(r'alias="(\w+)"', zero))
        named = fields | aliases | {name.rpartition(".")[2] for name in REMOVED}
        assert KNOWN["zero_optimization"] - named == set()
        sources = [
            path.read_text(encoding="utf-8", errors="ignore")
            for path in folder.rglob("*.py")
            if path.name in ("constants.py", "config.py") or "config" in path.parent.name
        ]
        text = "\n".join(sources)
        assert [key for key in KNOWN[""] if not re.search(rf"[\"']{key}[\"']", text)] == []

    def test_several_contradictions_at_once(self, base, tmp_path):
        document = {"optimizer": {}, "gradient_clipping": 3, "bf16": {"enabled": True}}
        assert len(self.found(base, tmp_path, document)) == 3
