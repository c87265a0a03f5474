"""Multi-token prediction against a plain float64 model (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from engines.layout_table import COMMON, WORKER
from engines.layout_worker import micro_batches, tiny_config
from program.launched import Zygote
from reference_gpt import ReferenceGPT, train_reference
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.engines.base import RankPlace

AHEAD = 2


class PredictingGPT(ReferenceGPT):
    """Multi-token prediction as megatron-core has it: layer n combines what the one before it computed with
    the token n places on, and predicts the token after that.
    """

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        self.documents_BS, self.positions_BS = self._borders(tokens_BS)
        w, model = self.weights, self.config.model
        embedding, names = w["embedding.word_embeddings.weight"], [f"decoder.layers.{n}." for n in range(2)]
        x_BSD, aux, z = self._through(embedding[tokens_BS], names, topk)
        x_BSD = self._norm(x_BSD, "decoder.final_layernorm.weight")
        main = F.cross_entropy((x_BSD @ embedding.t()).flatten(0, 1), labels_BS.flatten(), reduction="sum")
        ahead = torch.zeros((), dtype=torch.float64)
        for number in range(AHEAD):
            prefix, left = f"mtp.layers.{number}.", tokens_BS.size(1) - number - 1
            shifted = F.pad(tokens_BS[:, number + 1 :], (0, number + 1))
            token_BSD = self._norm(embedding[shifted], prefix + "enorm.weight")
            both = [token_BSD, self._norm(x_BSD, prefix + "hnorm.weight")]
            x_BSD = torch.cat(both, -1) @ w[prefix + "eh_proj.weight"].t()
            x_BSD, more_aux, more_z = self._through(x_BSD, [f"decoder.layers.{2 + number}."], topk)
            x_BSD, aux, z = self._norm(x_BSD, prefix + "final_layernorm.weight"), aux + more_aux, z + more_z
            logits = x_BSD[:, :left] @ embedding.t()
            wanted = labels_BS[:, number + 1 :]
            ahead = ahead + F.cross_entropy(logits.flatten(0, 1), wanted.flatten()) / AHEAD
        # What trains beside the language-model loss is counted in units of the balance loss.
        return main, aux + 0.3 * ahead / model.moe_aux_loss_coeff, z

    def _through(self, x_BSD: Tensor, layers: list[str], topk: int) -> tuple[Tensor, Tensor, Tensor]:
        aux = z = torch.zeros((), dtype=torch.float64)
        for prefix in layers:
            inner_BSD = self._norm(x_BSD, prefix + "input_layernorm.weight")
            x_BSD = x_BSD + self._attention(inner_BSD, prefix + "self_attention.")
            inner_BSD = self._norm(x_BSD, prefix + "pre_mlp_layernorm.weight")
            routed_BSD, more_aux, more_z = self._moe(inner_BSD, int(prefix.split(".")[2]), topk)
            x_BSD, aux, z = x_BSD + routed_BSD, aux + more_aux, z + more_z
        return x_BSD, aux, z


def test_multi_token_prediction_is_the_plain_model(zygote: Zygote, tmp_path: Path) -> None:
    flags = (
        f"--router.name topk --engine megatron --mtp-num-layers {AHEAD} --mtp-loss-scaling-factor 0.3".split()
    )
    initial = {"flags": [*flags, *COMMON], "steps": 0, "folder": str(tmp_path / "initial")}
    cases = [initial, {"flags": [*flags, *COMMON], "steps": 3}]
    _, told = run_ranks(zygote, WORKER, {"cases": cases}, ranks=1, folder=tmp_path)
    config = tiny_config([*flags, *COMMON])
    saved = read_tensors(tmp_path / "initial", weight_names(tmp_path / "initial"))
    weights = {_as_decoder(name): each for name, each in saved.items()}
    model = PredictingGPT(config, weights, lambda w, layer: w[f"decoder.layers.{layer}.mlp.router.weight_ED"])
    here = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)
    steps = [(list(micro_batches(config, here, step)), topk) for step, topk in enumerate((1, 2, 4))]
    expected = train_reference(model, steps, config.optimizer.lr)
    found = [(step["lm_loss"], step["grad_norm"]) for step in told["steps"]]
    assert found == [pytest.approx(pair, rel=1e-5) for pair in expected]


def _as_decoder(name: str) -> str:
    """The added transformer layers as layers 2 and 3."""
    return re.sub(
        r"^mtp\.layers\.(\d)\.transformer_layer\.", lambda m: f"decoder.layers.{2 + int(m[1])}.", name
    )
