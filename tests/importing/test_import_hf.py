"""Models of transformers as runs of this program: the same numbers on both engines, and the same bytes when
exported again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from importing.given import MODELS, edit_config, make_model
from program.launched import Zygote
from safetensors.torch import load_file, save_file

from megatron_hyperrouter.export.classes.rotary import rotary_settings
from megatron_hyperrouter.importing.fitting import fitting_folder
from megatron_hyperrouter.importing.upcycle import UpcycledWeights, UpcycleOptions
from megatron_hyperrouter.proof.bounds import faults

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("import_worker.py")
BOTH = ["deepspeed", "megatron"]
UP = ["--upcycle", "8"]


def case(folder: str, *flags: str, topks: list[int], engines: list[str] | None = None, back: str = "") -> Any:
    return {
        "folder": folder,
        "flags": list(flags),
        "topks": topks,
        "engines": engines or BOTH[:1],
        "back": back,
    }


EXACT: dict[str, Any] = {
    "qwen3_moe": case("qwen3_moe", topks=[1, 2, 4, 8], engines=BOTH, back="float32"),
    "packed experts": case("packed", topks=[2]),
    "not renormalised, bfloat16": case("bf16", topks=[1, 4], back="bfloat16"),
    "proved": case("deepseek_v3", "--proof-samples", "1", topks=[4]) | {"proof": True},
    "mixtral": case("mixtral", "--engine", "megatron", topks=[1, 2, 4, 8], engines=BOTH, back="float32"),
    "glm4_moe": case("glm4_moe", topks=[1, 2, 8], engines=BOTH, back="float32"),
    "qwen2_moe": case("qwen2_moe", topks=[1, 2, 8], engines=BOTH, back="float32"),
    "qwen3_moe, a dense layer": case("qwen3_moe, a dense layer", topks=[2], engines=BOTH, back="float32"),
    "glm4_moe, shared experts, groups": case(
        "glm4_moe, shared experts, groups", "--proof-topk", "4", topks=[4], engines=BOTH, back="float32"
    ),
    "deepseek_v2": case("deepseek_v2", topks=[1, 2, 8], engines=BOTH, back="float32"),
    "deepseek_v3": case("deepseek_v3", topks=[4], engines=BOTH, back="float32"),
    "deepseek_v3, hyper": case("deepseek_v3", "--router", "hyper", topks=[4], back="float32"),
    "layers that predict further tokens": case("predicting", "--proof-samples", "1", topks=[4])
    | {"proof": True},
    "spelling of transformers 4": case("old", topks=[2]),
    "hyper, anchored": case("qwen3_moe", "--router", "hyper", topks=[1, 2, 8], engines=BOTH, back="float32"),
    "8 copies of llama": case("llama", *UP, topks=[1, 2, 8]),
    "8 copies of mistral, hyper": case("mistral", *UP, "--router", "hyper", topks=[1, 2, 8], engines=BOTH),
    "halves of qwen3": case(
        "qwen3", *UP, "--granularity", "2", "--topk", "4", topks=[2, 4, 8], back="float32"
    ),
    "halves of qwen3, hyper": case("qwen3", *UP, "--granularity", "2", "--router", "hyper", topks=[2, 4, 8]),
    "eighths of qwen3": case("qwen3", *UP, "--granularity", "8", "--topk", "8", topks=[8]),
}
MOVED: dict[str, Any] = {
    "router drawn anew": case("qwen3_moe", "--router", "hyper", "--reset-router", topks=[2]),
    "noise": case("llama", *UP, "--noise", "0.01", topks=[2]),
    "half of the units drawn anew": case("llama", *UP, "--redraw", "0.5", topks=[2]),
    "weights of the softmax over all": case("llama", *UP, "--scale-pre-softmax", topks=[2]),
    "half a group": case("qwen3", *UP, "--granularity", "2", "--topk", "4", topks=[3]),
}
REFUSED: dict[str, Any] = {
    "attention_bias true is not supported, because it also adds a bias to the attention output": case(
        "biased", topks=[]
    ),
    "use_sliding_window true is not supported, because it affects only some layers": case("biased", topks=[]),
    "rope_type longrope": case("biased", topks=[]),
    "model.layers.1.mlp.experts.3.up_proj.weight: missing": case("holed", topks=[]),
    "extra.weight: unexpected tensor": case("holed", topks=[]),
    "3.linear_fc1.weight cannot be used: its shape is [47, 32], but config.json describes [48, 32]": case(
        "short", topks=[]
    ),
    "experts.3.linear_fc1.weight cannot be used: it contains NaN or infinity": case("nan", topks=[]),
    "experts.3.up_proj.weight has the data type I8, which is not supported": case("int8", topks=[]),
    "linear_qkv.weight cannot be used: the shapes of its parts do not match config.json": case(
        "heads", topks=[]
    ),
    "its shape is [7, 32], but config.json describes [8, 32]": case("gate", topks=[]),
    "linear_fc1.weight cannot be used: the shapes of its parts do not match config.json": case(
        "stack", topks=[]
    ),
    "vocab_size is 101, but model.embed_tokens.weight has 100 rows": case("rows", topks=[]),
    "cannot keep the model's own router": case("qwen3_moe", "--router", "xmoe", topks=[]),
    "--router = xmoe: gives the chosen experts weights that do not sum to 1": case(
        "llama", *UP, "--router", "xmoe", topks=[]
    ),
    "--scale-pre-softmax: works only with the routers topk": case(
        "llama", *UP, "--router", "competesmoe", "--scale-pre-softmax", topks=[]
    ),
    "--scale-pre-softmax: is only for dense models": case("qwen3_moe", "--scale-pre-softmax", topks=[]),
    "--upcycle: must be given for a dense model": case("llama", topks=[]),
    "--granularity = 5: must divide the MLP width, 48": case("llama", *UP, "--granularity", "5", topks=[]),
    "--topk = 3: must be a multiple of --granularity = 2": case(
        "llama", *UP, "--granularity", "2", "--topk", "3", topks=[]
    ),
    "--granularity = 0: must be at least 1": case("llama", *UP, "--granularity", "0", topks=[]),
    "--upcycle = 0: must be at least 1": case("llama", "--upcycle", "0", topks=[]),
    "--router = nonsense: must be one of": case("qwen3_moe", "--router", "nonsense", topks=[]),
    "--tokenizer-model = nowhere.json: must be an existing file": case(
        "qwen3_moe", "--tokenizer-model", "nowhere.json", topks=[]
    ),
    "--proof-topk = 9: must be from 1 to 8, the number of experts in a layer": case(
        "llama", *UP, "--proof-topk", "9", topks=[]
    )
    | {"proof": True},
    "--proof-topk = 2: must be 4: for any other k, DeepseekV3ForCausalLM chooses different experts": case(
        "deepseek_v3", "--proof-topk", "2", topks=[]
    ),
    "each q/k norm of this class spans all heads, which is not supported": case("olmoe", topks=[]),
}


def test_a_yarn_without_truncation_is_refused_as_such():
    with pytest.raises(ValueError, match=r"^rope_type yarn with truncate = false is not supported$"):
        rotary_settings({"rope_type": "yarn", "factor": 4.0, "truncate": False}, latent=False)


def write_spoilt(home: Path) -> None:
    """Models whose tensors have the right names, and are wrong in another way."""
    last = "model.layers.1.mlp.experts.3.up_proj.weight"
    gate = "model.layers.1.mlp.gate.weight"
    changes: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "short": (last, lambda up: up[:-1].clone()),
        "nan": (last, lambda up: up.index_fill(1, torch.tensor([5]), float("nan"))),
        "int8": (last, lambda up: up.to(torch.int8)),
        "gate": (gate, lambda matrix: matrix[:-1].clone()),
    }
    for name, (tensor, change) in changes.items():
        make_model("qwen3_moe", home / name)
        (file,) = (home / name).glob("*.safetensors")
        weights = load_file(file)
        save_file(weights | {tensor: change(weights[tensor])}, file, {"format": "pt"})
    make_model("qwen3_moe", home / "heads")
    edit_config(home / "heads", num_key_value_heads=4)
    make_model("qwen3_moe", home / "rows")
    edit_config(home / "rows", vocab_size=101)
    make_model("qwen3_moe", home / "stack", packed=True)
    (file,) = (home / "stack").glob("*.safetensors")
    short = {
        name: stack[:-1].clone() if "gate_up" in name else stack for name, stack in load_file(file).items()
    }
    save_file(short, file, {"format": "pt"})


def write_folders(home: Path) -> None:
    """The models of the table, and some that do not fit."""
    for name in MODELS:
        make_model(name, home / name)
    make_model("qwen3_moe", home / "packed", packed=True)
    make_model("qwen3_moe, not renormalised", home / "bf16", dtype="bfloat16")
    for name in ("old", "biased", "holed", "olmoe"):
        make_model("qwen3_moe", home / name)
    config = json.loads((home / "old" / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (home / "old" / "config.json").write_text(json.dumps(config))
    write_spoilt(home)
    longrope = {"rope_type": "longrope", "rope_theta": 50000.0, "factor": 4.0}
    edit_config(home / "biased", attention_bias=True, use_sliding_window=True, rope_parameters=longrope)
    make_model("deepseek_v3", home / "predicting")
    edit_config(home / "predicting", num_nextn_predict_layers=1)
    tensors = load_file(home / "predicting" / "model.safetensors")
    more = {f"model.layers.2.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm")}
    save_file(tensors | more, home / "predicting" / "model.safetensors", metadata={"format": "pt"})
    edit_config(home / "olmoe", architectures=["OlmoeForCausalLM"])
    tensors = load_file(home / "holed" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors | {"extra.weight": torch.zeros(2)}, home / "holed" / "model.safetensors")


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What came of each case."""
    home = tmp_path_factory.mktemp("import-hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        write_folders(home)
        task = {
            name: dict(one, folder=str(home / one["folder"]))
            for name, one in (EXACT | MOVED | REFUSED).items()
        }
        for one in task.values():
            one["rows"] = 100 if Path(one["folder"]).name in ("qwen3_moe", "packed", "old") else 96
        found = run_ranks(zygote, WORKER, task, ranks=1, folder=home / "runs")
        yield {name: one | {"given": task[name]["folder"]} for name, one in found.items()}


def compared(told: dict[str, Any], name: str, engine: str) -> Any:
    """The given model beside an engine's numbers."""
    from megatron_hyperrouter.huggingface.compare import answer

    one, asked = told[name], (EXACT | MOVED)[name]
    assert "home" in one, one
    return answer(
        {
            "folder": one["given"],
            "reference": str(Path(one["home"]) / engine),
            "topks": asked["topks"],
            "dtype": "float32",
            "dense": Path(one["given"]).name in ("llama", "mistral", "qwen3"),
            "left_out": ["model.layers.2."] if name == "layers that predict further tokens" else [],
        }
    )


@pytest.mark.parametrize("name", EXACT)
def test_the_run_computes_the_given_model(told: dict[str, Any], name: str) -> None:
    for engine in EXACT[name]["engines"]:
        found = compared(told, name, engine)
        assert faults(found, "float32") == [], engine
        assert all(result["logits_std"] > 0.3 and result["equal_argmax"] == 1 for result in found["results"])


def test_two_ranks_compute_the_given_models_too(told: dict[str, Any], zygote: Zygote, tmp_path: Path) -> None:
    """Expert parallelism on both engines; one process's logits are compared with transformers' above."""
    names = ["qwen3_moe", "mixtral", "glm4_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "hyper, anchored"]
    cases = [
        {
            "home": told[name]["home"],
            "engine": engine,
            "rows": 100 if Path(told[name]["given"]).name == "qwen3_moe" else 96,
            "topk": EXACT[name]["topks"][-1],
        }
        for name in names
        for engine in BOTH
    ]
    worker = Path(__file__).with_name("two_ranks_worker.py")
    found = run_ranks(zygote, worker, {"cases": cases}, ranks=2, folder=tmp_path)
    for case, (difference, std) in zip(cases, found, strict=True):
        assert std > 0.3 and difference <= 1e-5 * max(1.0, std), case


def test_the_command_proves_what_it_writes(told: dict[str, Any]) -> None:
    run = Path(told["proved"]["home"]) / "run"
    certificate = json.loads((run / "import_certificate.json").read_text())
    (result,) = certificate["proof"]["results"]
    assert certificate["proof"]["faults"] == [] and result["topk"] == 4
    assert 0 < result["max_difference"] < 1e-4 and result["equal_experts"] == [1.0]
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "import_certificate.json"}


@pytest.mark.parametrize("name", MOVED)
def test_what_moves_the_function_is_seen(told: dict[str, Any], name: str) -> None:
    assert faults(compared(told, name, "deepspeed"), "float32")


@pytest.mark.parametrize("granularity, topk", [(1, 2), (2, 4)])
def test_scaled_experts_of_equal_weights_sum_to_the_mlp(
    told: dict[str, Any], granularity: int, topk: int
) -> None:
    folder = fitting_folder(Path(told["noise"]["given"]))
    recipe = UpcycleOptions(experts=8, granularity=granularity, topk=topk, pre_softmax=True)
    weights, mlp = UpcycledWeights(folder, recipe), "model.layers.1.mlp."
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))

    def output(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T

    experts = [f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_" for expert in range(topk)]
    mixed = [
        output(*weights.read(f"{e}fc1.weight").chunk(2), weights.read(f"{e}fc2.weight")) for e in experts
    ]
    dense = output(*(folder.reader.read(f"{mlp}{leaf}_proj.weight") for leaf in ("gate", "up", "down")))
    torch.testing.assert_close(sum(mixed) / 8, dense, rtol=1e-5, atol=1e-5)


def test_an_upcycled_model_leaves_again(told: dict[str, Any]) -> None:
    """transformers computes the dense model from the exported mixture."""
    from megatron_hyperrouter.huggingface.compare import answer

    home = Path(told["halves of qwen3"]["home"])
    task = {"folder": str(home / "back"), "reference": str(home / "deepspeed"), "dtype": "float32"}
    assert faults(answer(task | {"topks": [2, 4, 8]}), "float32") == []


@pytest.mark.parametrize(
    "name", [name for name, one in EXACT.items() if one["back"] and "--upcycle" not in one["flags"]]
)
def test_out_again_gives_the_same_bytes(told: dict[str, Any], name: str) -> None:
    given = load_file(Path(told[name]["given"]) / "model.safetensors")
    back = load_file(Path(told[name]["home"]) / "back" / "model.safetensors")
    assert given.keys() - back.keys() <= {key for key, tensor in given.items() if not tensor.numel()}
    assert back.keys() <= given.keys()
    for key, tensor in back.items():
        if "hyper" in name and ".gate." in key:  # what is generated is rounded
            torch.testing.assert_close(tensor, given[key], rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, given[key]) and tensor.dtype == given[key].dtype, key


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused(told: dict[str, Any], reason: str) -> None:
    one = told[reason]
    assert reason in one["refused"] and one["status"] == (
        2 if reason.startswith("--") or "router" in reason else 4
    )
    assert one["left"] == []
