"""What routers and experts of a trained run do on evaluation data: the numbers of ``mhr analyze``.

Legend: ``N`` tokens of a sample, ``D`` hidden size, ``E`` experts, ``K`` active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_hyperrouter.analysis import jacobian, routes
from megatron_hyperrouter.analysis.experts import comparable_tokens, similarity_matrix
from megatron_hyperrouter.analysis.trained_experts import read_experts
from megatron_hyperrouter.analysis.watching import Sample, Witness, watching
from megatron_hyperrouter.checkpoint.folder import folder_name, read_manifest
from megatron_hyperrouter.checkpoint.manifest import sealed_steps
from megatron_hyperrouter.checkpoint.weights import read_tensors
from megatron_hyperrouter.data.stream.dataset import Dataset
from megatron_hyperrouter.engines.base import Engine
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.model.names import router_prefix
from megatron_hyperrouter.routers.base import Router
from megatron_hyperrouter.train.metrics import score

if TYPE_CHECKING:
    from megatron_hyperrouter.evaluate.trained import TrainedRun

PROBE_TOKENS = 2048  # tokens whose routes are followed over the checkpoints
JACOBIAN_TOKENS = 64
_MEASURES = (
    "entropy",
    "logit_std",
    "mutual_information",
    "load_max_over_mean",
    "effective_experts",
    "dead_experts",
)


@dataclass(frozen=True)
class Analysis:
    """An open run and the data on which it is analyzed."""

    run: TrainedRun
    engine: Engine
    dataset: Dataset
    samples: int  # of the dataset
    vocab_size: int  # of the tokenizer

    @property
    def routers(self) -> list[Router]:
        """The router of each MoE layer, in order."""
        found: list[Router] = sorted(self.engine.routers.values(), key=lambda router: router.layer_number)
        return found

    @property
    def trained_k(self) -> int:
        """The k that training ends on."""
        return self.run.settings.model.moe_router_topk

    def at(self, topk: int) -> list[dict[str, Any]]:
        """The measures of each layer with ``topk`` active experts; the engine has the run's weights."""
        config = self.run.settings.model
        wanted = comparable_tokens(config.num_experts, config.hidden_size)
        seen = self._watch(topk, self.samples, every=self._every(self.samples, wanted))
        measures, loads = seen.measures(), seen.loads()
        starts = self._start_matrices()
        found = []
        for layer, sample in sorted(seen.samples.items()):
            experts = read_experts(self.run.checkpoint, self.run.settings, layer)
            matrix_EE = similarity_matrix(experts.outputs_ETD(sample.x_ND))
            row: dict[str, Any] = {"layer": layer}
            row |= {name: measures[layer][name] for name in _MEASURES}
            row |= {"load": loads[layer], "similarity": matrix_EE.tolist(), **_pairs(matrix_EE)}
            found.append(row | {"jacobian": jacobian_of(sample, experts, starts.get(layer))})
        return found

    def over_checkpoints(self, note: Callable[[str], None]) -> dict[str, Any]:
        """How the routes of a fixed probe set, with the k that training ends on, settle over the run's
        checkpoints.  The engine ends with the weights that it had.
        """
        folders = checkpoints_until(self.run)
        routes_of: list[dict[int, Tensor]] = []
        probes = max(min(-(-PROBE_TOKENS // self.run.settings.model.seq_length), self.samples), 1)
        for folder in folders:
            note(f"comparing checkpoints: reading the routing at step {read_manifest(folder)['step']}")
            self.engine.load(folder, weights_only=True)
            seen = self._watch(self.trained_k, probes, every=1)
            routes_of.append({layer: sample.experts_NK for layer, sample in seen.samples.items()})
        steps = [int(read_manifest(folder)["step"]) for folder in folders]
        layers = [
            {"layer": layer, **_settling([found[layer] for found in routes_of], self.routers[0].num_experts)}
            for layer in sorted(routes_of[-1])
        ]
        tokens = next(iter(routes_of[-1].values())).size(0)
        return {"topk": self.trained_k, "tokens": tokens, "steps": steps, "layers": layers}

    def _watch(self, topk: int, samples: int, *, every: int) -> Witness:
        """What the routers did in an evaluation of the first ``samples`` samples."""
        seen = Witness(self.routers, every=every)
        with watching(self.routers, seen.see):
            score(
                self.engine,
                self.dataset,
                topk=topk,
                micro_batch_size=whole_micro_batch(samples, self.run.settings.train.micro_batch_size),
                num_samples=samples,
            )
        return seen

    def _every(self, samples: int, wanted: int) -> int:
        """The stride n: every n-th token of ``samples`` samples makes ``wanted`` tokens."""
        return max(samples * self.run.settings.model.seq_length // wanted, 1)

    def _start_matrices(self) -> dict[int, Tensor]:
        """The routers' matrices before the first step, by layer: drawn again, or those of the oldest
        checkpoint where the run began with other weights.
        """
        folders = checkpoints_until(self.run)
        imported = int(read_manifest(folders[0])["step"]) == 0
        began_elsewhere = imported or "finetuned_from" in self.run.manifest["meta"]
        found = {}
        for layer in (router.layer_number for router in self.routers):
            router = make_router(self.run.settings, layer, vocab_size=self.vocab_size)
            if began_elsewhere:
                prefix = router_prefix(layer, self.run.settings.model.num_layers)
                names = {prefix + name: name for name in router.state_dict()}
                held = read_tensors(folders[0], names)
                router.load_state_dict({names[name]: tensor for name, tensor in held.items()})
            if (matrix_ED := matrix_of(router)) is not None:
                found[layer] = matrix_ED
        return found


def jacobian_of(
    sample: Sample, experts: jacobian.Experts, start_ED: Tensor | None
) -> dict[str, float | int | None]:
    """The measures of the router's part of the Jacobian; None if the router is not a linear map."""
    few, router = sample.first(JACOBIAN_TOKENS), sample.router
    was_training = router.training
    router.eval()
    try:
        tokens = few.tokens[0] if few.tokens else None
        slopes = jacobian.weight_slopes(
            lambda x_ND: router(x_ND, step=few.step, topk=few.k, tokens=tokens).weights_TK, few.x_ND
        )
    finally:
        router.train(was_training)
    part = jacobian.measure(experts, few.x_ND, few.weights_NK.float(), few.experts_NK, slopes)
    matrix_ED, size = matrix_of(router), few.x_ND.size(1)
    linear: dict[str, float | None] = dict.fromkeys(("drift", "inputs_in_span", "inputs_by_chance"))
    if matrix_ED is not None:
        linear = {
            "drift": None if start_ED is None else jacobian.drift(matrix_ED, start_ED),
            "inputs_in_span": jacobian.inside_span(matrix_ED, sample.x_ND),
            "inputs_by_chance": jacobian.span(matrix_ED).size(1) / size,
        }
    return {**part._asdict(), **linear, "tokens": few.x_ND.size(0)}


def matrix_of(router: Router) -> Tensor | None:
    """The router's matrix, ``_ED``; None if it is not a linear map."""
    try:
        with torch.no_grad():
            return router.linear()[0].detach().cpu().clone()
    except NotImplementedError:
        return None


def checkpoints_until(run: TrainedRun) -> list[Path]:
    """The checkpoints of the run, from the oldest to the one that was opened."""
    root = run.checkpoint.parent
    steps = [step for step in sealed_steps(root) if step < run.step]
    return [*(root / folder_name(step) for step in sorted(steps)), run.checkpoint]


def whole_micro_batch(samples: int, size: int) -> int:
    """The largest micro-batch up to ``size`` that divides ``samples``: no sample is read twice."""
    return next(number for number in range(min(size, samples), 0, -1) if samples % number == 0)


def _settling(routes_SNK: Sequence[Tensor], num_experts: int) -> dict[str, Any]:
    last_NK = routes_SNK[-1]
    kept, moved = routes.chance(last_NK, num_experts)
    pairs = pairwise(routes_SNK)
    return {
        "saturation": [routes.saturation(each_NK, last_NK) for each_NK in routes_SNK],
        "saturation_by_chance": kept,
        "fluctuation": [routes.fluctuation(each_NK, later_NK) for each_NK, later_NK in pairs],
        "fluctuation_by_chance": moved,
    }


def _pairs(matrix_EE: Tensor) -> Mapping[str, float | None]:
    """Mean and largest similarity of two different experts; None for a single one."""
    size = matrix_EE.size(0)
    if size < 2:
        return {"mean_similarity": None, "largest_similarity": None}
    off = matrix_EE[~torch.eye(size, dtype=torch.bool)]
    return {"mean_similarity": float(off.mean()), "largest_similarity": float(off.max())}
