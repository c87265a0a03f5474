"""Suppresses warnings of the hosts, at import and for each layer, on which users cannot act."""

from __future__ import annotations

import logging
import os
import warnings


def silence_hosts() -> None:
    """Suppress warnings that do not apply here; call it before the hosts are imported.

    megatron-core 0.16.1 warns at import, in eight files, that Transformer Engine and apex are missing;
    both are optional here. Its transformer_layer.py:364 warns for each layer about an "Unknown MLP type":
    the MLP slot is ours by design. 0.19.2 warns for each ``GPTModel`` that the class will be replaced
    (gpt_model.py:118). DeepSpeed 0.19.8 warns at import, on every rank, that it found no
    accelerator (real_accelerator.py:213); we set the device. torch 2.13 reports a newer name at each
    collective of DeepSpeed 0.19.8 (comm/torch.py).
    """
    import torch

    silence_imports()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_not_the_slot)
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_not_the_class)


def silence_imports() -> None:
    """The part of it that needs no library: for commands that use megatron-core without an engine."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def _not_the_class(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("GPTModel IS DEPRECATED")


def _not_the_slot(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unknown MLP type")
