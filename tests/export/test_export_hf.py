"""Exported runs in transformers' own classes: the same logits, experts, losses and text, for every k."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from export.cases import CASES, REFUSED
from program.launched import Zygote
from program.settings import write_text
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hyperrouter.commands.models import export_hf as export_command
from megatron_hyperrouter.commands.models import generate as generate_command
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.evaluate.calibration import apply
from megatron_hyperrouter.export.classes.names import Heads, TensorPart, join
from megatron_hyperrouter.export.verify import differences
from megatron_hyperrouter.generation.attention import KeyValueCache
from megatron_hyperrouter.generation.decoder import Loaded
from megatron_hyperrouter.generation.load import load
from megatron_hyperrouter.generation.sampling import Style, generate
from megatron_hyperrouter.proof import child
from megatron_hyperrouter.proof.bounds import faults

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("hf_worker.py")
IDS = 257  # of the tokenizer; the embedding has more rows


@dataclass
class Made:
    """What the worker left."""

    folder: Path
    told: dict[str, dict[str, Any]]

    def home(self, case: str) -> Path:
        return self.folder / str(list(self.told).index(case))

    def task(self, case: str, **more: Any) -> dict[str, Any]:
        """What the other side is asked about a case."""
        home, told = self.home(case), self.told[case]
        return {
            "folder": str(home / "folder"),
            "reference": str(home / "reference"),
            "topks": told["topks"],
            "dtype": "float32",
            "custom_code": told["architecture"] == "HyperRouterForCausalLM",
            "prompt": told["prompt"],
            "prompt_topk": int(next(iter(told["greedy"]))),
            "new_tokens": 16,
            "vocab_size": IDS,
        } | more


@pytest.fixture(scope="module")
def made(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The runs of the table, exported."""
    folder = tmp_path_factory.mktemp("export-hf")
    text = write_text(folder / "text")
    task = {"text": str(text), "cases": [*CASES, *REFUSED]}
    return Made(folder, run_ranks(zygote, WORKER, task, ranks=1, folder=folder))


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The other side, in this process: its imports cost more than the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        from megatron_hyperrouter.huggingface.compare import answer

        yield answer


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(made: Made, answer: Any, case: str) -> None:
    told = made.told[case]
    assert told.get("architecture") == CASES[case].architecture, told
    found = answer(made.task(case))
    assert faults(found, "float32", greedy=told["greedy"]) == []
    for result in found["results"]:
        assert result["equal_argmax"] == 1.0 and min(result["equal_experts"]) == 1.0
        assert result["loss_hf"] == pytest.approx(result["loss"], abs=2e-6)
        assert result["logits_std"] > 0.3  # a model that says something


@pytest.mark.by_hand
@pytest.mark.skipif("MHR_OTHER_PYTHON" not in os.environ, reason="MHR_OTHER_PYTHON names no Python")
@pytest.mark.parametrize("case", [name for name, each in CASES.items() if "--custom-code" not in each.flags])
def test_another_transformers_computes_the_same(made: Made, case: str) -> None:
    """In the environment of the Python that ``MHR_OTHER_PYTHON`` names: ``pytest -m by_hand``."""
    told = made.told[case]
    found = child.ask(made.task(case), python=os.environ["MHR_OTHER_PYTHON"])
    differs, version = faults(found, "float32", greedy=told["greedy"]), found["versions"]["transformers"]
    worst = [f"{result['max_difference_all']:.1e}" for result in found["results"]]
    print(f"{case}, transformers {version}: {', '.join(worst)}")
    warned = (
        "Transformers 4 gives wrong results for this model"
        in (made.home(case) / "folder/README.md").read_text()
    )
    assert bool(differs) == (warned and version.startswith("4.")), differs


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_class_computes_is_refused(made: Made, reason: str) -> None:
    told = made.told[reason]
    assert reason in told["refused"] and told["status"] == 4
    assert told["left"] == ["run"]


def test_the_command_proves_what_it_writes(made: Made) -> None:
    home, told = made.folder / "0", made.told["proved"]
    folder = home / "proved"
    certificate = json.loads((folder / "certificate.json").read_text())
    assert differences(folder, certificate) == []
    assert [row["topk"] for row in certificate["proof"]["results"]] == [2, 3]
    assert certificate["proof"]["tokens"] == 48 and certificate["proof"]["faults"] == []
    assert certificate["model"]["dtype"] == "bfloat16" and certificate["source"]["step"] == 5
    libraries = {"torch", "transformers", "safetensors", "tokenizers", "python"}
    assert all(certificate["versions"][name] for name in (*libraries, "machine", "processor"))
    assert json.loads((folder / "config.json").read_text())["num_experts_per_tok"] == 3
    assert {file.dtype for file in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "| 3 | " in card and "k changed from 2 to 4" in card
    assert "match the certificate" in told["stdout"]


def test_numbers_are_compared_with_the_certificate(
    made: Made, answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--verify --numbers``, with the other side in this process."""
    monkeypatch.setattr(child, "ask", lambda task, python=None: answer(task))
    folder = shutil.copytree(made.folder / "0" / "proved", tmp_path / "folder")
    export_command.main(["--verify", str(folder), "--numbers"])
    path = folder / "certificate.json"
    certificate = json.loads(path.read_text())
    for row in certificate["proof"]["results"]:
        row["perplexity"] *= 1.02
    path.write_text(json.dumps(certificate))
    with pytest.raises(
        CheckpointError, match=r"k = 2: the perplexity is .*, but the certified perplexity is"
    ) as error:
        export_command.main(["--verify", str(folder), "--numbers"])
    assert error.value.exit_status == 4
    export_command.main(["--verify", str(folder)])


def test_a_proof_out_of_bounds_leaves_a_failed_folder(made: Made) -> None:
    home, told = made.folder / "0", made.told["proved"]
    assert (
        told["failed"]["status"] == 4
        and "k = 2: the perplexity with transformers is" in told["failed"]["message"]
    )
    assert not (home / "bad").exists() and (home / "bad.failed" / "certificate.json").is_file()
    assert told["missing"]["status"] == 5
    assert "/nowhere/python cannot be started" in told["missing"]["message"]
    assert {path.name for path in home.iterdir()} == {"run", "folder", "reference", "proved", "bad.failed"}


def test_the_tokenizer_goes_with_the_model(made: Made) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made.folder / "0" / "folder")
    text = "def f(x):\n\treturn 'naïve café ☕' + x\r\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == 256 and tokenizer.bos_token_id is None


# ---------------------------------------------------------------------------- the decoder of mhr generate
@pytest.mark.parametrize("case", CASES)
def test_the_decoder_computes_what_the_engine_does(made: Made, case: str) -> None:
    home, told = made.home(case), made.told[case]
    loaded = load(home / "run")
    rows_BS = load_file(home / "reference" / "tokens.safetensors")["tokens_BS"]
    ((greedy_k, ids),) = told["greedy"].items()
    with apply(loaded.decoder.routers if told["scales"] else [], dict(told["scales"] or [])):
        for k in told["topks"][:2] + told["topks"][3:]:
            expected = load_file(home / "reference" / f"k-{k}.safetensors")["logits_BSV"]
            cache = KeyValueCache(torch.zeros(len(rows_BS), 0, dtype=torch.bool))
            parts = [loaded.decoder.logits(part, cache, topk=k) for part in rows_BS.split((30, 1, 17), 1)]
            bound = 1e-5 * max(1.0, float(expected.std()))
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=bound)
        assert write(loaded, [told["prompt"]], topk=int(greedy_k)) == [ids]
    if told["architecture"] != "HyperRouterForCausalLM":  # the folder gives the same text
        assert write(load(home / "folder"), [told["prompt"]], topk=int(greedy_k)) == [ids]


def test_a_calibrated_folder_says_so(made: Made) -> None:
    case = "hyper, calibrated for k = 1, a shared expert"
    folder, scales = made.home(case) / "folder", dict(made.told[case]["scales"])
    certificate = json.loads((folder / "certificate.json").read_text())
    assert list(scales) == [2] and 0.0 < scales[2] < 1.0  # the first layer is dense
    assert certificate["model"]["scales"] == list(scales.values()) and certificate["model"]["topk"] == 1
    assert "rescaled for k = 1" in (folder / "README.md").read_text()
    assert json.loads((made.home("hyper") / "folder/certificate.json").read_text())["model"]["scales"] is None


def write(loaded: Loaded, prompts: list[list[int]], *, topk: int, **style: Any) -> list[list[int]]:
    chosen = Style(max_new_tokens=16, **style)
    return generate(loaded.decoder, prompts, chosen, topk=topk, vocab_size=IDS, eod=None)


def test_a_text_does_not_depend_on_those_beside_it(made: Made) -> None:
    loaded, prompt = load(made.home("hyper") / "run"), made.told["hyper"]["prompt"]
    prompts = [prompt, prompt[:3], prompt[5:]]
    for style in ({}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}):
        alone = [write(loaded, [each], topk=2, **style)[0] for each in prompts]
        assert write(loaded, prompts, topk=2, **style) == alone
    assert write(loaded, prompts, topk=2, temperature=0.7, seed=5) != alone


def test_the_command_prints_every_k(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(made.home("hyper") / "run")
    words = ["--load", run, "--prompt", "def f", "import", "--topk", "1", "8", "--max-new-tokens", "4"]
    generate_command.main([*words, "--json"])
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [(row["topk"], row["prompt"]) for row in rows] == [
        (k, p) for k in (1, 8) for p in ("def f", "import")
    ]
    assert all(len(row["tokens"]) <= 4 for row in rows)
    generate_command.main(words)
    assert capsys.readouterr().out.count("k = 8: ") == 2


def test_a_long_text_is_noted_once(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the number of k, with scales or without."""
    scales = {1: {1: 2.0, 2: 2.0}, 8: {1: 1.0, 2: 1.0}}
    monkeypatch.setattr(generate_command, "scales_at", lambda *_: scales)
    words = ["--load", str(made.home("hyper") / "run"), "--prompt", "def f", "--topk", "1", "8"]
    generate_command.main([*words, "--max-new-tokens", "50", "--calibrate-k", "--json"])
    told = capsys.readouterr()
    assert (told.err + told.out).count("note: texts of 55 tokens are longer than the training samples") == 1
    content = json.loads(told.out)
    plain, calibrated = (
        {row["topk"]: row["tokens"] for row in content[key]} for key in ("results", "calibrated")
    )
    assert calibrated[8] == plain[8] and calibrated[1] != plain[1]


# ---------------------------------------------------------------------------- the proof's own worth
Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]  # changes config.json and the tensors


def exchange(first: str, second: str) -> Edit:
    """Swap all tensors whose names differ in these words alone."""

    def edit(_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if first in name]:
            other = name.replace(first, second)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return edit


def settings(**values: Any) -> Edit:
    """Other values in ``config.json``."""
    return lambda config, _tensors: config.update(values)


def changed(word: str, function: Callable[[Tensor], Tensor]) -> Edit:
    """A function of the tensors whose name has this word."""

    def edit(_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if word in name]:
            tensors[name] = function(tensors[name])

    return edit


def together(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for each in edits:
            each(config, tensors)

    return edit


def interleaved(weight: Tensor) -> Tensor:
    """Rows of a query or key matrix in the order of RoPE's other convention."""
    channels = 8
    return weight.view(-1, 2, channels // 2, weight.size(-1)).transpose(1, 2).reshape(weight.shape)


def without_groups(_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The joined matrix cut in three, as if it were not laid out by groups."""
    heads = Heads(4, 2, 8)
    for layer in range(2):
        names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        parts = dict(
            zip(
                (TensorPart.QUERY, TensorPart.KEY, TensorPart.VALUE),
                (tensors[name] for name in names),
                strict=True,
            )
        )
        cut_anew = join(parts, heads).split((32, 16, 16))
        tensors.update(zip(names, cut_anew, strict=True))


def tensor_left_out(_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.q_norm.weight"]


def expert_left_out(_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]


FAULTS: dict[str, Edit] = {
    "norm_topk_prob left at its default": settings(norm_topk_prob=False),
    "rms_norm_eps left at its default": settings(rms_norm_eps=1e-6),
    "another theta": settings(rope_theta=1e6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "q and k norms swapped": exchange("q_norm", "k_norm"),
    "input and post-attention norms swapped": exchange("input_layernorm", "post_attention_layernorm"),
    "gate and up swapped": exchange("gate_proj", "up_proj"),
    "router rounded to bfloat16": changed(".mlp.gate.", lambda weight: weight.bfloat16().float()),
    "router rows rolled by one expert": changed("layers.0.mlp.gate.", lambda weight: weight.roll(1, 0)),
    "q and k rows in interleaved RoPE order": together(
        changed(".q_proj.", interleaved), changed(".k_proj.", interleaved)
    ),
    "qkv cut without regard to groups": without_groups,
    "a tensor left out": tensor_left_out,
    "an expert left out": expert_left_out,
    "a tensor too many": lambda _config, tensors: tensors.update(extra=torch.zeros(2)),
    "numbers that are not finite": changed("norm.weight", lambda weight: weight.fill_(torch.nan)),
}


LATENT_FAULTS: dict[str, Edit] = {
    "factor on the weights left out": settings(routed_scaling_factor=1.0),
    "groups left out": settings(n_group=1, topk_group=1),
    "channels that turn not neighbours": settings(rope_interleave=False),
    "choice bias too large": changed("e_score_correction_bias", lambda bias: 20 * bias),
    "shared gate and up swapped": exchange("shared_experts.gate_proj", "shared_experts.up_proj"),
    "query channels in another order": changed("q_b_proj", lambda weight: weight.roll(8, 0)),
    "norm of the latent vector left at 1": changed("kv_a_layernorm", torch.ones_like),
}


@pytest.mark.parametrize("fault", [*FAULTS, *LATENT_FAULTS])
def test_the_proof_fails_for_a_wrong_export(made: Made, answer: Any, fault: str, tmp_path: Path) -> None:
    case = "hyper" if fault in FAULTS else "deepseek-v3, groups"
    source = made.home(case) / "folder"
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    (FAULTS | LATENT_FAULTS)[fault](config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = answer(made.task(case, folder=str(tmp_path), topks=[4]))
    assert faults(found, "float32", greedy=made.told[case]["greedy"])


def test_bfloat16_is_bound_by_experts_and_perplexity() -> None:
    result = {
        "topk": 2,
        "finite": True,
        "equal_experts": [0.99, 0.98],
        "perplexity": 40.0,
        "perplexity_hf": 40.1,
    }
    told = {"problems": [], "generated": {}}
    assert faults({**told, "results": [result]}, "bfloat16") == []
    for worse in ({"equal_experts": [0.99, 0.96]}, {"perplexity_hf": 40.3}, {"finite": False}):
        assert faults({**told, "results": [result | worse]}, "bfloat16")
