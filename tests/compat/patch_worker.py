"""One rank of the tests of the host patches: without one patch, the host's own call must fail; with it, the
call must work.

Called with a folder and the name of a patch; writes ``RANK.json``: the error without the patch, and with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hyperrouter.compat import deepspeed as for_deepspeed
from megatron_hyperrouter.compat import megatron as for_megatron

MEGATRON = {
    patch.__name__: patch
    for patch in (
        for_megatron.name_te_general_gemm,
        for_megatron.count_predictions_of_logits,
        for_megatron.keep_adam_step,
        for_megatron.keep_norms_on_device,
        for_megatron.scale_all_at_once,
        for_megatron.turn_in_few_operators,
        for_megatron.serve_cuda_calls,
        for_megatron.serve_cuda_devices,
        for_megatron.serve_random_state,
        for_megatron.serve_splits,
        for_megatron.serve_unequal_shards,
        for_megatron.run_helpers_eagerly,
    )
}
DEEPSPEED = {
    patch.__name__: patch for patch in (for_deepspeed.skip_shm_build, for_deepspeed.shape_gathered_tokens)
}
PATCHES: dict[str, Callable[[], None]] = MEGATRON | DEEPSPEED


def name_te_general_gemm() -> None:
    """The stock router with moe_router_dtype."""
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    out = router_gating_linear(torch.ones(3, 4), torch.ones(2, 4), None, torch.float32)
    assert out.tolist() == [[4.0, 4.0]] * 3


def count_predictions_of_logits() -> None:
    """Multi-token prediction with an output that is no tensor; 0.16.1 does not look at it."""
    from megatron.core.transformer import multi_token_prediction

    count = getattr(multi_token_prediction, "_compute_mtp_acceptance_counts", None)
    if count is None:
        return
    labels_BS, mask_BS = torch.tensor([[1, 0]]), torch.tensor([[1, 1]])
    logits_SBV = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    layer = types.SimpleNamespace(gather_output=False)
    for logits, expected in ((logits_SBV, (1, 2)), ((logits_SBV, logits_SBV), (0, 0))):
        assert count(logits, labels_BS, mask_BS, layer, None) == expected


def keep_adam_step() -> None:
    """Loading the state of the distributed optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    module = DistributedDataParallel(config, ddp, torch.nn.Linear(4, 3))
    whole = get_megatron_optimizer(
        OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [module], use_gloo_process_groups=False
    )
    (optimizer,) = whole.chained_optimizers
    module.module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for parameter in module.parameters():
        group, order = optimizer.model_param_group_index_map[parameter]
        size = optimizer.optimizer.param_groups[group]["params"][order].shape
        saved = {
            "param": torch.full(size, 2.0),
            "exp_avg": torch.full(size, 3.0),
            "exp_avg_sq": torch.full(size, 4.0),
        }
        with torch.no_grad():
            optimizer._set_main_param_and_optimizer_states(parameter, saved)
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        assert (state["exp_avg"] == 3).all() and (state["exp_avg_sq"] == 4).all()


def keep_norms_on_device() -> None:
    """The norm of gradients that hold no numbers to be read, and its value where they do."""
    from megatron.core.optimizer import clip_grads

    sizes = [17 * (number % 5 + 1) for number in range(20)]
    empty = [torch.empty(size, device="meta") for size in sizes]
    (norm, _) = clip_grads.l2_norm_impl(2**16, None, [empty], False)
    assert norm.shape == (1,) and norm.device.type == "meta"
    gradients = [torch.randn(size) for size in sizes]
    (norm, _) = clip_grads.l2_norm_impl(2**16, None, [gradients], False)
    torch.testing.assert_close(norm.double(), torch.cat(gradients).double().norm().view(1), rtol=1e-6, atol=0)


class Operators(TorchDispatchMode):
    """Counts what is not a view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name not in VIEWS
        return func(*args, **(kwargs or {}))


VIEWS = {f"aten::{name}" for name in ("slice", "split", "alias", "detach", "view", "unsqueeze", "expand")}


def scale_all_at_once() -> None:
    """Gradients of many parameters are clipped by one operator."""
    from megatron.core.optimizer import clip_grads

    gradients = [torch.full((3,), float(number)) for number in range(20)]
    with Operators() as seen:
        clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, None, [gradients, gradients], 0.5)
    assert [gradient[0].item() for gradient in gradients] == [number / 2 for number in range(20)]
    assert seen.count == 1, f"{seen.count} operators"


def turn_in_few_operators() -> None:
    """Rotary positions forward and back; the values and the gradient are those of the complex product."""
    from megatron.core.models.common.embeddings import rope_utils

    angles_SR = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1, 0.01]))
    angles_S11C = torch.cat([angles_SR, angles_SR], -1).view(5, 1, 1, 6)
    x, back = (torch.randn(5, 2, 3, 6, requires_grad=True) for _ in range(2))
    rope_utils._apply_rotary_pos_emb_bshd(x, angles_S11C)  # later layers and steps have the table
    with Operators() as seen:
        turned = rope_utils._apply_rotary_pos_emb_bshd(x, angles_S11C)
        (gradient,) = torch.autograd.grad(turned, x, back)

    def product(numbers: torch.Tensor, sign: float) -> torch.Tensor:
        pairs = torch.complex(*numbers.detach().double().chunk(2, -1))
        result = pairs * torch.polar(torch.ones(()).double(), sign * angles_SR.double()).view(5, 1, 1, 3)
        return torch.cat([result.real, result.imag], -1).float()

    torch.testing.assert_close(turned, product(x, 1.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, product(back, -1.0), rtol=1e-6, atol=1e-6)
    assert seen.count <= 6, f"{seen.count} operators"


def serve_cuda_calls() -> None:
    """Rotary positions, made where the GPU would be."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding(kv_channels=4, rotary_percent=1.0)


def serve_cuda_devices() -> None:
    """Gradient clipping."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 2.0)
    norm = get_grad_norm_fp32([weight.grad], grad_stats_parallel_group=dist.group.WORLD)
    clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=norm)
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5))


def serve_random_state() -> None:
    """Dropout inside the tracker has a stream of its own, which a second seeding repeats."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    drawn = []
    for outside in (1, 2):
        model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(3).tolist())
        assert torch.equal(torch.get_rng_state(), before), "the default stream went on"
    assert drawn[0] == drawn[1], "the stream is not that of its seed"


def serve_splits() -> None:
    """The exchange of tokens between two ranks, with split sizes as the dispatcher hands them over."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(
        torch.tensor([1, 2] if dist.get_rank() == 0 else [2, 4]), as_numpy=True
    )
    sent = token_dispatcher.maybe_move_tensor_to_cpu(
        torch.tensor([1, 2] if dist.get_rank() == 0 else [2, 4]), as_numpy=True
    )
    out = tensor_parallel.all_to_all(dist.group.WORLD, torch.ones(int(sum(sent)), 2), sizes, sent)
    assert out.sum() == 2 * sum(sizes)


def serve_unequal_shards() -> None:
    """Tokens of two ranks with different counts."""
    from megatron.core.tensor_parallel import mappings

    rank, sizes = dist.get_rank(), [1, 3]
    whole = mappings._gather_along_first_dim(
        torch.full((sizes[rank], 2), 1.0 + rank), dist.group.WORLD, sizes
    )
    assert whole[:, 0].tolist() == [1.0, 2.0, 2.0, 2.0]
    own = mappings._reduce_scatter_along_first_dim(whole, dist.group.WORLD, sizes)
    assert own.tolist() == (2 * whole.split(sizes)[rank]).tolist()


def run_helpers_eagerly() -> None:
    """Any helper that the host compiles."""
    from megatron.core.jit import jit_fuser

    # Compiling counts as well; unless the patch has been here, which this would undo.
    stance = contextlib.nullcontext()
    if torch._dynamo.eval_frame._stance.stance != "force_eager":
        stance = torch.compiler.set_stance("fail_on_recompile")  # type: ignore[assignment]
    with stance:
        assert jit_fuser(lambda x: x + 1)(torch.zeros(1)) == 1


def skip_shm_build() -> None:
    """DeepSpeed's start, where its compiler is as good as missing."""
    from deepspeed.accelerator import get_accelerator

    def load(self: object) -> None:
        raise RuntimeError("DeepSpeed compiles its shared-memory collectives")

    type(get_accelerator().create_op_builder("ShareMemCommBuilder")).load = load
    importlib.import_module("deepspeed.comm.torch").TorchBackend("gloo", None, None)


def shape_gathered_tokens() -> None:
    """The slots of experts from two tensor-parallel ranks."""
    import deepspeed
    from deepspeed.moe.mappings import gather_tokens
    from deepspeed.utils import groups

    class Mpu:
        """Both ranks are tensor-parallel."""

        get_tensor_model_parallel_world_size = staticmethod(dist.get_world_size)
        get_tensor_model_parallel_rank = staticmethod(dist.get_rank)
        get_tensor_model_parallel_group = staticmethod(lambda: dist.group.WORLD)

    for_deepspeed.skip_shm_build()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    groups.mpu = Mpu()
    own = torch.full((3, 2, 4), 1.0 + dist.get_rank())
    expected = torch.cat([torch.full((3, 2, 4), 1.0), torch.full((3, 2, 4), 2.0)], dim=1)
    assert torch.equal(gather_tokens(own, dim=1), expected)


def error_of(probe: Callable[[], None]) -> str | None:
    """What the probe raises, in words."""
    try:
        probe()
    except Exception as error:  # noqa: BLE001 - any failure counts
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    """Try one patch."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for other, patch in MEGATRON.items():
        if other != name and name in MEGATRON:
            patch()
    probe = globals()[name]
    without = error_of(probe)
    PATCHES[name]()
    (folder / f"{rank}.json").write_text(json.dumps([without, error_of(probe)]), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
