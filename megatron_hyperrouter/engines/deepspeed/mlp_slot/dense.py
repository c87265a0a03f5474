"""Layers without experts beside DeepSpeed's MoE layers."""

from __future__ import annotations

from deepspeed.utils import groups
from megatron.core.transformer.mlp import MLP


class DenseSlot(MLP):
    """megatron-core's MLP, which takes part when DeepSpeed cuts groups of experts out of the ranks."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed calls this on every module that has it (deepspeed 0.19.8, runtime/engine.py:2150).

        All ranks have to make a process group together.  A pipeline stage of dense layers alone has no MoE
        layer to do its part (moe/layer.py:90), and the other stages would wait for it for ever.
        """
        size, shared = self.config.expert_model_parallel_size, self.config.expert_tensor_parallel_size > 1
        if f"ep_size_{size}" in groups._get_expert_parallel_group_dict():
            return
        order = {"use_data_before_expert_parallel_": use_data_before_expert_parallel_}
        if shared and groups.mpu is not None:
            groups._create_expert_data_and_model_parallel(size, mpu=groups.mpu, **order)
        else:
            groups._create_expert_and_data_parallel(size, **order)
