"""One process that trains a tiny model, exports it, and loads the export into models that megatron-core
builds by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engines import te_stand_in

te_stand_in.install()

import torch  # noqa: E402
from distributed import world  # noqa: E402
from engines.layout_worker import VOCABULARY, micro_batches, run_case, tiny_config  # noqa: E402

from megatron_hyperrouter.compat.deepspeed import skip_shm_build  # noqa: E402
from megatron_hyperrouter.compat.megatron import install  # noqa: E402
from megatron_hyperrouter.config.tree import RunConfig  # noqa: E402
from megatron_hyperrouter.engines.base import RankPlace  # noqa: E402
from megatron_hyperrouter.model.spec import transformer_config  # noqa: E402

HERE = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)


def plain_loss(run: RunConfig, folder: Path) -> float:
    """Mean loss of megatron-core's own model, its spec and its router, with the weights in ``folder``."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    core = transformer_config(run, moe_router_load_balancing_type="none", moe_grouped_gemm=True)
    model = GPTModel(
        config=core,
        transformer_layer_spec=get_gpt_decoder_block_spec(core, use_transformer_engine=True),
        vocab_size=64,
        max_sequence_length=run.model.seq_length,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
    )
    state: Any = {"model": model.sharded_state_dict()}
    found = dist_checkpointing.load(state, str(folder))
    missing, unexpected = model.load_state_dict(found["model"], strict=False)
    assert not [name for name in missing if "_extra_state" not in name] and not unexpected, (
        missing,
        unexpected,
    )
    model.eval()
    total = tokens = 0.0
    with torch.no_grad():
        for tokens_BS, labels_BS in micro_batches(run, HERE, 99):
            loss_BS = model(
                tokens_BS, torch.arange(tokens_BS.size(1))[None].expand_as(tokens_BS), None, labels=labels_BS
            )
            total, tokens = total + float(loss_BS.double().sum()), tokens + loss_BS.numel()
    return total / tokens


def one(flags: list[str], folder: Path) -> dict[str, Any]:
    """Train, export, load, compare; or tell why it was refused."""
    from megatron_hyperrouter.engines.megatron.single_process import one_process
    from megatron_hyperrouter.errors import CheckpointError
    from megatron_hyperrouter.export.megatron import export_weights

    with world(folder.name):
        trained = run_case({"flags": flags, "steps": 2, "folder": str(folder / "ours"), "topk_eval": [2]}, 1)
    run = tiny_config(flags)
    with one_process(run):
        try:
            told = {"loss": plain_loss(run, export_weights(run, folder / "ours", folder / "theirs", step=2))}
        except CheckpointError as error:
            told = {"refused": str(error)}
    return {"expected": trained["evaluations"][2], **told}


def main() -> None:
    """All cases of the task."""
    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    install()
    asked = json.loads(task.read_text(encoding="utf-8"))
    told = []
    for number, flags in enumerate(asked["cases"]):
        told.append(one(flags, answer.parent / str(number)))
    assert VOCABULARY <= 64
    answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
